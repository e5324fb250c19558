"""Shares of tokens that hold, and packing that wastes little (K2.5 §3.3).

Text of 1500 bytes a piece and rendered images of 16 to 256 patches, no model. For each target of vision's share the worst
error over any 200 steps in a row, the mean padding of rows and of packs (of batches that have any), and batches a second.
The figure is the worst error of all targets, in points of a share. Beside it the old way in the same run: records drawn by
weights that give the same share on the average, packed first-fit in order of arrival, eight waiting at most. With --json
one JSON line.
"""

import argparse
import json
import time

import grain
import numpy as np

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.packing import batch_stats
from k25_jax.data.pipeline import Preparer, make_pipeline
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import load_tokenizer

MODEL = preset("tiny")
SOURCES = (("library:train", 1.0), ("shapes:train", 2.0), ("words:train", 1.0), ("photographs:train:size=224", 2.0))
TARGETS = {0.1: 1024, 0.2: 2048, 0.5: 5120}  # share of vision: patches of the packs
STEPS, WINDOW, PACKS = 220, 200, 2
BOUND, TOKENS_BOUND, PATCHES_BOUND = 0.005, 0.03, 0.05
OLD_LOOKAHEAD = 8


def config(share: float) -> DataConfig:
    sources = tuple(SourceConfig(path, "task", weight) for path, weight in SOURCES)
    return DataConfig(
        sources=sources, batch_size=4, seq_len=2048, packs=PACKS, pack_patches=TARGETS[share] // PACKS // 4 * 4,
        max_image_patches=256, vision_share=share,
    )  # fmt: skip


def ours(data: DataConfig) -> dict:
    iterator, totals, stats = make_pipeline(data, MODEL, STEPS), [np.zeros(len(SOURCES))], []
    start = time.perf_counter()
    for _ in range(STEPS):
        stats.append(batch_stats(next(iterator)))
        totals.append(np.asarray(iterator.get_state()["lanes"][0]["mixture"]["total"]))
    seconds = time.perf_counter() - start
    modalities = iterator.get_state()["lanes"][0]["identity"]["modalities"]
    iterator.close()
    tokens = np.diff(totals, axis=0)
    vision = tokens[:, [modality == "vision" for modality in modalities]].sum(axis=1)
    with_clips = [one["waste_patches"] for one in stats if one["clips"]]
    figures = {"tokens": np.mean([one["waste_tokens"] for one in stats]), "patches": np.mean(with_clips)}
    return figures | {"error": worst(vision, tokens.sum(axis=1), data.vision_share), "batches_s": STEPS / seconds}


def worst(vision: np.ndarray, tokens: np.ndarray, share: float) -> float:
    """The largest error of the share over any WINDOW steps in a row."""
    sums = [np.convolve(one, np.ones(WINDOW), "valid") for one in (vision, tokens)]
    return float(np.abs(sums[0] / sums[1] - share).max())


def old(data: DataConfig) -> dict:
    """Weights of records, first fit, and a batch ends when OLD_LOOKAHEAD wait."""
    prepare = Preparer(load_tokenizer(), data, MODEL)
    sources = [open_source(source) for source in data.sources]
    means = [np.mean([len(prepare(s[i]).example) for i in range(0, len(s), len(s) // 100)]) for s in sources]
    weights = np.array([1.0] + [weight for _, weight in SOURCES[1:]])
    weights[1:] *= data.vision_share / weights[1:].sum()
    weights[0] = 1 - data.vision_share
    parts = [grain.MapDataset.source(s).shuffle(seed=n).repeat() for n, s in enumerate(sources)]
    names = [part.map(lambda record, n=n: (n, prepare(record).example)) for n, part in enumerate(parts)]
    stream = iter(grain.MapDataset.mix(names, (weights / means).tolist()).to_iter_dataset())
    waiting, vision, tokens, wasted = [], [], [], []
    for _ in range(STEPS):
        rows, packs, left, handed, tried = [0] * data.batch_size, [0] * data.packs, [], [0, 0], list(waiting)
        while tried or (len(left) < OLD_LOOKAHEAD and min(rows) < data.seq_len - 2):
            number, example = tried.pop(0) if tried else next(stream)
            row = next((r for r, used in enumerate(rows) if used + len(example) <= data.seq_len), None)
            placed = list(packs)
            for clip in example.clips:
                free = (p for p, used in enumerate(placed) if used + len(clip.patches) <= data.pack_patches)
                pack = next(free, None)
                row = None if pack is None else row
                placed[pack or 0] += len(clip.patches)
            if row is None:
                left.append((number, example))
                continue
            rows[row], packs = rows[row] + len(example), placed
            handed[number > 0] += len(example)
        waiting = left
        vision.append(handed[1])
        tokens.append(sum(handed))
        wasted.append((1 - sum(rows) / data.batch_size / data.seq_len, 1 - sum(packs) / data.packs / data.pack_patches))
    error = worst(np.array(vision), np.array(tokens), data.vision_share)
    return {
        "tokens": np.mean([a for a, _ in wasted]),
        "patches": np.mean([b for _, b in wasted if b < 1]),
        "error": error,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    rows = {}
    for share in TARGETS:
        rows[share] = {"ours": ours(config(share)), "old": old(config(share))}
        if not args.json:
            for name, got in rows[share].items():
                speed = f", {got['batches_s']:.0f} batches/s" if "batches_s" in got else ""
                print(
                    f"vision {share:.0%} {name:4}: worst share off by {100 * got['error']:.2f} points (bound "
                    f"{100 * BOUND:.1f}), padding {100 * got['tokens']:.2f}% of tokens (bound {100 * TOKENS_BOUND:.0f}), "
                    f"{100 * got['patches']:.2f}% of patches (bound {100 * PATCHES_BOUND:.0f}){speed}"
                )
    new = [row["ours"] for row in rows.values()]
    figure = max(got["error"] for got in new)
    ok = figure <= BOUND and all(got["tokens"] <= TOKENS_BOUND and got["patches"] <= PATCHES_BOUND for got in new)
    if args.json:
        plain = {
            str(share): {n: {k: float(v) for k, v in got.items()} for n, got in row.items()}
            for share, row in rows.items()
        }
        print(json.dumps({"name": "mixture", "figure": figure, "bound": BOUND, "ok": bool(ok), "targets": plain}))


if __name__ == "__main__":
    main()
