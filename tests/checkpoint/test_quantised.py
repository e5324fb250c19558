"""INT4 against compressed-tensors' own packing, FP8 against loops, both inside checkpoints; damaged files."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.numpy import load_file, save_file

from k25_jax.checkpoint import quantised
from k25_jax.checkpoint.huggingface import load_params, save_params
from k25_jax.checkpoint.layout import bind
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import DTYPES, TensorFiles
from k25_jax.config import K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig, preset
from k25_jax.models.k25 import abstract_params

SHAPES = [(3, 64), (1, 1), (5, 7), (4, 33), (2, 8), (7, 100), (130, 129)]
MODEL = K25Config(
    text=TextConfig(
        vocab_size=96, d_model=160, layers=2, ffn_dim=136, heads=3, q_lora_rank=20, kv_lora_rank=12, qk_nope_dim=6,
        qk_rope_dim=4, v_dim=5, max_length=64, moe=MoEConfig(experts=3, top_k=2, ffn_dim=96), rope=RopeConfig(),
    ),
    vision=VisionConfig(layers=1, width=16, heads=2, mlp_dim=20, pos_height=4, pos_width=4),
    bos_id=0, eos_ids=(1,), pad_id=2,
)  # fmt: skip


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


def weight(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)), abstract_params(MODEL))


@pytest.fixture
def checkpoint(tmp_path, params):
    """A checkpoint in several files."""
    save_params(params, MODEL, tmp_path / "c", dtype=np.float32, shard_bytes=200_000)
    return tmp_path / "c"


# -------------------------------------------------------------------------------------------------------- encodings
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_unpacks_what_compressed_tensors_packs(shape):
    rng = np.random.default_rng(1)
    values = rng.integers(-8, 8, shape).astype(np.int8)
    scale = rng.uniform(0.1, 2, (shape[0], -(-shape[1] // 32))).astype(ml_dtypes.bfloat16)
    packed = pack_to_int32(torch.from_numpy(values), 4).numpy()
    expected = np.array([[values[i, j] * float(scale[i, j // 32]) for j in range(shape[1])] for i in range(shape[0])])
    result = quantised.unpack_int4(packed, scale, shape)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_tensors_unpacks_what_we_pack(shape):
    packed, scale, stored_shape = quantised.pack_int4(weight(shape))
    assert stored_shape.tolist() == list(shape)
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    values = unpack_from_int32(torch.from_numpy(packed.copy()), 4, torch.Size(shape)).numpy()
    theirs = values * np.repeat(scale.astype(np.float32), 32, axis=1)[:, : shape[1]]
    np.testing.assert_array_equal(quantised.unpack_int4(packed, scale, shape), theirs)
    np.testing.assert_array_equal(pack_to_int32(torch.from_numpy(values.copy()), 4).numpy(), packed)


def test_int4_error_is_half_a_step_and_packing_again_is_exact():
    original = weight((9, 77))
    packed, scale, shape = quantised.pack_int4(original)
    once = quantised.unpack_int4(packed, scale, shape)
    steps = np.repeat(scale.astype(np.float32), 32, axis=1)[:, :77]
    assert (np.abs(once - original) <= 0.52 * steps).all()  # 0.52: the scale is rounded to bfloat16
    np.testing.assert_array_equal(quantised.unpack_int4(*quantised.pack_int4(once)), once)
    np.testing.assert_array_equal(quantised.unpack_int4(*quantised.pack_int4(np.zeros((2, 40)))), 0)


def test_int4_groups_of_another_size():
    original = weight((4, 50))
    packed, scale, shape = quantised.pack_int4(original, group=16)
    assert scale.shape == (4, 4)
    assert np.abs(quantised.unpack_int4(packed, scale, shape, group=16) - original).max() < 0.25


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (5, 300), (256, 3)])
def test_fp8_against_loops(shape):
    rng = np.random.default_rng(2)
    values = weight(shape, 3).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    expected = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = np.float32(values[i, j]) * scale[i // 128, j // 128]
    np.testing.assert_array_equal(quantised.dequantise_fp8(values, scale), expected)


def test_fp8_uses_the_range_of_each_block():
    original = weight((200, 150)) * np.where(np.arange(150) < 128, 1e-3, 1e3).astype(np.float32)
    original[128:, :128] = 0
    values, scale = quantised.quantise_fp8(original)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scale.shape == (2, 2)
    for rows, columns in ((slice(0, 128), slice(0, 128)), (slice(128, 200), slice(128, 150))):
        assert np.abs(values[rows, columns].astype(np.float32)).max() == 448
    result = quantised.dequantise_fp8(values, scale)
    assert (result[128:, :128] == 0).all()
    smallest_normal = np.repeat(np.repeat(scale, 128, 0)[:200], 128, 1)[:, :150] * 2**-6
    assert (np.abs(result - original) <= np.maximum(np.abs(original), smallest_normal) * 2**-4 * 1.001).all()


def test_the_full_model_is_as_large_as_the_public_checkpoint():
    """208,550 tensors, 554.27 GiB: INT4 experts, the rest bfloat16 but for the router's bias."""
    tensors = size = 0
    for bound in bind(K25Config()):
        encoding = "int4" if "experts/" in bound.tensor.leaves else ""
        stored = quantised.parts(bound.tensor.name, bound.shape, encoding)
        tensors += math.prod(bound.stack) * len(stored)
        for dtypes, shape in stored.values():
            dtype = dtypes[0] if encoding or bound.tensor.float32 else "BF16"
            size += math.prod(bound.stack) * math.prod(shape) * DTYPES[dtype].itemsize
    assert (tensors, round(size / 2**30, 2)) == (208550, 554.27)


