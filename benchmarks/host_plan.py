"""What a host plans beside a step of the 1.04T model, on 64 to 2048 chips, and the memory that it takes (K2.5 §3.8).

The batch has 16384 rows of 4096 tokens, in up to 16 parts, and packs of 4096 patches that are as full as lanes make them,
with images of heavy-tailed sizes. Timed is all that a host of four chips does for a step (`planned_as_told`): it hears of all
clips, balances them over the packs, and makes the tables of its own chips, rows and packs. Also: the bytes that hosts tell
each other, and the most memory that the planning takes. Beside it stands the way before: packs without room tried again for
every clip, and tables of all pairs of chips on every host, which are counted, not made.

Seconds are those of the processor, as much may run beside it. The bound is a share of the time that a step of the flagship
takes at least: 85 seconds on 512 chips, by the compiler's figures (benchmarks/RESULTS.md), elsewhere in proportion. With
--json one JSON line.
"""

import argparse
import dataclasses
import heapq
import json
import pathlib
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
from jax.sharding import AbstractMesh

from benchmarks.dep_balance import MEDIAN, SIGMA
from k25_jax.config import Experiment, VisionConfig, load_experiment
from k25_jax.data.packing import Batch, Rooms
from k25_jax.parallel.hosts import Planned, planned_as_told, what_to_tell
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.processes import readers
from k25_jax.vision.patchpack import _longest_first, blank_pack, clip_flops, write_grid

EXPERIMENT = pathlib.Path(__file__).parent.parent / "experiments/pretrain/k25_1t.py"
CHIPS, AT, EACH, PARTS = (64, 256, 512, 2048), 512, 4, 16  # AT: of the bounds; EACH: chips of a host; PARTS: at most
STEP_SECONDS, SHARE_BOUND, MEGABYTES_BOUND = 85.0, 0.02, 200
MISSES = 20  # images in a row for which a lane finds no room, and then its packs are full


