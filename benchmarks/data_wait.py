"""The share of its time that the training loop waits for data, on the tiny preset with everything on one machine (K2.5 §3.3).

Three experiments as their files have them: the demo, the joint stage of the base model with pictures of all tasks drawn as
they are asked for, and early fusion of the ablation. A wait is the time in which the loop has asked for a batch that is not
yet made and placed; the first steps, which compile and fill the buffers, do not count. The figure is the largest median over
steps; the bound is 5 %. Beside it the share of the whole time, which a few long waits can raise. With --json one JSON line.
"""

import argparse
import json
import statistics
import tempfile

from k25_jax.config import load_experiment
from k25_jax.train.loop import train

EXPERIMENTS = {
    "demo": "experiments/pretrain/demo.py",
    "base": "experiments/base/base.py:joint",
    "ablation": "experiments/ablations/vision_timing.py:early",
}
BOUND, FIRST = 0.05, 10


def measure(spec: str, steps: int) -> dict[str, float]:
    """Seconds a step, and the shares that are waits."""
    own = (f"train.steps={FIRST + steps}", "train.log_every=1", f"train.checkpoint_every={10 * steps}")
    start_fresh = ("train.init_from=''", "train.init_vision_from=''")  # weights change no wait
    experiment = load_experiment(spec, own + start_fresh)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, folder, on_step=lambda step, metrics: rows.append(metrics))
    rows = rows[FIRST:]
    taken, waited = (sum(row[name] for row in rows) for name in ("step_seconds", "data_seconds"))
    return {
        "median_share": statistics.median(row["data_share"] for row in rows),
        "whole_share": waited / taken,
        "step_seconds": taken / len(rows),
        "tokens_a_second": sum(row["tokens"] for row in rows) / taken,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each experiment")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    found = {name: measure(spec, args.steps) for name, spec in EXPERIMENTS.items()}
    figure = max(row["median_share"] for row in found.values())
    if args.json:
        out = {"name": "data_wait", "figure": figure, "bound": BOUND, "ok": figure <= BOUND}
        print(json.dumps(out | {"steps": args.steps} | found))
        return
    for name, row in found.items():
        print(
            f"{name}: {100 * row['median_share']:.2f} % of a step ({100 * row['whole_share']:.2f} % of all) is waiting for "
            f"data; {row['step_seconds']:.3f} s a step, {row['tokens_a_second']:,.0f} tokens/s"
        )
    print(f"largest {100 * figure:.2f} % (bound {100 * BOUND:.0f} %)")


if __name__ == "__main__":
    main()
