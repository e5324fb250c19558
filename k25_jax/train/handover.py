"""What a run starts from: the weights of the stage before it, and of other checkpoints (K2.5 §3.3).

Weights alone are handed over. Optimizer, schedule and data begin anew, and rope, YaRN and max_length may differ: no
parameter depends on them.
"""

import dataclasses
import json
import logging
import pathlib

import jax

from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.load import read_experiment
from k25_jax.checkpoint.siglip import load_siglip_vision
from k25_jax.checkpoint.store import CheckpointError, restore_params
from k25_jax.config import Experiment, RopeConfig
from k25_jax.train.state import abstract_state

log = logging.getLogger(__name__)

VISION = ("vision", "projector")
RUNTIME = ("max_length", "grouped_matmul", "dispatch", "bias_rate", "init_std")  # fields that no parameter depends on


def load_initial(experiment: Experiment, fresh: dict, mesh=None) -> dict:
    """The parameters to begin with: `fresh`, or in its place what the checkpoints hold that the experiment names.

    train.init_from gives the language model and, unless train.init_vision_from is set, encoder and projector. It is a
    run of ours or a folder in the public format, which may hold a language model alone: then encoder and projector stay
    fresh. train.init_vision_from gives the encoder: a run of ours, of which the projector is taken too if it fits, or
    SigLIP's weights. Leaves lie as `mesh` wants them, or on the host. Raises CheckpointError with what does not fit.
    """
    config = experiment.train
    if not config.init_from and not config.init_vision_from:
        return fresh
    abstract, taken = abstract_state(experiment, mesh).params, {}
    if config.init_from:
        taken |= _model(experiment, pathlib.Path(config.init_from), abstract, not config.init_vision_from)
    if config.init_vision_from:
        taken |= _vision(experiment, config.init_vision_from, abstract)
    return fresh | taken


def _model(experiment: Experiment, source: pathlib.Path, abstract: dict, with_vision: bool) -> dict:
    """The language model in `source`, and what it has of vision if that is wanted."""
    if (source / "checkpoints").is_dir():
        parts = ["text", *(["vision"] if with_vision else [])]
        _check_run(experiment, source, "train.init_from", parts)
        wanted = {name: part for name, part in abstract.items() if with_vision or name not in VISION}
        return restore_params(source / "checkpoints", wanted)
    text_only = not with_vision or _text_only(source)
    if text_only and with_vision:
        log.warning("train.init_from=%s holds a language model alone: encoder and projector are fresh", source)
    shardings = None
    if any(a.sharding is not None for a in jax.tree.leaves(abstract)):
        wanted = {name: part for name, part in abstract.items() if not text_only or name not in VISION}
        shardings = jax.tree.map(lambda a: a.sharding, wanted)
    return load_params(source, experiment.model, shardings, text_only=text_only)


def _text_only(source: pathlib.Path) -> bool:
    """Whether a folder in the public format says that it has no encoder."""
    file = source / "config.json"
    try:
        return "vision_config" not in json.loads(file.read_text())
    except FileNotFoundError:
        return False  # what is wrong with it, reading says
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore it from where the checkpoint came") from error


def _vision(experiment: Experiment, source: str, abstract: dict) -> dict:
    """The encoder, and the projector of a run where both its widths fit."""
    folder = pathlib.Path(source)
    if not (folder / "checkpoints").is_dir():
        log.warning("train.init_vision_from=%s gives the encoder; the projector is fresh", source)
        return {"vision": load_siglip_vision(source, experiment.model.vision)}
    _check_run(experiment, folder, "train.init_vision_from", ["vision"])
    theirs, ours = read_experiment(folder).model.text.d_model, experiment.model.text.d_model
    wanted = {"vision": abstract["vision"]}
    if theirs == ours:
        wanted["projector"] = abstract["projector"]
    else:
        log.warning("the projector of %s has text.d_model=%d, this model %d: it is fresh", source, theirs, ours)
    return restore_params(folder / "checkpoints", wanted)


def _check_run(experiment: Experiment, folder: pathlib.Path, field: str, parts: list[str]) -> None:
    """Raise CheckpointError with every field in which the run's model differs from ours in its shapes."""
    theirs = read_experiment(folder).model
    wrong = []
    for part in parts:
        a, b = (_shape_fields(getattr(model, part)) for model in (theirs, experiment.model))
        wrong += [f"model.{part}.{name} is {a[name]} there and {b[name]} here" for name in a if a[name] != b[name]]
    if wrong:
        raise CheckpointError(
            f"{field}={folder}: {'; '.join(wrong)}. Set the model as it was there, or choose another checkpoint"
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
