"""What steps report, read one step late: the devices work on the next step while the host reads the last one's metrics."""

import logging
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from k25_jax.config import Experiment
from k25_jax.data.mixture import realised
from k25_jax.report.metrics import MetricsWriter
from k25_jax.runtime.paths import AnyPath
from k25_jax.train.feed import Ready
from k25_jax.train.layout import data_states

log = logging.getLogger(__name__)


class BadSteps(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


class StepLog:
    """Metrics of the steps after `start`, in metrics.jsonl and on a progress bar; all processes call its methods alike.

    `bad_in_a_row` is that of the last step read. `on_step(step, metrics)` is called after each logged step. Process 0
    alone writes. Leave it as a context manager.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        directory: AnyPath,
        start: int,
        bad: int,
        on_step: Callable[[int, dict], None] | None = None,
        checkpoints: Callable[[], list[int]] = list,
    ):
        self.bad_in_a_row = bad
        self._experiment, self._mesh, self._directory = experiment, mesh, directory
        self._on_step, self._checkpoints = on_step, checkpoints
        self._sent: tuple[int, dict, Ready] | None = None  # a step that the devices work on
        self._read: tuple[int, dict, Ready] | None = None  # the last step read, while it is not logged
        self._finished = 0.0  # when the step before was, by time.perf_counter
        first = jax.process_index() == 0
        self._writer = MetricsWriter(directory) if first else None
        if self._writer:
            self._writer.truncate_after(start)
        self._bar = progress_bar(hidden=not first)
        self._task = self._bar.add_task("train", total=experiment.train.steps, completed=start, note="compiling")

    def __enter__(self) -> "StepLog":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()
        if self._writer:
            self._writer.close()

    def sent(self, step: int, on_device: dict, ready: Ready) -> None:
        """Step `step` has been handed to the devices: read the one before. Raises BadSteps."""
        before, self._sent = self._sent, (step, on_device, ready._replace(batch=None))  # its memory is wanted
        if before:
            self._take(*before)

    def read(self, more: Callable[[], dict] = dict, log_it: bool = False) -> None:
        """Wait for the step that was sent last and read it; `more()` are metrics to log with it. Raises BadSteps."""
        if self._sent:
            sent, self._sent = self._sent, None
            self._take(*sent, more, log_it)

    def publish(self) -> None:
        """Have what was logged where a run that goes on from a checkpoint looks for it: in a bucket, upload it."""
        if self._writer:
            self._writer.publish()

    def finish(self) -> None:
        """Read the last step and log it, whatever train.log_every says."""
        self.read(log_it=True)
        if self._read:
            self._write(*self._read)

    def _take(self, step: int, on_device: dict, ready: Ready, more=dict, log_it: bool = False) -> None:
        config = self._experiment.train
        metrics = {name: value.item() for name, value in jax.device_get(on_device).items()}
        now = time.perf_counter()
        seconds = now - max(self._finished, ready.asked)
        self._finished = now
        self.bad_in_a_row = self.bad_in_a_row + 1 if metrics["bad"] else 0
        metrics |= ready.metrics
        metrics |= {"bad_in_a_row": self.bad_in_a_row, "tokens_per_second": metrics["tokens"] / seconds}
        metrics |= {"step_seconds": seconds, "data_seconds": ready.waited}
        metrics |= {"data_share": min(ready.waited / seconds, 1.0)} | more()
        if self._experiment.stage == "rl":
            metrics |= of_rollouts(metrics)
        self._bar.update(self._task, completed=step, note=note_of(metrics))
        self._read = step, metrics, ready
        if log_it or self.bad_in_a_row or step % config.log_every == 0:
            self._write(*self._read)
        if self.bad_in_a_row:
            self._warn(step, metrics)

    def _write(self, step: int, metrics: dict, ready: Ready) -> None:
        """Metrics, and what the data was made of so far."""
        self._read = None
        states = data_states(ready.data_state, self._mesh)
        if self._writer:
            metrics = metrics | (realised(states, self._experiment.data) if self._experiment.stage != "rl" else {})
            self._writer.write(step, metrics)
            if self._on_step:
                self._on_step(step, metrics)

    def _warn(self, step: int, metrics: dict) -> None:
        if self._writer:
            log.warning("step %d: loss %s or gradient not finite; skipped", step, metrics["loss"])
        if self.bad_in_a_row >= self._experiment.train.max_bad_steps:
            raise BadSteps(
                f"{self._directory}: {self.bad_in_a_row} steps in a row up to step {step} had no finite loss or gradient. "
                f"Weights are as before them, checkpoints: {self._checkpoints()}. Lower optim.peak_lr, check the data, or "
                "raise train.max_bad_steps"
            )


def of_rollouts(metrics: dict) -> dict:
    """Where the seconds of a step went that do not go into sampling: into learning, and waiting for anything else."""
    learning = metrics["step_seconds"] - metrics["data_seconds"]
    return {
        "learning_seconds": max(learning, 0.0),
        "waiting_seconds": max(metrics["data_seconds"] - metrics["sampling_seconds"], 0.0),
    }


def note_of(metrics: dict) -> str:
    """What the progress bar says of a step."""
    if "reward" in metrics:
        return f"reward {metrics['reward']:.3f}  {metrics['length']:,.0f} tokens an answer"
    return f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"


def progress_bar(hidden: bool = False) -> Progress:
    """Step, what `note_of` says, elapsed and remaining time, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=hidden,
    )  # fmt: skip
