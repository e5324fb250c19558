"""A quantization_config that says other than the files is one line, not weights that are read wrongly."""

import json

import numpy as np
import pytest

from k25_jax.checkpoint.huggingface import load_params, save_params
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.quantised import describe
from k25_jax.checkpoint.store import CheckpointError

WEIGHTS = {
    "num_bits": 8,
    "symmetric": False,
    "group_size": 128,
    "strategy": "channel",
    "type": "float",
    "dynamic": True,
}


@pytest.fixture(scope="module")
def base():
    return load_model("base")


@pytest.fixture
def saved(base, tmp_path):
    """Writes the base model in an encoding, with another quantization_config in config.json."""

    def save(encoding, scheme, inside=True):
        save_params(base.params, base.config, tmp_path / "q", dtype=np.float32, quantise=encoding)
        contents = json.loads((tmp_path / "q" / "config.json").read_text())
        contents["text_config"].pop("quantization_config", None)
        (contents["text_config"] if inside else contents)["quantization_config"] = scheme
        (tmp_path / "q" / "config.json").write_text(json.dumps(contents))
        return tmp_path / "q"

    return save


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    line = str(error.value)
    assert "\n" not in line and str(folder / "config.json") in line
    return line


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("field", WEIGHTS)
def test_every_field_of_the_scheme(saved, field, inside):
    scheme = describe("int4")
    scheme["config_groups"]["group_0"]["weights"][field] = WEIGHTS[field]
    assert f"{field}={WEIGHTS[field]!r} is not supported" in refused(saved("int4", scheme, inside))


def test_any_of_several_groups_and_other_methods(saved):
    scheme = describe("int4")
    scheme["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    assert "group_1: weights: num_bits=8" in refused(saved("int4", scheme))
    assert "weight_block_size=[64, 64]" in refused(saved("fp8", describe("fp8") | {"weight_block_size": [64, 64]}))
    assert "fmt='e5m2'" in refused(saved("fp8", describe("fp8") | {"fmt": "e5m2"}))
    assert "quant_method='gptq'" in refused(saved("int4", {"quant_method": "gptq", "bits": 4}))
    for scheme in ("int4", ["int4"], {"config_groups": []}, {"config_groups": {"group_0": 3}}):
        assert "must be an object" in refused(saved("int4", scheme))


@pytest.mark.parametrize(("stored", "said"), [("int4", "fp8"), ("fp8", "int4")])
def test_one_encoding_declared_and_another_stored(saved, stored, said):
    line = refused(saved(stored, describe(said)))
    assert f"quantization_config says {said}, but " in line and f"is stored as {stored}" in line


def test_two_declarations_that_differ(saved):
    folder = saved("int4", describe("int4"))
    contents = json.loads((folder / "config.json").read_text())
    contents["quantization_config"] = describe("fp8")
    (folder / "config.json").write_text(json.dumps(contents))
    assert "quantization_config says fp8 and int4" in refused(folder)


@pytest.mark.parametrize(
    "scheme", [None, {}, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "own"]
)
def test_what_agrees_or_says_nothing_is_read(saved, base, scheme):
    folder = saved("int4", describe("int4") if scheme == "own" else scheme)
    gate = load_model(folder).params["moe"]["moe"]["experts"]["gate"]
    assert 0 < np.abs(gate - base.params["moe"]["moe"]["experts"]["gate"]).max() < 0.2


def test_a_model_that_was_unpacked_but_still_says_so_is_certain(saved, base):
    folder = saved(None, describe("int4"))
    np.testing.assert_array_equal(load_params(folder, base.config)["embed"], base.params["embed"])
