"""The loss on data that is never trained on, by the training's own loss, mesh and packing (K2.5 §3.3)."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from k25_jax.config import DataConfig, Experiment, Schedule, ValidationConfig
from k25_jax.data.mixture import value_at
from k25_jax.runtime.waiting import first_call
from k25_jax.train.feed import Feed
from k25_jax.train.layout import open_data
from k25_jax.train.stages import loss_of


class Validation:
    """The loss on data.validation after every train.eval_every steps and after the last; nothing where that is 0."""

    def __init__(self, experiment: Experiment, mesh: Mesh, together: Callable = lambda function: function):
        """`together` is that of sharding/peers.py, where there are several processes."""
        self._config, self._feed = experiment.train, None
        self._batches = experiment.data.validation.batches
        if not self._config.eval_every:
            return
        train = dataclasses.replace(experiment.train, eval_every=0)  # which would ask for held-out data of its own
        validated = dataclasses.replace(experiment, data=held_out(experiment.data), train=train)
        self._feed = Feed(open_data(validated, mesh, held_out=True), validated, mesh, "validation")
        self._beginning = self._feed.pipeline.get_state()
        loss_fn = loss_of(experiment)
        metrics_fn = jax.jit(lambda params, batch: loss_fn(params, batch, experiment)[1][0])
        self._metrics_fn = first_call(together(metrics_fn), "compiling the validation")

    def due(self, step: int) -> bool:
        """Whether to validate after `step`."""
        every = self._config.eval_every
        return bool(every) and (step % every == 0 or step == self._config.steps)

    def __call__(self, params) -> dict[str, float]:
        """The mean over all tokens of all batches, weighted as in training; always of the same batches.

        All processes call this, under jax.set_mesh of the mesh.
        """
        self._feed.pipeline.set_state(self._beginning)
        total = weight = 0.0
        for metrics in self._metrics(params):
            here = float(metrics["target_weight"])
            total, weight = total + here * float(metrics["loss"]), weight + here
        return {"validation/loss": total / weight if weight else float("nan"), "validation/target_weight": weight}

    def _metrics(self, params):
        """Of each batch, read when the next one has been handed to the devices."""
        sent = None
        for _, ready in self._feed.batches(0, self._batches):
            before, sent = sent, self._metrics_fn(params, ready.batch)
            if before is not None:
                yield jax.device_get(before)
        yield jax.device_get(sent)

    def close(self) -> None:
        """End the threads."""
        if self._feed:
            self._feed.close()


def held_out(data: DataConfig) -> DataConfig:
    """The data of a validation: schedules as they are at the end of a run, records again and again where they are few."""
    own = data.validation.sources
    weights = [(source, _at_the_end(source.weight)) for source in own or data.sources]
    sources = [dataclasses.replace(source, weight=weight, max_epochs=0.0) for source, weight in weights if weight]
    share = None if own or data.vision_share is None else _at_the_end(data.vision_share)
    validation = ValidationConfig(one_in=data.validation.one_in)
    return dataclasses.replace(
        data, sources=tuple(sources), vision_share=share, text_tokens=0, vision_tokens=0, validation=validation
    )


def _at_the_end(schedule: Schedule) -> float:
    return value_at(schedule, 1.0)
