"""Public weights written into a bucket, and read from it."""

import dataclasses

import jax
import numpy as np
import pytest

from k25_jax.checkpoint.convert import convert
from k25_jax.checkpoint.folders import CheckpointError
from k25_jax.checkpoint.huggingface import load_params, save_params
from k25_jax.checkpoint.load import load_model
from k25_jax.config import preset
from k25_jax.models.k25 import init_params
from k25_jax.runtime.paths import names, to_path

TINY = preset("tiny")
CONFIG = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, layers=2, dense_layers=1),
    vision=dataclasses.replace(TINY.vision, layers=1),
)


def test_public_weights_in_a_bucket(bucket):
    folder = to_path(f"{bucket}/public")
    params = init_params(CONFIG, jax.random.key(0))
    save_params(params, CONFIG, folder, np.float32, shard_bytes=2e5)
    assert len(names(folder)) > 4 and {"config.json", "model.safetensors.index.json"} <= set(names(folder))
    read = load_params(folder, CONFIG)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(read), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path
    with pytest.raises(CheckpointError, match="public is in the way: what is in a bucket is not replaced"):
        save_params(params, CONFIG, folder, np.float32)


def test_the_base_model_is_converted_into_a_bucket(bucket):
    said = convert("base", f"{bucket}/base", "float32")
    assert said[0] == f"wrote {bucket}/base"
    found = names(to_path(f"{bucket}/base"))
    assert not any(name.endswith((".sums", "export.json", ".tmp")) for name in found)
    ours, theirs = load_model("base"), load_model(f"{bucket}/base")
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert theirs.tokenizer.encode("a") == ours.tokenizer.encode("a")