def expected_leaf(path, leaf, encoding):
    """What a leaf becomes through an encoding, from the description of the public formats."""
    name = "/".join(path)
    leaf = np.asarray(leaf)
    quantise = {"int4": lambda m: quantised.unpack_int4(*quantised.pack_int4(m)),
                "fp8": lambda m: quantised.dequantise_fp8(*quantised.quantise_fp8(m))}[encoding]  # fmt: skip
    if "experts" in name or (encoding == "fp8" and ("/mlp/" in name or "/shared/" in name)):
        flat = leaf.reshape(-1, *leaf.shape[-2:])
        return np.stack([quantise(matrix.T).T for matrix in flat]).reshape(leaf.shape)
    if encoding == "fp8" and name.split("/")[-1] in ("q_a", "kv_a"):
        return np.stack([quantise(matrix.T).T for matrix in leaf])
    if encoding == "fp8" and name.endswith("q_b"):
        return np.stack([quantise(m.reshape(m.shape[0], -1).T).T.reshape(m.shape) for m in leaf])
    if encoding == "fp8" and name.endswith("/attention/o"):
        return np.stack([quantise(m.reshape(-1, m.shape[-1]).T).T.reshape(m.shape) for m in leaf])
    return leaf


@pytest.mark.parametrize("encoding", ["int4", "fp8"])
def test_quantised_checkpoint_comes_back_as_its_values(tmp_path, params, encoding):
    save_params(params, MODEL, tmp_path / "q", dtype=np.float32, quantise=encoding)
    loaded = load_params(tmp_path / "q", MODEL)
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        keys = [key.key for key in path]
        original = params
        for key in keys:
            original = original[key]
        if keys[-1] in ("k_b", "v_b") and encoding == "fp8":  # one matrix in the file: checked together below
            continue
        np.testing.assert_array_equal(leaf, expected_leaf(keys, original, encoding), err_msg="/".join(keys))
    if encoding == "fp8":
        attention, kept = params["moe"]["attention"], loaded["moe"]["attention"]
        joined = np.concatenate([attention["k_b"], attention["v_b"]], axis=-1)[0]
        matrix = joined.reshape(12, -1).T
        result = quantised.dequantise_fp8(*quantised.quantise_fp8(matrix)).T.reshape(joined.shape)
        np.testing.assert_array_equal(np.concatenate([kept["k_b"], kept["v_b"]], axis=-1)[0], result)


