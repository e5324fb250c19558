"""Vision cost balanced over 512 devices, in time for the next batch (row g of the bounds; K2.5 §3.8).

A batch of images whose sizes come from a heavy-tailed mix: log-normal, from 16 patches to a whole pack, until there are
45k patches a device. The figure is the cost of the busiest device over the mean of all; the time is that of `balance`,
the best of twenty. Beside it the same images first-fit in order of arrival, and 64, 128 and 256 devices that share the
same packs: `balance` knows no mesh. With --json one JSON line.
"""

import argparse
import json
import time

import numpy as np

from k25_jax.config import VisionConfig
from k25_jax.vision.patchpack import balance, clip_flops, first_fit

DEVICES, PACKS, PACK_PATCHES, PATCHES = 512, 16, 4096, 45_000
MEDIAN, SIGMA = 600, 1.2
BOUND, SECONDS_BOUND = 1.05, 0.050


def sizes(seed: int = 0) -> list[int]:
    """Patches of each image: multiples of the four that make a token."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(MEDIAN), SIGMA, DEVICES * PATCHES // 100))
    drawn = np.clip(drawn // 4 * 4, 16, PACK_PATCHES).astype(int)
    return drawn[: np.searchsorted(drawn.cumsum(), DEVICES * PATCHES) + 1].tolist()


def max_over_mean(placement, images: list[int], devices: int) -> float:
    """Of the cost of contiguous shares of the packs."""
    owner = np.asarray(placement) // (DEVICES * PACKS // devices)
    loads = np.bincount(owner, clip_flops(np.asarray(images, float), VisionConfig()), minlength=devices)
    return float(loads.max() / loads.mean())


def timed(repeats: int, function, *args):
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*args)
        best = min(best, time.perf_counter() - start)
    return result, best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    images, packs = sizes(), DEVICES * PACKS
    ours, seconds = timed(20, balance, images, packs, PACK_PATCHES, VisionConfig())
    theirs, first_fit_seconds = timed(1, first_fit, images, packs, PACK_PATCHES)
    figure = max_over_mean(ours, images, DEVICES)
    out = {
        "name": "dep_balance",
        "figure": figure,
        "bound": BOUND,
        "ok": figure <= BOUND and seconds <= SECONDS_BOUND,
        "seconds": seconds,
        "seconds_bound": SECONDS_BOUND,
        "images": len(images),
        "patches_a_device": sum(images) // DEVICES,
        "fewer_devices": {str(n): max_over_mean(ours, images, n) for n in (64, 128, 256)},
        "first_fit": max_over_mean(theirs, images, DEVICES),
        "first_fit_seconds": first_fit_seconds,
    }
    if args.json:
        print(json.dumps(out))
        return
    print(f"{len(images)} images, {out['patches_a_device']} patches a device, {DEVICES} devices of {PACKS} packs")
    print(
        f"balance    max/mean {figure:.4f} (bound {BOUND}) in {seconds * 1e3:.1f} ms (bound {SECONDS_BOUND * 1e3:.0f})"
    )
    print(f"first fit  max/mean {out['first_fit']:.4f} in {first_fit_seconds * 1e3:.1f} ms")
    print("the same packs on fewer devices:", {n: round(x, 4) for n, x in out["fewer_devices"].items()})


if __name__ == "__main__":
    main()
