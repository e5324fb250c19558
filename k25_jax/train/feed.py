"""Batches on their devices when a step asks for them: read, planned and placed while the step before runs (K2.5 §3.8).

A batch of rollouts waits for the weights that it is sampled by, which the loop publishes after each step (K2.5 §3.5).

`planned` is work of the host alone and runs in a thread. `placed` may launch programs of the devices. All processes must
launch those in one order, so that of several it runs in the main thread; one process alone places in the thread too.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from k25_jax.config import Experiment
from k25_jax.data.packing import Batch
from k25_jax.parallel import hosts
from k25_jax.rl.source import RolloutSource
from k25_jax.sharding import processes

log = logging.getLogger(__name__)

LOOK = 0.2  # seconds between two looks at whether the run is ended


class Planned(NamedTuple):
    """What this process has read for a step."""

    batch: hosts.Planned
    data_state: dict  # of the pipeline, which goes on after this batch, whatever has been read ahead
    some: bool  # whether there is a token in it
    placed: Batch | None


class Ready(NamedTuple):
    """What a step takes, and what is known of it before it runs."""

    batch: Batch  # on the devices
    metrics: dict[str, float]
    data_state: dict
    asked: float  # when the loop came for it, by time.perf_counter
    waited: float  # seconds


class Feed:
    """The batches of a pipeline, one step ahead. `pipeline` may be set to another state before `batches` begins.

    Feeds of one run that are open at the same time have a `name` each.
    """

    def __init__(self, pipeline, experiment: Experiment, mesh: Mesh, name: str = "train"):
        self.pipeline, self._mesh, self._experiment, self._name = pipeline, mesh, experiment, name
        data = experiment.data
        self._ends = data.text_tokens or data.vision_tokens or any(source.max_epochs for source in data.sources)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="k25-feed")

    def batches(self, start: int, last: int, ended: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, Ready]]:
        """(step, what it takes) after step `start`, to `last` or until no process has a token left.

        Sampling takes long: a batch of rollouts is not waited for when the run is `ended`.
        """
        coming = self._thread.submit(self.planned)
        for step in range(start + 1, last + 1):
            asked = time.perf_counter()
            plan = self._awaited(coming, ended)
            if plan is None:
                return
            batch = plan.placed or hosts.placed(plan.batch)
            waited = time.perf_counter() - asked
            if step < last:
                coming = self._thread.submit(self.planned)
            if self._ends and not any(processes.gathered(plan.some)):
                log.info("all budgets and epochs of the data are spent after step %d", step - 1)
                return
            metrics = plan.batch.metrics | plan.data_state["lanes"][0].get("metrics", {})
            yield step, Ready(batch, metrics, plan.data_state, asked, waited)

    def _awaited(self, coming: concurrent.futures.Future, ended: Callable[[], bool]) -> Planned | None:
        while isinstance(self.pipeline, RolloutSource) and not coming.done():
            if ended():
                return None
            concurrent.futures.wait([coming], timeout=LOOK)
        return coming.result()

    def planned(self) -> Planned:
        """The next batch, read, planned and, where no other process has a say in it, placed."""
        batch = next(self.pipeline)
        state, some = self.pipeline.get_state(), bool(batch.segments_BL.any())
        plan = hosts.planned(batch, self._mesh, self._experiment, self._name)
        return Planned(plan, state, some, hosts.placed(plan) if jax.process_count() == 1 else None)

    def publish(self, step: int, params) -> None:
        """The weights after `step`, for rollouts. They must live until the next batch is there, and no longer."""
        if isinstance(self.pipeline, RolloutSource):
            self.pipeline.publish(step, params)

    def close(self) -> None:
        """Let the batch in hand be made, unless it is one of rollouts, and end the threads."""
        if isinstance(self.pipeline, RolloutSource):
            self.pipeline.cancel()
        self._thread.shutdown(cancel_futures=True)
        self.pipeline.close()
