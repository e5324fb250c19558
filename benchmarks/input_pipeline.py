"""Images a second from files to patches, against the `transformers` image processor of Kimi K2.5 on the same files.

JPEG and PNG files of several sizes, made of photographs that scikit-image ships; decoded, scaled to a budget of patches and
cut. Ours runs in two threads, as the data pipeline does, and leaves uint8: the device normalises. Theirs runs in the
faster of two ways: one image after another with two threads inside PyTorch, or two threads with one each; it decodes with
Pillow, as its callers do, and leaves float32. The two take turns, and the ratio is the median over rounds. The figure is
the smaller of two ratios: for the budget that both have by default, 16384 patches, and for 1024 patches, where both mostly
decode and scale down; the bound is 2. Beside it: what ours takes with normalising; how far pixels differ; and tokens of
text a second.

Needs torchvision: pip install torchvision==0.28.0, which goes with torch 2.13. With --json one JSON line.
"""

import argparse
import concurrent.futures
import importlib.resources
import io
import json
import os
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from k25_jax.config import VisionConfig
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.vision.image import load_image, normalise, preprocess

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
SIDES = (224, 512, 1024, 1792)
BUDGETS = {"default": 16384, "small": 1024}
BOUND, THREADS = 2.0, 2
VISION = VisionConfig()


def their_processor():
    """The image processor; of torchvision only the Python part is used, so that any build of it will do."""
    try:
        with mock.patch("torch.library.register_fake", lambda name: lambda function: function):
            import torchvision  # noqa: F401
        from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
    except ImportError as problem:
        sys.exit(f"{problem}; pip install torchvision==0.28.0")
    return Kimi_K25ImageProcessor()


def write_files(folder: Path) -> list[Path]:
    """Each photograph in each size, as JPEG and as PNG."""
    files = []
    for name in PHOTOGRAPHS:
        data = importlib.resources.files("skimage").joinpath("data", name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
        for side in SIDES:
            scale = side / max(rgb.size)
            scaled = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.LANCZOS)
            for ending, options in (("jpg", {"quality": 90}), ("png", {"compress_level": 6})):
                files.append(folder / f"{Path(name).stem}-{side}.{ending}")
                scaled.save(files[-1], **options)
    return files


def our_patches(file: Path, budget: int) -> np.ndarray:
    return preprocess(load_image(file), VISION, budget).patches


def our_floats(file: Path, budget: int) -> np.ndarray:
    return normalise(our_patches(file, budget))


def their_patches(processor, file: Path, budget: int) -> torch.Tensor:
    with Image.open(file) as image:
        return processor(image.convert("RGB"), max_patches=budget, return_tensors="pt")["pixel_values"]


def seconds(work, files: list[Path], threads: int) -> float:
    """Time for all files."""
    start = time.perf_counter()
    if threads == 1:
        for file in files:
            work(file)
    else:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, files):
                pass
    return time.perf_counter() - start


def compare(processor, files: list[Path], budget: int, rounds: int) -> dict:
    """Images a second of both, and how far the pixels lie apart."""
    differences = [
        np.abs(our_floats(file, budget).reshape(-1) - their_patches(processor, file, budget).numpy().reshape(-1))
        for file in files[:: len(SIDES)]
    ]

    def theirs(threads: int, inside: int) -> float:
        torch.set_num_threads(inside)
        return seconds(lambda file: their_patches(processor, file, budget), files, threads)

    ways = {(1, THREADS): theirs(1, THREADS), (THREADS, 1): theirs(THREADS, 1)}
    way = min(ways, key=ways.get)
    rows = []
    for _ in range(rounds):
        ours = seconds(lambda file: our_patches(file, budget), files, THREADS)
        floats = seconds(lambda file: our_floats(file, budget), files, THREADS)
        rows.append((ours, floats, theirs(*way)))
    ratios = [theirs / ours for ours, _, theirs in rows]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_with_normalising": statistics.median(theirs / floats for _, floats, theirs in rows),
        "ours_images_a_second": len(files) / statistics.median(ours for ours, _, _ in rows),
        "theirs_images_a_second": len(files) / statistics.median(theirs for _, _, theirs in rows),
        "their_threads": way,
        "mean_difference": float(np.mean([difference.mean() for difference in differences])),
        "largest_difference": float(max(difference.max() for difference in differences)),
    }


def text_speed(folder: Path) -> dict:
    """Tokens a second of one thread, on the sources of the standard library, with bytes and with 20,000 word parts."""
    root = Path(os.__file__).parent
    text = "".join(file.read_text(errors="replace") for file in sorted(root.glob("*.py"))[:120])
    frequent = [word for word, _ in Counter(text.split()).most_common(8000) if 2 <= len(word) <= 12]
    parts = Counter(f" {word}"[:length].encode() for word in frequent for length in range(2, len(word) + 2))
    ordered = sorted(parts, key=lambda part: (len(part), -parts[part]))[:20000]
    ranks = [*(bytes([i]) for i in range(256)), *(part for part in ordered if len(part) > 1)]
    lines = [f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines))
    out = {}
    for name, tokenizer in (("bytes", load_tokenizer()), ("word_parts", load_tokenizer(str(folder)))):
        start = time.perf_counter()
        tokens = len(tokenizer.encode(text))
        out[f"{name}_tokens_a_second"] = tokens / (time.perf_counter() - start)
        out[f"{name}_megabytes_a_second"] = len(text.encode()) / 1e6 / (time.perf_counter() - start)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    processor = their_processor()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        found = {name: compare(processor, files, budget, args.rounds) for name, budget in BUDGETS.items()}
        text = text_speed(Path(folder))
    figure = min(row["ratio"] for row in found.values())
    out = {"name": "input_pipeline", "figure": figure, "bound": BOUND, "ok": figure >= BOUND, "files": len(files)}
    out |= found | text
    if args.json:
        print(json.dumps(out))
        return
    for name, row in found.items():
        print(
            f"{name} budget ({BUDGETS[name]} patches): ours {row['ours_images_a_second']:.1f} images/s, transformers "
            f"{row['theirs_images_a_second']:.1f}, ratio {row['ratio']:.2f} "
            f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}], with normalising {row['ratio_with_normalising']:.2f}; "
            f"pixels differ by {row['mean_difference']:.4f} in the mean, {row['largest_difference']:.3f} at most, of 2"
        )
    for name in ("bytes", "word_parts"):
        print(
            f"text, {name}: {text[f'{name}_tokens_a_second']:,.0f} tokens/s, {text[f'{name}_megabytes_a_second']:.1f} MB/s"
        )
    print(f"smaller ratio {figure:.2f} (bound {BOUND})")


if __name__ == "__main__":
    main()
