"""Weights that are no numbers are named as they are read: which tensor, in which file."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from k25_jax.checkpoint.huggingface import load_params, save_params
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.siglip import load_siglip_vision
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import DTYPES, NOT_FINITE, TensorFiles, _finite
from k25_jax.cli import main
from k25_jax.config import VisionConfig

ROUTER = "language_model.model.layers.1.mlp.gate.weight"
KEY_VALUE = "language_model.model.layers.2.self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def base():
    return load_model("base")


@pytest.fixture
def saved(base, tmp_path):
    """Writes the base model with some bytes of one tensor replaced."""

    def save(name: str, change, dtype="float32", quantise=None):
        save_params(base.params, base.config, tmp_path / "m", dtype=dtype, quantise=quantise)
        stored = TensorFiles(tmp_path / "m", lambda name: name).tensors[name]
        raw = np.memmap(
            stored.file, np.uint8, "r+", stored.start, int(np.prod(stored.shape)) * DTYPES[stored.dtype].itemsize
        )
        change(raw.view(DTYPES[stored.dtype]))
        raw.flush()
        return tmp_path / "m", stored.file

    return save


def put(value, place=-1):
    def change(values):
        values[place] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_number_that_is_none_is_found(saved, value, dtype):
    for place in (0, 777, -1):
        folder, file = saved(KEY_VALUE, put(value, place), dtype)
        with pytest.raises(CheckpointError, match="holds NaN or infinity") as error:
            load_model(folder)
        assert str(file) in str(error.value) and KEY_VALUE in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quantise", "name", "value"),
    [("fp8", "language_model.model.layers.0.mlp.up_proj.weight", np.nan),
     ("fp8", "language_model.model.layers.0.mlp.up_proj.weight_scale_inv", np.inf),
     ("int4", "language_model.model.layers.1.mlp.experts.7.up_proj.weight_scale", np.nan)],
)  # fmt: skip
def test_also_in_what_is_quantised(saved, quantise, name, value):
    folder, file = saved(name, put(value), quantise=quantise)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity") as error:
        load_model(folder)
    assert str(file) in str(error.value)


def test_weights_that_are_all_nan_or_all_zero(base, tmp_path, capsys):
    for value, message in ((np.nan, "holds NaN or infinity"), (0.0, "norm.weight is all zeros")):
        save_params(
            jax.tree.map(lambda a, v=value: np.full(a.shape, v, np.float32), base.params), base.config, tmp_path / "m"
        )
        for command in (["generate", "--raw", "--prompt=a"], ["convert", f"--output={tmp_path / 'o'}"]):
            assert main([command[0], f"--checkpoint={tmp_path / 'm'}", *command[1:]]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and message in error and str(tmp_path / "m") in error


def test_large_and_small_numbers_are_sound(saved):
    def change(values):
        values[:6] = np.array([3e38, -3e38, 1e-45, -0.0, 6e4, 0.0], values.dtype)

    folder, _ = saved(KEY_VALUE, change)
    assert np.isfinite(np.asarray(load_model(folder).params["moe"]["attention"]["k_b"])).all()


@pytest.mark.parametrize("name", NOT_FINITE)
def test_every_bit_pattern_is_judged_as_numpy_judges_it(name):
    dtype, generator = DTYPES[name], np.random.default_rng(0)
    size = dtype.itemsize
    patterns = np.arange(256 ** min(size, 2)).astype(f"<u{min(size, 2)}")
    words = patterns.astype(f"<u{size}") << (8 * (size - min(size, 2)))
    words = np.concatenate([words, words | generator.integers(0, 2 ** (4 * size), words.size).astype(words.dtype)])
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(words.view(dtype).astype(np.float64))
    assert finite.any() and not finite.all()
    assert _finite(words[finite].view(np.uint8), name)
    for word in np.unique(words[~finite])[:: max(1, 4 // size)][:200]:
        mixed = np.concatenate([words[finite][:5], [word], words[finite][:3]]).astype(words.dtype)
        assert not _finite(mixed.view(np.uint8), name)
    assert _finite(np.zeros(0, np.uint8), name) and _finite(np.full(8, 255, np.uint8), "I32")


def test_siglip_weights_are_checked_too(tmp_path):
    from safetensors.numpy import save_file

    table = np.zeros((4, 8), ml_dtypes.bfloat16)
    table[3, 7] = np.nan
    save_file({"vision_model.embeddings.position_embedding.weight": table}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, lambda name: name)
    with pytest.raises(CheckpointError, match="position_embedding.weight holds NaN"):
        files.read("vision_model.embeddings.position_embedding.weight")
    with pytest.raises(CheckpointError, match="problems"):
        load_siglip_vision(tmp_path, VisionConfig(layers=1, width=8, heads=1, mlp_dim=8))


def test_only_what_is_read_is_judged(saved, base):
    """A language model may be taken from a checkpoint whose encoder is damaged."""
    folder, _ = saved("vision_tower.patch_embed.proj.bias", put(np.nan))
    contents = json.loads((folder / "config.json").read_text())
    assert contents["model_type"] == "kimi_k25"
    assert load_params(folder, base.config, text_only=True)["embed"].shape == base.params["embed"].shape
    with pytest.raises(CheckpointError, match="patch_embed.proj.bias holds NaN"):
        load_params(folder, base.config)
    shutil.rmtree(folder)
