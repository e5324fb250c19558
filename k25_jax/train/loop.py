"""The training loop, one screen: restore, step, log, checkpoint. A killed run started again goes on exactly."""

import contextlib
import logging
import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from k25_jax.checkpoint.folders import complete_steps
from k25_jax.checkpoint.store import Store
from k25_jax.config import Experiment
from k25_jax.data.mixture import realised
from k25_jax.parallel import hosts
from k25_jax.report.metrics import MetricsWriter, read_metrics
from k25_jax.runtime.paths import AnyPath, to_path
from k25_jax.runtime.waiting import first_call
from k25_jax.sharding import peers, processes
from k25_jax.train.interrupts import between_steps
from k25_jax.train.layout import data_states, mesh_of, open_data
from k25_jax.train.run import restore_or_init, save_run
from k25_jax.train.stages import loss_of
from k25_jax.train.step import make_step

log = logging.getLogger(__name__)


class BadSteps(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(experiment: Experiment, directory: str | AnyPath, on_step=None) -> dict:
    """Run `experiment` in `directory` to its last step and return the last metrics; resumes what it finds there.

    `on_step(step, metrics)` is called after each logged step. SIGTERM and Ctrl-C end the run after the step in hand, which
    is saved, with Interrupted (train/interrupts.py). Several processes (sharding/processes.py) all call this with the same
    arguments; process 0 writes what is not theirs together. One that fails, or loses another, ends at once.
    """
    directory, config, first = to_path(directory), experiment.train, jax.process_index() == 0
    watch = peers.watched(lambda: f"after step {max(complete_steps(directory / 'checkpoints'), default=0)}")
    calm = between_steps(alone=jax.process_count() == 1)
    with watch as watcher, calm as stop, contextlib.ExitStack() as stack, peers.leaving(watcher):
        mesh = mesh_of(experiment)
        pipeline = stack.enter_context(contextlib.closing(open_data(experiment, mesh)))
        save_run(experiment, directory)
        store = stack.enter_context(contextlib.closing(Store(directory / "checkpoints", config.keep)))
        stack.enter_context(jax.set_mesh(mesh))
        state, start, bad = restore_or_init(experiment, store, pipeline, mesh)
        step_fn = make_step(experiment, loss_of(experiment), mesh)
        step_fn = first_call(watcher.together(step_fn) if watcher else step_fn, "compiling the training step")
        writer = stack.enter_context(MetricsWriter(directory)) if first else None
        if writer:
            writer.truncate_after(start)
        bar = stack.enter_context(progress_bar(hidden=not first))
        task = bar.add_task("train", total=config.steps, completed=start, note="compiling")
        logged = saved = step = start
        for step, batch, waited in batches(pipeline, experiment, start):
            began = time.perf_counter()
            placed = hosts.place(batch, mesh, experiment.model.vision, config.vision)
            state, on_device = step_fn(state, placed)
            metrics = {k: v.item() for k, v in jax.device_get(on_device).items()}
            stop.arm()
            metrics |= hosts.metrics(batch, placed, mesh, experiment.model.vision, config.vision)
            seconds = time.perf_counter() - began + waited
            bad = bad + 1 if metrics["bad"] else 0
            metrics |= {"bad_in_a_row": bad, "tokens_per_second": metrics["tokens"] / seconds}
            metrics |= {"step_seconds": seconds, "data_seconds": waited, "data_share": waited / seconds}
            if step % config.log_every == 0 or bad:
                logged = log_step(step, metrics, experiment, pipeline, mesh, writer, on_step)
            note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            if bad and first:
                log.warning("step %d: loss %s or gradient not finite; skipped", step, metrics["loss"])
            if bad >= config.max_bad_steps:
                raise BadSteps(
                    f"{directory}: {bad} steps in a row up to step {step} had no finite loss or gradient. Weights are "
                    f"as before them, checkpoints: {store.steps()}. Lower optim.peak_lr, check the data, or raise "
                    "train.max_bad_steps"
                )
            if step % config.checkpoint_every == 0:
                saved = step
                if writer:
                    writer.publish()
                store.save(step, state, {"pipelines": data_states(pipeline, mesh), "bad_in_a_row": bad})
            if stop.number and step < config.steps:
                break
        else:
            if logged < step:
                log_step(step, metrics, experiment, pipeline, mesh, writer, on_step)
        if saved < step:
            if writer:
                writer.publish()
            store.save(step, state, {"pipelines": data_states(pipeline, mesh), "bad_in_a_row": bad})
    return (read_metrics(directory) or [{}])[-1]


def batches(pipeline, experiment: Experiment, start: int):
    """(step, batch, seconds waited for it) after step `start`, to train.steps or until no process has a token left."""
    data = experiment.data
    ends = data.text_tokens or data.vision_tokens or any(source.max_epochs for source in data.sources)
    for step in range(start + 1, experiment.train.steps + 1):
        began = time.perf_counter()
        batch = next(pipeline)
        waited = time.perf_counter() - began
        if ends and not any(processes.gathered(bool(batch.segments_BL.any()))):
            log.info("all budgets and epochs of the data are spent after step %d", step - 1)
            return
        yield step, batch, waited


def log_step(step: int, metrics: dict, experiment: Experiment, pipeline, mesh: Mesh, writer, on_step) -> int:
    """Write the metrics of a step and what the data was made of so far; all processes call this. Returns the step."""
    states = data_states(pipeline, mesh)
    if writer:
        metrics = metrics | realised(states, experiment.data)
        writer.write(step, metrics)
        if on_step:
            on_step(step, metrics)
    return step


def progress_bar(hidden: bool = False) -> Progress:
    """Step, loss, tokens/s, elapsed and remaining time, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=hidden,
    )  # fmt: skip
