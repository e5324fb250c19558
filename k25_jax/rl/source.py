"""Rollouts as one more source of batches: `next`, `get_state`, `set_state`, `close` (K2.5 §3.5).

Synchronous: a batch is sampled by the weights after the last update of the batch before, which the loop publishes, and then
taken by `updates_per_batch` updates, each with the advantages of its own number (Toggle's phases). Update t, from 0 on, takes
batch t // updates_per_batch. So the state is one number, and a run that goes on from a checkpoint takes the batches after it
from the ledger as they were sampled, by the same weights: those it will have again when it gets there.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from k25_jax.agents.trace import Trace
from k25_jax.config import Experiment, to_dict
from k25_jax.data.packing import Batch
from k25_jax.losses.policy import mismatch_weights
from k25_jax.rl.advantages import Group
from k25_jax.rl.batches import batch_of, metrics_of
from k25_jax.rl.ledger import Ledger
from k25_jax.rl.problems import Problem
from k25_jax.rl.sampler import Cancelled, Sampler
from k25_jax.rl.start import Start, find_out

SAMPLED_BY = (  # fields of rl
    "problems groups samples attempts estimate pass_low pass_high updates_per_batch episode rewards correct".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A committed batch; `trainer_BL` are its log-probabilities by the form that is trained, where those are wanted."""

    number: int
    groups: Sequence[Group]
    record: Mapping
    trainer_BL: np.ndarray | None


