"""A model from a folder: one of our runs, or a checkpoint in the public format."""

import logging
from dataclasses import dataclass

import jax.numpy as jnp

from k25_jax.checkpoint.folders import find, read_experiment
from k25_jax.checkpoint.hf_config import language_model_alone, read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.store import restore_params
from k25_jax.config import BYTE_IDS, Experiment, K25Config
from k25_jax.models.k25 import abstract_params
from k25_jax.runtime.paths import AnyPath
from k25_jax.text.tokenizer import Tokenizer, TokenizerError, find_vocabulary, load_tokenizer, no_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """Weights with what they need to be used; `experiment` is None for public checkpoints."""

    params: dict
    config: K25Config
    tokenizer: Tokenizer
    experiment: Experiment | None = None


def load_model(directory: str | AnyPath, dtype=jnp.float32, progress=None) -> Model:
    """Read `directory`: a run of ours (experiment.json, checkpoints/) or public files (config.json, *.safetensors).

    The word "base" is the tiny model that comes with the package, trained by `make base`.
    """
    directory, is_run = find(directory)
    if is_run:
        experiment = read_experiment(directory)
        tokenizer = load_tokenizer(experiment.data.tokenizer)
        params = restore_params(directory / "checkpoints", abstract_params(experiment.model))
        return Model(params, experiment.model, tokenizer, experiment)
    config = read_config(directory)
    tokenizer = model_tokenizer(directory, config)
    params = load_params(directory, config, dtype=dtype, progress=progress, text_only=language_model_alone(directory))
    return Model(params, config, tokenizer)


def model_tokenizer(directory: AnyPath, config: K25Config) -> Tokenizer:
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
