"""`make demo`: train a tiny K2.5 on real files, kill and resume it half-way, evaluate it, write the report."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

from k25_jax.config import ConfigError, load_experiment
from k25_jax.config.experiments import FOLDER
from k25_jax.data.tasks import make_task
from k25_jax.evals.categories import GREEDY, Rendered
from k25_jax.evals.core import accuracy, evaluate
from k25_jax.evals.local import open_checkpoint
from k25_jax.evals.protocol import Result
from k25_jax.models.count import count_params
from k25_jax.report import html, plots
from k25_jax.report.metrics import read_metrics
from k25_jax.report.run import config_sections, curve_sections
from k25_jax.train.interrupts import raising

EXPERIMENT = FOLDER / "pretrain" / "demo.py"
TASKS = (("digits:test:size=28", 360), ("words:test", 96), ("shapes:test", 96), ("photographs:test", 96))
SHOWN = 8  # answers of each task in the report
COMPARED = ("loss", "accuracy", "grad_norm", "tokens")  # what must be equal, bit for bit, after the resume


def demo(workdir: pathlib.Path, steps: int = 0) -> int:
    """Everything, from nothing; prints where the report is."""
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / "experiment.json").is_file():
        raise ConfigError(
            f"{workdir} holds something other than a run, which would be deleted; choose another --workdir"
        )
    if workdir.exists():
        shutil.rmtree(workdir)
    began = time.perf_counter()
    overrides = [f"train.steps={steps}", f"optim.decay_steps={steps // 3}"] if steps else []
    experiment = load_experiment(str(EXPERIMENT), overrides)
    command = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={EXPERIMENT}", f"--workdir={workdir}"]
    command += [f"--config.{item}" for item in overrides]
    resumed = train_with_a_kill(command, workdir, experiment.train)
    trained = time.perf_counter() - began

    answerer, results = open_checkpoint(workdir), {}
    for spec, count in TASKS:
        task = Rendered(make_task(spec), spec)
        print(f"asking {count} held-out questions of {task.task.name}")
        indices = np.linspace(0, len(task) - 1, count).astype(int).tolist()
        results[spec] = evaluate(answerer, task, dataclasses.replace(GREEDY, max_tokens=16), indices)
    summary = summarise(workdir, results, resumed, trained, time.perf_counter() - began)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_reports(workdir, results, summary)
    print(json.dumps(summary, indent=1))
    print(f"report: {workdir / 'report.html'} and {workdir / 'report.png'}")
    return 0


def train_with_a_kill(command: list[str], workdir: pathlib.Path, train) -> dict:
    """Train in a process of its own, kill it with SIGKILL half-way, start it again; compare the steps done twice."""
    half = max(train.steps // 2 // train.checkpoint_every, 1) * train.checkpoint_every
    kill_at = max(min(half + max(train.checkpoint_every // 4, 5), 3 * train.steps // 4), 1)
    with training(command) as process:
        while process.poll() is None and last_step(workdir) < kill_at:
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()
            process.wait()
            print(f"\nkilled at step {last_step(workdir)}; starting again")
        elif process.returncode:
            raise ConfigError(f"training ended with status {process.returncode}; its message is above")
    before = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    with training(command) as process:
        if status := process.wait():
            raise ConfigError(f"training ended with status {status} after the kill; its message is above")
    after = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    twice = [step for step in before if before[step]["tokens_per_second"] != after[step]["tokens_per_second"]]
    equal = all(before[step][name] == after[step][name] for step in before for name in COMPARED)
    return {"resumed_exactly": bool(twice) and equal, "killed_at_step": max(before), "steps_done_twice": len(twice)}


@contextlib.contextmanager
def training(command: list[str]):
    """A process that trains; when this one is to end, it is ended first."""
    with raising(), subprocess.Popen(command) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


def last_step(workdir: pathlib.Path) -> int:
    """The last logged step of a run that is being written."""
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        return 0
    lines = [line for line in file.read_bytes().split(b"\n")[:-1] if line]
    return json.loads(lines[-1])["step"] if lines else 0


def summarise(workdir, results: dict[str, list[Result]], resumed: dict, trained: float, seconds: float) -> dict:
    """Every figure of the report, by name."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    counts = count_params(load_experiment(str(EXPERIMENT)).model)
    speeds = [row["tokens_per_second"] for row in metrics[len(metrics) // 10 :]]
    return {
        **{f"{spec.partition(':')[0]}_accuracy": accuracy(found) for spec, found in results.items()},
        **{f"{spec.partition(':')[0]}_questions": len(found) for spec, found in results.items()},
        **resumed,
        "first_loss": float(metrics[0]["loss"]),
        "final_loss": float(np.mean([row["loss"] for row in metrics[-20:]])),
        "steps": metrics[-1]["step"],
        "tokens_trained": int(sum(row["tokens"] for row in metrics)),
        "tokens_per_second": float(np.median(speeds)),
        "parameters_total": counts["total"],
        "parameters_active": counts["active"],
        "training_seconds": trained,
        "total_seconds": seconds,
    }


def write_reports(workdir: pathlib.Path, results: dict[str, list[Result]], summary: dict) -> None:
    """report.html and report.png."""
    samples = {spec: shown_samples(spec, found) for spec, found in results.items()}
    metrics = read_metrics(workdir / "metrics.jsonl")
    names = [spec.partition(":")[0] for spec in results]
    series = {
        "model": {name: summary[f"{name}_accuracy"] for name in names},
        "guessing": {name: chance(spec) for name, spec in zip(names, results, strict=True)},
    }
    bars = plots.bar_chart(series, "Held-out questions answered rightly", "share of answers", top=1.0)
    keys = {
        "digits read": f"{100 * summary['digits_accuracy']:.1f} %",
        "resumed exactly": "yes" if summary["resumed_exactly"] else "NO",
        "tokens a second": f"{summary['tokens_per_second']:,.0f}",
        "parameters": f"{summary['parameters_total'] / 1e6:.2f} M",
        "time": f"{summary['total_seconds'] / 60:.1f} min",
    }
    figures = [(name, str(value) if isinstance(value, bool) else value) for name, value in summary.items()]
    sections = [
        html.Text("What this is", INTRODUCTION.format(**summary)),
        html.KeyFigures("Key figures", keys),
        *curve_sections(metrics)[:1],
        html.Figure("Held-out accuracy", bars, "The model beside always giving the commonest answer."),
        *[html.Samples(f"Held-out {n}", samples[s], f"{len(results[s])} questions asked, {len(samples[s])} shown.")
          for n, s in zip(names, results, strict=True)],
        *curve_sections(metrics)[1:],
        html.Table("All figures", ("name", "value"), figures),
        html.Code("Go on from here", COMMANDS.format(workdir=workdir)),
        *config_sections(workdir),
    ]  # fmt: skip
    html.write_report(workdir / "report.html", "k25_jax demo: a tiny Kimi K2.5 learns to read", sections)
    losses = {"loss": ([row["step"] for row in metrics], [float(row["loss"]) for row in metrics])}
    mixed = [sample for group in zip(*samples.values(), strict=False) for sample in group]
    html.report_png(workdir / "report.png", "k25_jax demo: a tiny Kimi K2.5 learns to read", keys, losses, mixed)


def shown_samples(spec: str, results: list[Result]) -> list[html.Sample]:
    """A few evenly spaced answers with their images."""
    task = make_task(spec)
    picked = [results[i] for i in np.linspace(0, len(results) - 1, SHOWN).astype(int)]
    return [html.Sample(task.question(r.index), r.answer, r.gold, r.score, task.image(r.index)) for r in picked]


def chance(spec: str, sample: int = 200) -> float:
    """Accuracy of always giving the commonest answer."""
    task = make_task(spec)
    golds = [task.answer(int(i)) for i in np.linspace(0, len(task) - 1, min(sample, len(task)))]
    return max(golds.count(gold) for gold in golds) / len(golds)


INTRODUCTION = """\
A complete Kimi K2.5 with {parameters_total:,} parameters (MoonViT-3D with packed images, projector, MLA and MoE \
language model) was trained on this machine for {steps} steps on handwritten digits (scikit-learn), photographs \
(scikit-image), rendered words and shapes, and the source of Python's standard library.

The training process was killed with SIGKILL at step {killed_at_step}, between two checkpoints, and started again. It \
did {steps_done_twice} steps a second time. All the questions below are about images that it has not seen."""

COMMANDS = """\
.venv/bin/k25 chat --checkpoint={workdir} --temperature=0
.venv/bin/k25 generate --checkpoint={workdir} --temperature=0 --image=some.png --prompt="digit?"
.venv/bin/k25 convert --checkpoint={workdir} --output={workdir}/public --dtype=float32
.venv/bin/k25 train --config=experiments/pretrain/demo.py --workdir=runs/mine --config.train.steps=2000
tensorboard --logdir={workdir}"""
