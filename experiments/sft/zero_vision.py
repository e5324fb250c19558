"""Does text alone teach a model to work on pictures with a program? Zero-vision SFT at tiny scale (K2.5 §3.4).

    k25 sweep --config=experiments/sft/zero_vision.py --workdir=runs/zero_vision --jobs=2

runs programs on pictures in the sandbox and writes them as chats, trains three seeds of two arms on them from the base
model, and asks all models held-out questions of nine tasks, with the tool `ipython` in a sandbox:

| arm | learns from |
|---|---|
| zero_vision | chats whose pictures are in the sandbox alone |
| text_vision | half as much of them, and as much of the same with the pictures shown |
| none | nothing: the base model |

README.md beside this file says what came out.
"""

import dataclasses
import json
import pathlib

import ml_collections
import numpy as np
from rich.progress import track

from k25_jax.agents.demonstrations import SHOWN, TEXT, demonstrate
from k25_jax.agents.tasks import CONDITIONS
from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.load import load_model
from k25_jax.config import argument, run_local, to_dict
from k25_jax.data.tasks import PROGRAMMED
from k25_jax.evals.local import identity_of
from k25_jax.evals.tool_use import Asker, Outcome
from k25_jax.report.plots import grouped_points
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig

ARMS = {"zero_vision": (TEXT,), "text_vision": (TEXT, SHOWN)}  # files of chats, as many tokens of each
SEEDS = (0, 1, 2)
RECORDS = 2700  # chats
STEPS, ROWS, LENGTH = 600, 8, 1024
QUESTIONS = 32  # of a task
WIDTH = 8  # episodes at once


def get_config(arg: str = ""):
    """One arm; "text_vision,runlocal" shrinks it to four steps on other data. The sweep names the data."""
    arm, local = argument(arg, tuple(ARMS), "zero_vision.py")
    config = ml_collections.ConfigDict()
    config.name = f"sft_{arm}"
    config.model = to_dict(read_config(BASE))
    config.data = dict(
        sources=sources(arm, "runs/zero_vision"),
        batch_size=ROWS,
        seq_len=LENGTH,
        packs=2 if SHOWN in ARMS[arm] else 0,
        pack_patches=64,
        max_image_patches=64,
        seed=0,
    )
    config.optim = dict(
        peak_lr=1e-3, end_lr=1e-4, warmup_steps=min(50, STEPS // 4), decay_steps=STEPS // 2, weight_decay=0.05
    )
    config.train = dict(steps=STEPS, log_every=10, checkpoint_every=250, keep=1, seed=0, init_from="base")
    return run_local(config) if local else config


def sources(arm: str, workdir: str) -> list[dict]:
    """The chats of an arm."""
    return [dict(path=f"{workdir}/chats/{file}", weight=1.0) for file in ARMS[arm]]


def get_hyper():
    """Three seeds of each arm; a seed chooses the order of the data."""
    return [
        dict(
            name=f"{arm}_{seed}",
            config=f"experiments/sft/zero_vision.py:{arm}",
            overrides=(f"data.sources={sources(arm, '{workdir}')}", f"train.seed={seed}", f"data.seed={seed}"),
        )
        for seed in SEEDS
        for arm in ARMS
    ]


def prepare(workdir: pathlib.Path) -> None:
    """Run the programs and write the chats, unless they are there."""
    if not (workdir / "chats" / SHOWN).is_file():
        bar = iter(track(range(RECORDS), "running programs"))
        demonstrate(workdir / "chats", RECORDS, on_progress=lambda _: next(bar))


def report(workdir: pathlib.Path) -> None:
    """Ask all models under all conditions, write the figure and the tables."""
    runs = {f"{arm}_{seed}": workdir / f"{arm}_{seed}" for seed in SEEDS for arm in ARMS}
    asked = {name: ask(of, workdir / f"{name}.json") for name, of in (runs | {"none": "base"}).items()}
    found = {arm: [asked[f"{arm}_{seed}"] for seed in SEEDS] for arm in ARMS} | {"none": [asked["none"]]}
    by_task = {
        arm: {task: [mean(run, "shown", task) for run in runs] for task in PROGRAMMED}
        | {f"all, {condition}": [mean(run, condition) for run in runs] for condition in CONDITIONS}
        for arm, runs in found.items()
    }
    title = f"Pictures by program: shown to the model, by task, then all tasks by condition; {len(SEEDS)} seeds an arm"
    figure = grouped_points(by_task, title, "right answers, %", top=100, digits=0)
    (workdir / "zero_vision.png").write_bytes(figure)
    table = as_table(found, by_task)
    (workdir / "results.md").write_text(table)
    print(table)
    print(f"wrote {workdir / 'zero_vision.png'} and results.md")


def ask(checkpoint: str | pathlib.Path, file: pathlib.Path) -> list[Outcome]:
    """The outcomes of a model, kept in `file` and read from there as long as it is the same model."""
    of = identity_of(checkpoint) | {"questions": QUESTIONS}
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("of") != of:
        kept = {"of": of, "outcomes": [dataclasses.asdict(outcome) for outcome in ask_all(checkpoint, file.stem)]}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
        temporary.replace(file)
    return [Outcome(**outcome) for outcome in kept["outcomes"]]


def ask_all(checkpoint: str | pathlib.Path, name: str) -> list[Outcome]:
    """The questions of all tasks under all conditions, to one model."""
    model = load_model(checkpoint)
    settings = EngineConfig(rows=(WIDTH,), pieces=(4,), piece=64, pages=WIDTH * LENGTH // 16 * 2)
    engine = Engine(model.params, model.config, settings)
    outcomes: list[Outcome] = []
    with Asker(engine, model.tokenizer, WIDTH) as asker:
        for condition in CONDITIONS:
            for task in track(PROGRAMMED, f"asking {name}, {condition}"):
                outcomes += asker.ask(f"{task}:test", QUESTIONS, condition)
    return outcomes


def mean(outcomes: list[Outcome], condition: str, task: str = "", field: str = "score") -> float:
    """The mean of `field` in per cent, over one task or all."""
    values = [
        getattr(o, field)
        for o in outcomes
        if o.condition == condition and o.spec.startswith(f"{task}:" if task else "")
    ]
    return 100 * float(np.mean(values))


def as_table(found: dict, by_task: dict) -> str:
    """Right answers by task with pictures shown, of all tasks by condition; then the share of questions whose code ran."""
    lines = ["| right answers, % | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name in next(iter(by_task.values())):
        lines.append(f"| {name} | " + " | ".join(spread(by_task[arm][name]) for arm in found) + " |")
    for condition in CONDITIONS:
        cells = [spread([mean(run, condition, field="ran") for run in runs]) for runs in found.values()]
        lines.append(f"| code ran, {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
