"""The training loop, one screen: restore, step, log, checkpoint. A killed run started again goes on exactly."""

import importlib.metadata
import json
import logging
import pathlib
import subprocess
import time

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.store import Store, restore_params
from k25_jax.config import ConfigError, Experiment, to_dict
from k25_jax.data.packing import batch_stats
from k25_jax.data.pipeline import make_pipeline
from k25_jax.models.k25 import abstract_params
from k25_jax.report.metrics import MetricsWriter
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import abstract_state, init_state
from k25_jax.train.step import make_step

log = logging.getLogger(__name__)


class BadSteps(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(experiment: Experiment, directory: str | pathlib.Path, on_step=None) -> dict:
    """Run `experiment` in `directory` to its last step and return the last metrics; resumes what it finds there.

    `on_step(step, metrics)` is called after each logged step.
    """
    directory = pathlib.Path(directory)
    save_run(experiment, directory)
    store = Store(directory / "checkpoints", experiment.train.keep)
    pipeline = make_pipeline(experiment.data, experiment.model)
    state, start = restore_or_init(experiment, store, pipeline)
    step_fn = make_step(experiment, loss_fn)
    total, metrics, bad = experiment.train.steps, {}, 0
    with MetricsWriter(directory) as writer, progress_bar() as bar:
        writer.truncate_after(start)
        task = bar.add_task("train", total=total, completed=start, note="compiling")
        for step in range(start + 1, total + 1):
            began = time.perf_counter()
            batch = next(pipeline)
            waited = time.perf_counter() - began
            state, on_device = step_fn(state, batch)
            metrics = {k: v.item() for k, v in jax.device_get(on_device).items()} | batch_stats(batch)
            seconds = time.perf_counter() - began
            bad = bad + 1 if metrics["bad"] else 0
            metrics |= {"bad_in_a_row": bad}
            timing = {"tokens_per_second": metrics["tokens"] / seconds}
            timing |= {"step_seconds": seconds, "data_seconds": waited}
            if step % experiment.train.log_every == 0 or step == total or bad:
                writer.write(step, metrics | timing)
                if on_step:
                    on_step(step, metrics | timing)
            note = f"loss {metrics['loss']:.4f}  {timing['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            if bad:
                log.warning("step %d: loss %s or gradient not finite; skipped", step, metrics["loss"])
            if bad >= experiment.train.max_bad_steps:
                raise BadSteps(
                    f"{directory}: {bad} steps in a row up to step {step} had no finite loss or gradient. Weights are as "
                    f"before them, checkpoints: {store.steps()}. Lower optim.peak_lr, check the data, or raise "
                    "train.max_bad_steps"
                )
            if step % experiment.train.checkpoint_every == 0 or step == total:
                store.save(step, state, pipeline.get_state())
    store.close()
    pipeline.close()
    return metrics


def restore_or_init(experiment: Experiment, store: Store, pipeline):
    """(state, step) from the newest checkpoint, else from train.init_from, else fresh."""
    if store.steps():
        state, data_state = store.restore(abstract_state(experiment))
        pipeline.set_state(data_state)
        return state, int(state.step)
    state = init_state(experiment)
    if experiment.train.init_from:
        state = state.replace(params=load_initial(experiment))
    return state, 0


def load_initial(experiment: Experiment):
    """Parameters to start from: a run directory of ours or a directory in the public format."""
    source = pathlib.Path(experiment.train.init_from)
    if (source / "checkpoints").is_dir():
        return restore_params(source / "checkpoints", abstract_params(experiment.model))
    return load_params(source, experiment.model)


def save_run(experiment: Experiment, directory: pathlib.Path) -> None:
    """Write `experiment.json` (the configuration) and `run.json` (revision, versions, devices)."""
    directory.mkdir(parents=True, exist_ok=True)
    file, config = directory / "experiment.json", to_dict(experiment)
    if file.exists() and json.loads(file.read_text())["model"] != config["model"]:
        raise ConfigError(f"{directory} holds a run of another model; choose another --workdir or delete it")
    file.write_text(json.dumps(config, indent=1) + "\n")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    info = {
        "revision": git.stdout.strip() or "unknown",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "devices": [str(d) for d in jax.devices()],
    }
    (directory / "run.json").write_text(json.dumps(info, indent=1) + "\n")


def progress_bar() -> Progress:
    """Step, loss, tokens/s, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