def batch_of(run: Experiment, host: int, hosts: int) -> Batch:
    """What one of the hosts reads, without pixels: full packs, the tokens of their images in rows at random."""
    data, config, rng = run.data, run.model.vision, np.random.default_rng(host)
    rows, number = data.batch_size // hosts, data.packs // hosts
    packs, lines = Rooms(number, data.pack_patches), np.zeros(rows, int)
    pack, media_BL = blank_pack(number, data.pack_patches, 0, np.uint8), np.full((rows, data.seq_len), -1, np.int32)
    count, tokens, misses = [0] * number, [0] * number, 0
    while misses < MISSES:
        size = int(np.clip(np.exp(rng.normal(np.log(MEDIAN), SIGMA)) // 4 * 4, 16, data.pack_patches))
        where = packs.add(size)
        misses = 0 if where else misses + 1
        if where:
            (index, start), line = where, int(rng.choice(np.flatnonzero(lines + size // 4 <= data.seq_len)))
            count[index] += 1
            write_grid(pack, index, start, count[index], tokens[index], (1, 2, size // 2), config.merge)
            first = index * data.pack_patches // config.group + tokens[index]
            media_BL[line, lines[line] : lines[line] + size // 4] = np.arange(first, first + size // 4)
            tokens[index] += size // 4
            lines[line] += size // 4
    blank = np.zeros_like(media_BL)
    return Batch(blank, blank, blank.astype(np.float32), blank + 1, blank, media_BL, pack)


def longest_first_before(sizes: list[int], packs: int, pack_patches: int, config: VisionConfig) -> list[int] | None:
    """The placement as it was found before: packs without room are put back after every clip."""
    placement, room = [0] * len(sizes), [pack_patches] * packs
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    costs = clip_flops(np.asarray(sizes, np.int64)[order], config) * packs
    heap = list(range(packs))
    for clip, cost in zip(order.tolist(), costs.tolist(), strict=True):
        without_room = []
        while heap and room[heap[0] % packs] < sizes[clip]:
            without_room.append(heapq.heappop(heap))
        if not heap:
            return None
        placement[clip] = heap[0] % packs
        room[placement[clip]] -= sizes[clip]
        heapq.heapreplace(heap, heap[0] + cost)
        for entry in without_room:
            heapq.heappush(heap, entry)
    return placement


def table_bytes_before(plan: Planned, run: Experiment) -> int:
    """Of the tables that every host made: for each pair of chips rounds for the most that any pair exchanges.

    That is at least an image of the largest size; two powers of two, as they were.
    """
    chips, group = plan.mesh.size, run.model.vision.group
    upward = lambda least: 1 << max(0, int(np.ceil(least)) - 1).bit_length()  # noqa: E731
    width = upward(run.data.packs * run.data.pack_patches / group / chips / chips)
    return 2 * 4 * chips**2 * width * upward(run.data.max_image_patches / group / width)


def processor_seconds(function: Callable, *args):
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def figures(run: Experiment, chips: int) -> tuple[dict, list[int]]:
    """(what host 0 of so many chips needs, the sizes of all images)."""
    parts = min(PARTS, run.data.batch_size * run.mesh.pipe // chips // run.mesh.microbatches)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=parts))
    shape = (run.mesh.pipe, chips // run.mesh.pipe // run.mesh.expert, 1, run.mesh.expert)
    everyone = readers(np.arange(chips).reshape(shape) // EACH)
    own = next(reader for reader in everyone if 0 in reader.processes)
    batch, told = None, {}  # of the processes that they read for
    for number, reader in enumerate(everyone):
        one = batch_of(run, number, len(everyone))
        batch = one if reader is own else batch
        told[reader.processes[0]] = what_to_tell(one, run.model.vision)
    told = [told[process] for process in sorted(told)]
    heard = [json.dumps(one).encode() for one in told]
    mesh, mine = AbstractMesh(shape, AXES), tuple(range(EACH))

    def work() -> Planned:
        what_to_tell(batch, run.model.vision)
        return planned_as_told([json.loads(text) for text in heard], batch, everyone, own, mine, mesh, run)

    plan, seconds = min((processor_seconds(work) for _ in range(3)), key=lambda pair: pair[1])
    tracemalloc.start()
    work()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    out = {"chips": chips, "seconds": seconds, "share": seconds / STEP_SECONDS * chips / AT, "megabytes": megabytes}
    out |= {"fill": 1 - plan.metrics["waste_patches"], "clips": plan.metrics["clips"]}
    out |= {"table_megabytes": sum(a.nbytes for a in (*plan.batch.routes, *(plan.pixels or ()))) / 1e6}
    out |= {"told_megabytes": sum(len(zlib.compress(text, 1)) for text in heard) / 1e6}
    out["table_megabytes_before"] = table_bytes_before(plan, run) / 1e6
    return out, [int(np.prod(clip[1:4])) for one in told for clip in one["clips"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    run, rows = load_experiment(str(EXPERIMENT)), {}
    for chips in CHIPS:
        rows[chips], sizes = figures(run, chips)
    place = sizes, run.data.packs, run.data.pack_patches, run.model.vision
    ours, seconds = processor_seconds(_longest_first, *place)
    theirs, seconds_before = processor_seconds(longest_first_before, *place)
    at = rows[AT]
    ok = at["share"] <= SHARE_BOUND and at["megabytes"] <= MEGABYTES_BOUND and ours == theirs
    out = {"name": "host_plan", "figure": at["share"], "bound": SHARE_BOUND, "ok": ok, "rows": list(rows.values())}
    out |= {"megabytes": at["megabytes"], "megabytes_bound": MEGABYTES_BOUND, "same_placement": ours == theirs}
    out |= {"placing": seconds, "placing_before": seconds_before, "ratio": seconds_before / seconds}
    if args.json:
        print(json.dumps(out))
        return
    for row in rows.values():
        print(
            f"{row['chips']:5d} chips, {row['clips']} images, packs {row['fill']:.1%} full: {row['seconds']:5.2f} s, "
            f"{row['share']:.2%} of a step; {row['megabytes']:.0f} MB, of them tables {row['table_megabytes']:.0f} (before "
            f"{row['table_megabytes_before']:.0f}); hosts tell each other {row['told_megabytes']:.2f} MB"
        )
    print(
        f"images placed in {seconds:.2f} s, before in {seconds_before:.1f} s, {out['ratio']:.0f} times as long; the same"
    )
    print(f"bounds: {SHARE_BOUND:.0%} of a step of {STEP_SECONDS:.0f} s and {MEGABYTES_BOUND} MB at {AT} chips")


if __name__ == "__main__":
    main()
