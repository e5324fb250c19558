"""A model from a folder: one of our runs, or a checkpoint in the public format."""

import json
import pathlib
from dataclasses import dataclass

import jax.numpy as jnp

from k25_jax.checkpoint.folders import find, read_experiment
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.store import restore_params
from k25_jax.config import Experiment, K25Config
from k25_jax.models.k25 import abstract_params
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Model:
    """Weights with what they need to be used; `experiment` is None for public checkpoints."""

    params: dict
    config: K25Config
    tokenizer: Tokenizer
    experiment: Experiment | None = None


def load_model(directory: str | pathlib.Path, dtype=jnp.float32, progress=None) -> Model:
    """Read `directory`: a run of ours (experiment.json, checkpoints/) or public files (config.json, *.safetensors).

    The word "base" is the tiny model that comes with the package, trained by `make base`.
    """
    directory, is_run = find(directory)
    if is_run:
        experiment = read_experiment(directory)
        params = restore_params(directory / "checkpoints", abstract_params(experiment.model))
        return Model(params, experiment.model, load_tokenizer(experiment.data.tokenizer), experiment)
    config = read_config(directory)
    text_only = "vision_config" not in json.loads((directory / "config.json").read_text())
    params = load_params(directory, config, dtype=dtype, progress=progress, text_only=text_only)
    return Model(params, config, load_tokenizer(str(directory)))
