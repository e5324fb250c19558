"""Passkey retrieval at 1, 2, 4 and 8 times the length of pre-training, before and after mid-training (K2.5 §3.3).

The three stages of experiments/midtrain/passkey.py run one after the other in `--workdir`; what is there already is not
trained again. The figure is the share of passkeys that the model gives back at 8 times the length after mid-training.
Beside it the same before, and before with YaRN switched on but not trained. Draws passkey.png in the folder. With --json
one JSON line.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from k25_jax.checkpoint.load import load_model
from k25_jax.config import load_experiment
from k25_jax.data.tasks import make_task
from k25_jax.evals.passkey import by_depth, retrieval
from k25_jax.report.retrieval import retrieval_figure
from k25_jax.train.loop import train

FILE = pathlib.Path(__file__).parent.parent / "experiments" / "midtrain" / "passkey.py"
SHORT, LENGTHS, STAGES = 128, (128, 256, 512, 1024), (128, 512, 1024)
BINS, BOUND = 5, 0.9


def trained(workdir: pathlib.Path) -> dict[int, object]:
    """The model of each stage, by its length."""
    models, before = {}, ""
    for length in STAGES:
        folder = workdir / str(length)
        train(load_experiment(f"{FILE}:{length}", [f"train.init_from={before}"]), folder)
        models[length], before = load_model(folder), str(folder)
    return models


def with_rope_of(model, other):
    """The weights of `model` under the rotary embedding of `other`."""
    text = dataclasses.replace(model.config.text, rope=other.config.text.rope)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, text=text))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/passkey")
    parser.add_argument("--questions", type=int, default=200, help="for each model and length")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    workdir = pathlib.Path(args.workdir)
    stages = trained(workdir)
    models = {
        "before": stages[128],
        "before, YaRN x8 untrained": with_rope_of(stages[128], stages[1024]),
        "after mid-training x4": stages[512],
        "after mid-training x8": stages[1024],
    }
    accuracy, depths = {}, {}
    for name, model in models.items():
        found = [
            retrieval(
                model.params,
                model.config,
                model.tokenizer,
                make_task(f"passkey:test:length={n}"),
                range(args.questions),
            )
            for n in LENGTHS
        ]
        accuracy[name] = [float(np.mean([f.right for f in at_length])) for at_length in found]
        depths[name] = np.array([by_depth(at_length, BINS) for at_length in found]).T
        if not args.json:
            print(
                f"{name:28s}" + "".join(f"{n:>7d}: {a:.3f}" for n, a in zip(LENGTHS, accuracy[name], strict=True)),
                flush=True,
            )
    shown = {name: depths[name] for name in ("before", "after mid-training x8")}
    figure = retrieval_figure(accuracy, shown, LENGTHS, SHORT, "Passkey retrieval")
    (workdir / "passkey.png").write_bytes(figure)
    after, before = accuracy["after mid-training x8"], accuracy["before"]
    out = {"name": "passkey", "figure": after[-1], "bound": BOUND, "ok": after[-1] >= BOUND, "before": before[-1]}
    out |= {"lengths": LENGTHS, "accuracy": accuracy, "questions": args.questions, "plot": str(workdir / "passkey.png")}
    if args.json:
        print(json.dumps(out))
        return
    print(f"x8 after mid-training {after[-1]:.3f} (bound {BOUND}), before {before[-1]:.3f}; {out['plot']}")


if __name__ == "__main__":
    main()