class RolloutSource:
    """The batches of a run of the stage rl. `publish` and `cancel` may be called from other threads.

    `fingerprint(params)` names weights, `trainer(params, batch)` gives the log-probabilities of a batch's targets by the
    form that is trained, [B,L] as the batch has its rows.
    """

    def __init__(
        self, experiment: Experiment, ledger: Ledger, sampler: Sampler, fingerprint: Callable, trainer: Callable
    ):
        self._experiment, self._config, self._ledger, self._sampler = experiment, experiment.rl, ledger, sampler
        self._fingerprint, self._trainer = fingerprint, trainer
        self._start: Start | None = None
        self._stored: Stored | None = None
        self._updates, self._metrics = 0, {}
        self._totals = {"skipped_updates": 0, "dropped_groups": 0, "tokens_sampled_so_far": 0}
        self._changed, self._cancelled, self._published = threading.Condition(), False, (-1, None)

    def publish(self, step: int, params) -> None:
        """The weights after `step` updates. They must live until the batch of the next update is there."""
        with self._changed:
            self._published = step, params
            self._changed.notify_all()

    def cancel(self) -> None:
        """End what is sampled, and the waiting for weights: the batch in hand is not made."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
        self._sampler.cancel()

    def close(self) -> None:
        """End the engine, when no batch is being made."""
        self._sampler.close()

    def get_state(self) -> dict:
        """Of the batch that was handed out last, with its metrics; as one lane of the data (train/layout.py)."""
        return {"lanes": [{"updates": self._updates, "totals": dict(self._totals), "metrics": dict(self._metrics)}]}

    def set_state(self, state: dict) -> None:
        """Continue after the batch that `state` belongs to."""
        (lane,) = state["lanes"]
        self._updates, self._totals, self._metrics = lane["updates"], dict(lane["totals"]), dict(lane["metrics"])

    def __next__(self) -> Batch:
        """The batch of the next update; where it is not committed yet it is sampled. Raises Cancelled."""
        number, again = divmod(self._updates, self._config.updates_per_batch)
        if self._stored is None or self._stored.number != number:
            self._stored = self._batch(number)
        stored, experiment = self._stored, self._experiment
        batch, differing = batch_of(stored.groups, self._updates, self._config, experiment.data, experiment.model)
        batch, mismatch = self._corrected(batch, stored)
        self._count(stored, again, differing, mismatch)
        self._updates += 1
        return batch

    def _count(self, stored: Stored, again: int, differing: int, mismatch: dict) -> None:
        """Metrics of an update that is the `again`-th of its batch, from 0."""
        sampled = dict.fromkeys(stored.record, 0) if again else stored.record
        self._totals["skipped_updates"] += int(differing < self._config.min_groups)
        self._totals["dropped_groups"] += sampled["dropped_groups"]
        self._totals["tokens_sampled_so_far"] += sampled["sampled_tokens"]
        self._metrics = metrics_of(stored.groups, self._config) | self._totals | mismatch
        self._metrics |= {"batch": stored.number, "update_of_batch": again, "unequal_groups": differing}
        self._metrics |= {"sampling_seconds": sampled["seconds"]}

    # ------------------------------------------------------------------------------------------------------------- batches
    def _batch(self, number: int) -> Stored:
        """A batch from the ledger; what is missing of it is sampled and committed."""
        version, record = number * self._config.updates_per_batch, self._ledger.batch(number)
        params = None if record else self._weights_after(version)
        if self._start is None:
            self._ledger.identify(self._identity())
            fingerprint = self._fingerprint(params) if params is not None and not version else None
            ask = lambda asked, samples: self._traces(asked, samples, params, 0)  # noqa: E731
            self._start = find_out(self._ledger, self._config, self._experiment.data.seed, fingerprint, ask)
        asked, began = self._start.asked_in(number), time.perf_counter()
        traces = self._traces(asked, self._config.samples, params, version)
        groups = [self._start.group(problem, traces[name]) for name, problem in asked.items()]
        if record:
            return Stored(number, groups, record, self._ledger.logprobs(number))
        sampled = {
            "version": version,
            "seconds": time.perf_counter() - began,
            "sampled_tokens": sum(trace.length for group in groups for trace in group.valid),
            "dropped_groups": sum(not group.kept for group in groups),
        }
        trainer_BL = None
        if self._config.old_logprobs == "trainer":
            data, model = self._experiment.data, self._experiment.model
            trainer_BL = self._trainer(params, batch_of(groups, version, self._config, data, model)[0])
        record = self._ledger.commit_batch(number, list(asked), sampled, trainer_BL)
        return Stored(number, groups, record, trainer_BL)

    def _traces(self, asked: Mapping[str, Problem], samples: int, params, version: int) -> dict[str, list[Trace]]:
        """The traces of each group, by its name; those that are not committed are sampled, and committed."""
        done = {name: self._ledger.group(name) for name in asked}
        missing = {name: asked[name] for name, traces in done.items() if traces is None}
        if missing:
            self._sampler.update(params, version)
            done |= self._sampler.groups(missing, samples, self._ledger.commit_group)
        return done

    def _weights_after(self, version: int):
        """The parameters after so many updates, when they are published; raises Cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._published[0] == version)
            if self._cancelled:
                raise Cancelled("the run ends: there will be no further weights")
            return self._published[1]

    def _corrected(self, batch: Batch, stored: Stored) -> tuple[Batch, dict]:
        """The batch with the trainer's log-probabilities as the old ones, where those are wanted, and its mismatch.

        Its advantages are weighed by how much likelier the trainer's form makes what the engine drew (losses/policy.py).
        """
        if stored.trainer_BL is None:
            return batch, {}
        config, sampled_BL = self._config, batch.loss_weights_BL > 0
        given = stored.trainer_BL, batch.old_logprobs_BL, sampled_BL
        weights_BL, metrics = mismatch_weights(*given, config.correction, config.clip_low, config.clip_high)
        advantages_BL = batch.advantages_BL * np.asarray(weights_BL)
        batch = batch.replace(old_logprobs_BL=stored.trainer_BL, advantages_BL=advantages_BL)
        return batch, {name: float(value) for name, value in metrics.items()}

    def _identity(self) -> dict:
        """What decides which groups there are, and what is in them but for the weights."""
        config, data = to_dict(self._config), self._experiment.data
        identity = {f"rl.{name}": config[name] for name in (*SAMPLED_BY, "old_logprobs")}
        identity |= {f"data.{name}": getattr(data, name) for name in ("seed", "batch_size", "seq_len")}
        return identity | {"train.seed": self._experiment.train.seed}