@pytest.mark.parametrize(
    ("encoding", "name", "shape"),
    [
        ("int4", "language_model.model.layers.1.mlp.experts.1.gate_proj.weight", (96, 160)),
        ("fp8", "language_model.model.layers.0.mlp.up_proj.weight", (136, 160)),
        ("", "language_model.model.layers.0.mlp.up_proj.weight", (136, 160)),
    ],
)
def test_rows_are_read_on_their_own(tmp_path, params, encoding, name, shape):
    save_params(params, MODEL, tmp_path / "q", quantise=encoding or None)
    files = TensorFiles(tmp_path / "q", lambda name: name)
    assert files.encoding(name, shape) == encoding
    whole = files.values(name, shape, 0, shape[0])
    for first, last in ((0, 1), (5, 90), (shape[0] - 9, shape[0]), (shape[0] - 1, shape[0]), (3, 3)):
        np.testing.assert_array_equal(files.values(name, shape, first, last), whole[first:last])


def test_transformers_reads_our_int4(tmp_path, params):
    from transformers import CompressedTensorsConfig, Kimi_K25ForConditionalGeneration

    save_params(params, MODEL, tmp_path / "q", quantise="int4")
    options = CompressedTensorsConfig(dequantize=True)
    model = Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / "q", dtype=torch.float32, quantization_config=options
    )
    state = model.state_dict()["model.language_model.layers.1.mlp.experts.gate_up_proj"].float().numpy()
    ours = load_params(tmp_path / "q", MODEL)["moe"]["moe"]["experts"]
    gate_up = np.concatenate([ours["gate"][0], ours["up"][0]], axis=-1).swapaxes(1, 2)
    # compressed-tensors multiplies in the dtype of the scales
    np.testing.assert_array_equal(state, gate_up.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_weight_shape_that_contradicts_the_config_is_an_error(tmp_path, params):
    save_params(params, MODEL, tmp_path / "q", quantise="int4")
    file = next((tmp_path / "q").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "language_model.model.layers.1.mlp.experts.2.up_proj.weight_shape"
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[start] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="experts.2.up_proj.weight_shape is not"):
        load_params(tmp_path / "q", MODEL)


def test_weights_that_are_not_finite_are_not_quantised_and_nothing_is_lost(tmp_path, params):
    save_params(params, MODEL, tmp_path / "q", dtype=np.float32)
    bad = jax.tree.map(np.array, params)
    bad["moe"]["moe"]["experts"]["down"][0, 1, 3, 4] = np.nan
    before = {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    for encoding in ("int4", "fp8"):
        with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.1.down_proj.weight cannot be stored as"):
            save_params(bad, MODEL, tmp_path / "q", quantise=encoding)
    assert {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["q"]


# ---------------------------------------------------------------------------------------------------- files
def test_files_are_sound_aligned_and_in_the_order_of_layers(checkpoint, params):
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(weight_map.values())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert stored == weight_map
    layers = [weight_map[f"language_model.model.layers.{y}.input_layernorm.weight"] for y in range(2)]
    assert layers == sorted(layers)
    calls = []
    assert_equal(load_params(checkpoint, MODEL, progress=lambda *call: calls.append(call)), params)
    assert len(calls) == len(jax.tree.leaves(params)) and calls[-1][1:] == (len(calls), len(calls))


def test_bfloat16_keeps_the_routers_bias_and_aligns_every_tensor(tmp_path, params):
    save_params(params, MODEL, tmp_path / "c")
    (file,) = (tmp_path / "c").glob("*.safetensors")
    with safetensors.safe_open(file, "pt") as tensors:
        types = {name: tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {
        f"language_model.model.layers.{y}.mlp.gate.e_score_correction_bias" for y in (1,)
    }
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(v["data_offsets"][0] % 4 == 0 for k, v in header.items() if v.get("dtype") == "F32")
    loaded = load_params(tmp_path / "c", MODEL, dtype=jnp.bfloat16)
    assert loaded["moe"]["moe"]["router"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["moe"]["moe"]["router_bias"], params["moe"]["moe"]["router_bias"])
    np.testing.assert_array_equal(
        loaded["moe"]["attention"]["k_b"], params["moe"]["attention"]["k_b"].astype("bfloat16")
    )
    save_params(loaded, MODEL, tmp_path / "again")
    assert (tmp_path / "again" / file.name).read_bytes() == data


def rewrite(file, change):
    """Apply `change` to the dictionary of tensors in a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def break_index(folder, change):
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    change(contents["weight_map"])
    index.write_text(json.dumps(contents))


NORM = "language_model.model.norm.weight"


def owner(folder, name=NORM):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


DAMAGE = {
    "missing tensor": (
        lambda c: (rewrite(owner(c), lambda t: t.pop(NORM)), break_index(c, lambda m: m.pop(NORM))),
        [f"{NORM} is missing", "1 problem"],
    ),
    "not where the index puts it": (
        lambda c: rewrite(owner(c), lambda t: t.pop(NORM)),
        [f"{NORM} is not in model-", "1 problem"],
    ),
    "extra tensor": (
        lambda c: rewrite(owner(c), lambda t: t.update({"language_model.model.layers.0.self_attn.g": t[NORM]})),
        ["language_model.model.layers.0.self_attn.g is not part of this model"],
    ),
    "shape": (
        lambda c: rewrite(owner(c), lambda t: t.update({NORM: np.zeros((161,), np.float32)})),
        [f"{NORM} has shape [161]; the config asks for [160]"],
    ),
    "dtype": (
        lambda c: rewrite(owner(c), lambda t: t.update({NORM: np.zeros((160,), np.int64)})),
        [f"{NORM} is I64; it must be F32 or BF16 or F16"],
    ),
    "twice": (
        lambda c: rewrite(owner(c), lambda t: t.update({"model.norm.weight": t[NORM]})),
        ["model.norm.weight", "repeats", NORM],
    ),
    "missing shard": (lambda c: owner(c).unlink(), ["which the index names, is missing", "1 problem"]),
    "cut off": (lambda c: cut(owner(c), -3), ["cut off or damaged", "1 problem"]),
    "cut off in the header": (lambda c: cut(owner(c), 100), ["cut off inside its header"]),
    "empty file": (lambda c: cut(owner(c), 0), ["not a safetensors file", "1 problem"]),
    "longer": (lambda c: owner(c).write_bytes(owner(c).read_bytes() + b"x"), ["cut off or damaged"]),
    "broken header": (
        lambda c: owner(c).write_bytes(owner(c).read_bytes().replace(b'"dtype"', b'"dtype:', 1)),
        ["has a corrupt header", "1 problem"],
    ),
    "offsets": (
        lambda c: owner(c).write_bytes(owner(c).read_bytes().replace(b'_offsets": [0, ', b'_offsets": [4, ', 1)),
        ["cannot lie at bytes 4 to"],
    ),
    "broken index": (
        lambda c: (c / "model.safetensors.index.json").write_text('{"weight_map": ['),
        ["index.json is not an index"],
    ),
    "index without a map": (
        lambda c: (c / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
        ["index.json is not an index"],
    ),
    "no files": (lambda c: [file.unlink() for file in c.glob("*")], ["has neither model.safetensors nor"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(checkpoint, damage):
    act, messages = DAMAGE[damage]
    act(checkpoint)
    with pytest.raises(CheckpointError) as error:
        load_params(checkpoint, MODEL)
    for message in [str(checkpoint), *messages]:
        assert message in str(error.value)


def test_all_problems_come_in_one_error(tmp_path, params):
    save_params(params, MODEL, tmp_path / "c", dtype=np.float32)
    (file,) = (tmp_path / "c").glob("*.safetensors")

    def change(tensors):
        for name in [name for name in tensors if ".experts." in name or name == NORM]:
            del tensors[name]
        tensors["strange"] = np.zeros(2, np.float32)

    rewrite(file, change)
    (tmp_path / "c" / "model.safetensors.index.json").unlink()
    file.rename(tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path / "c", MODEL)
    assert "11 problems" in str(error.value)
    assert str(error.value).count("is missing") == 10 and "strange is not part" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        load_params(tmp_path / "c", preset("100m"))
    assert len(str(error.value).splitlines()) == 52  # a heading, 50 problems, and dots


def test_harmless_tensors_are_passed_over(checkpoint, params):
    def change(tensors):
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["language_model.model.layers.2.eh_proj.weight"] = np.ones((2, 4), np.float32)
        tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = np.ones((2, 4), np.float32)

    rewrite(owner(checkpoint), change)
    assert_equal(load_params(checkpoint, MODEL), params)
    text = load_params(checkpoint, MODEL, text_only=True)
    assert_equal(text, {key: params[key] for key in params if key not in ("vision", "projector")})
