"""What a run starts from: the weights of the stage before it, and of other checkpoints (K2.5 §3.3).

Weights alone are handed over. Optimizer, schedule and data begin anew, and rope, YaRN and max_length may differ: no
parameter depends on them.
"""

import dataclasses
import logging
import pathlib

import jax

from k25_jax.checkpoint.folders import BASE, CheckpointError, read_experiment
from k25_jax.checkpoint.hf_config import language_model_alone, read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.siglip import load_siglip_vision
from k25_jax.checkpoint.store import restore_params
from k25_jax.config import Experiment, K25Config, RopeConfig
from k25_jax.train.state import abstract_state

log = logging.getLogger(__name__)

VISION = ("vision", "projector")
RUNTIME = (  # fields that no parameter depends on
    "max_length", "grouped_matmul", "dispatch", "chunk", "reduce_dtype", "bias_rate", "init_std",
)  # fmt: skip


def load_initial(experiment: Experiment, fresh: dict, mesh=None) -> dict:
    """The parameters to begin with: `fresh`, or in its place what the checkpoints hold that the experiment names.

    train.init_from gives the language model and, unless train.init_vision_from is set, encoder and projector. It is a
    run of ours, "base" for the model that comes with the package, or a folder in the public format, which may hold a
    language model alone: then encoder and projector stay fresh. train.init_vision_from gives the encoder: a run of ours,
    of which the projector is taken too if it fits, or SigLIP's weights. Leaves lie as `mesh` wants them, or on the host.
    Raises CheckpointError with what does not fit.
    """
    config = experiment.train
    if not config.init_from and not config.init_vision_from:
        return fresh
    abstract, taken = abstract_state(experiment, mesh).params, {}
    if config.init_from:
        source = BASE if config.init_from == "base" else pathlib.Path(config.init_from)
        taken |= _model(experiment, source, abstract, not config.init_vision_from)
    if config.init_vision_from:
        taken |= _vision(experiment, config.init_vision_from, abstract)
    return fresh | taken


def _model(experiment: Experiment, source: pathlib.Path, abstract: dict, with_vision: bool) -> dict:
    """The language model in `source`, and what it has of vision if that is wanted."""
    if (source / "checkpoints").is_dir():
        parts = ("text", "vision") if with_vision else ("text",)
        _check_fit(read_experiment(source).model, experiment.model, f"train.init_from={source}", parts)
        wanted = {name: part for name, part in abstract.items() if with_vision or name not in VISION}
        return restore_params(source / "checkpoints", wanted)
    has_vision = _has_vision(source)
    _check_fit(read_config(source), experiment.model, f"train.init_from={source}", ("text",))
    if with_vision and not has_vision:
        log.warning("train.init_from=%s holds a language model alone: encoder and projector are fresh", source)
    text_only, shardings = not (with_vision and has_vision), None
    if any(a.sharding is not None for a in jax.tree.leaves(abstract)):
        wanted = {name: part for name, part in abstract.items() if not text_only or name not in VISION}
        shardings = jax.tree.map(lambda a: a.sharding, wanted)
    return load_params(source, experiment.model, shardings, text_only=text_only)


def _has_vision(source: pathlib.Path) -> bool:
    """Whether a folder in the public format has an encoder."""
    try:
        return not language_model_alone(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"train.init_from={source} is neither a run (checkpoints/) nor a public checkpoint: {error}"
        ) from error


def _vision(experiment: Experiment, source: str, abstract: dict) -> dict:
    """The encoder, and the projector of a run where both its widths fit."""
    folder = pathlib.Path(source)
    if not (folder / "checkpoints").is_dir():
        log.warning("train.init_vision_from=%s gives the encoder; the projector is fresh", source)
        return {"vision": load_siglip_vision(source, experiment.model.vision)}
    theirs, ours = read_experiment(folder).model, experiment.model
    _check_fit(theirs, ours, f"train.init_vision_from={source}", ("vision",))
    wanted, widths = {"vision": abstract["vision"]}, (theirs.text.d_model, ours.text.d_model)
    if widths[0] == widths[1]:
        wanted["projector"] = abstract["projector"]
    else:
        log.warning("the projector of %s has text.d_model=%d, this model %d: it is fresh", source, *widths)
    return restore_params(folder / "checkpoints", wanted)


def _check_fit(theirs: K25Config, ours: K25Config, source: str, parts: tuple[str, ...]) -> None:
    """Raise CheckpointError with every field of these parts that parameters depend on and in which the models differ."""
    wrong = []
    for part in parts:
        a, b = (_shape_fields(getattr(model, part)) for model in (theirs, ours))
        wrong += [f"model.{part}.{name} is {a[name]} there and {b[name]} here" for name in a if a[name] != b[name]]
    if wrong:
        raise CheckpointError(
            f"{source}: {'; '.join(wrong)}. Set the model as it was there, or take another checkpoint"
        )


def _shape_fields(config) -> dict:
    """The fields of a part of the model that its parameters depend on."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, RopeConfig) or field.name in RUNTIME:
            continue
        if dataclasses.is_dataclass(value):
            out |= {f"{field.name}.{name}": inner for name, inner in _shape_fields(value).items()}
        else:
            out[field.name] = value
    return out
