"""A model from a folder: one of our runs, or a checkpoint in the public format."""

import logging
import pathlib
from dataclasses import dataclass

import jax.numpy as jnp

from k25_jax.checkpoint.hf_config import language_model_alone, read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.store import CheckpointError, restore_params
from k25_jax.config import BYTE_IDS, Experiment, K25Config, from_dict
from k25_jax.config.json_file import read_object
from k25_jax.models.k25 import abstract_params
from k25_jax.text.tokenizer import Tokenizer, TokenizerError, find_vocabulary, load_tokenizer, no_vocabulary

logger = logging.getLogger(__name__)

BASE = pathlib.Path(__file__).parent / "base"


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
    directory = folder_of(directory)
    if is_run(directory):
        experiment = read_experiment(directory)
        tokenizer = load_tokenizer(experiment.data.tokenizer)
        params = restore_params(directory / "checkpoints", abstract_params(experiment.model))
        return Model(params, experiment.model, tokenizer, experiment)
    config = read_config(directory)
    tokenizer = model_tokenizer(directory, config)
    params = load_params(directory, config, dtype=dtype, progress=progress, text_only=language_model_alone(directory))
    return Model(params, config, tokenizer)


def folder_of(checkpoint: str | pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint, or of "base". Raises CheckpointError where there is neither a run nor public files."""
    directory = BASE if str(checkpoint) == "base" else pathlib.Path(checkpoint)
    if not any((directory / name).exists() for name in ("experiment.json", "config.json")):
        raise CheckpointError(
            f"{directory} is neither a run (experiment.json) nor a public checkpoint (config.json); name the folder "
            "that holds one of these"
        )
    return directory


def is_run(directory: pathlib.Path) -> bool:
    """Whether a folder is a run of ours."""
    return (directory / "experiment.json").is_file()


def model_tokenizer(directory: pathlib.Path, config: K25Config) -> Tokenizer:
    """The vocabulary beside public weights, or the byte-level one for a model of bytes.

    Raises TokenizerError where there is one that is not read or not the model's. With none at all, ids alone can be used.
    """
    if find_vocabulary(directory) is None:
        if is_byte_level(config):
            return load_tokenizer()
        logger.warning("%s holds no vocabulary: only token ids can be used", directory)
        return no_vocabulary(directory)
    tokenizer = load_tokenizer(str(directory), required=())
    if tokenizer.ordinary_size > config.text.vocab_size:
        raise TokenizerError(
            f"{find_vocabulary(directory)} has ids up to {tokenizer.ordinary_size - 1}, the model a vocabulary of "
            f"{config.text.vocab_size}: use the model's own"
        )
    return tokenizer


def is_byte_level(config: K25Config) -> bool:
    """Whether a model's special tokens are those of the byte-level vocabulary."""
    return all(getattr(config, name) == BYTE_IDS[name] for name in BYTE_IDS if "media" in name)


def read_experiment(directory: pathlib.Path) -> Experiment:
    """The configuration that a run was started with."""
    file = directory / "experiment.json"
    try:
        values = read_object(file)
    except ValueError as error:
        raise CheckpointError(f"{error}; restore it from the experiment file") from error
    model = values.get("model")
    if isinstance(model, dict) and "eos_id" in model:  # as runs were written when they had one end token
        model["eos_ids"] = [model.pop("eos_id")]
    return from_dict(Experiment, values)
