"""Checkpoints against transformers' own reader and writer, damaged files, sharded loading."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from k25_jax.checkpoint.hf_config import read_config, write_config
from k25_jax.checkpoint.huggingface import load_params, save_params
from k25_jax.checkpoint.layout import TABLE
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.config import PRESETS, K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig, preset
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import abstract_params, forward
from k25_jax.vision.patchpack import Clip, pack_clips
from reference import randomise

KIMI = transformers.Kimi_K25ForConditionalGeneration
VISION = dict(hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=20, pos_emb_height=6,
              pos_emb_width=6)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=3e4, factor=4.0, original_max_position_embeddings=32, beta_fast=16.0,
            beta_slow=2.0, mscale=1.0, mscale_all_dim=0.7)  # fmt: skip
MODELS = {
    "lora_yarn_groups_bias": dict(
        num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=9, attention_bias=True, n_shared_experts=2,
        rope_parameters=YARN, max_position_embeddings=128,
    ),
    "tied_all_moe": dict(
        num_hidden_layers=2, first_k_dense_replace=0, q_lora_rank=4, n_group=1, topk_group=1, n_shared_experts=1,
        norm_topk_prob=False, rms_norm_eps=1e-5,
    ),
    "all_dense": dict(num_hidden_layers=2, first_k_dense_replace=2, q_lora_rank=5, n_shared_experts=1),
}  # fmt: skip
TINY = K25Config(
    text=TextConfig(
        vocab_size=64, d_model=24, layers=3, ffn_dim=40, heads=3, q_lora_rank=9, kv_lora_rank=7, qk_nope_dim=6,
        qk_rope_dim=4, v_dim=5, max_length=64, moe=MoEConfig(experts=4, top_k=2, ffn_dim=10),
        rope=RopeConfig(original_length=64),
    ),
    vision=VisionConfig(layers=2, width=24, heads=2, mlp_dim=20, pos_height=6, pos_width=6),
    media_begin_id=61, media_end_id=62, media_pad_id=63, bos_id=0, eos_ids=(1,), pad_id=2,
)  # fmt: skip


def text_config(**changes):
    return transformers.DeepseekV3Config(**dict(
        vocab_size=64, hidden_size=26, intermediate_size=40, moe_intermediate_size=10, num_attention_heads=3,
        num_key_value_heads=3, n_routed_experts=6, kv_lora_rank=7, qk_rope_head_dim=4, v_head_dim=5, n_group=2,
        qk_nope_head_dim=6, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.7, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    ) | changes)  # fmt: skip


def whole_model(name):
    config = transformers.Kimi_K25Config(
        text_config=text_config(**MODELS[name]).to_dict(), vision_config=VISION, projection_hidden_size=24,
        tie_word_embeddings="tied" in name, image_token_id=63, vision_start_token_id=61, vision_end_token_id=62,
    )  # fmt: skip
    return randomise(KIMI(config))


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        other = expected
        for key in path:
            other = other[key.key]
        assert leaf.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)), abstract_params(TINY))


# -------------------------------------------------------------------------------------------------------- transformers
@pytest.mark.parametrize("name", MODELS)
def test_transformers_to_ours_and_back_is_the_same_bit_for_bit(tmp_path, name):
    model = whole_model(name)
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    loaded = load_params(tmp_path / "theirs", config)
    shapes = jax.tree.map(lambda a: a.shape, loaded)
    assert shapes == jax.tree.map(lambda a: a.shape, abstract_params(config))
    save_params(loaded, config, tmp_path / "ours", dtype=np.float32, shard_bytes=30_000)
    again = KIMI.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    assert read_config(tmp_path / "ours") == config
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert_equal(load_params(tmp_path / "ours", config), loaded)


def logits(folder, config, tokens, patches):
    """Ours, of one row with an image of 4 by 6 patches, or of text alone."""
    clips = [] if patches is None else [Clip(patches, (1, 4, 6))]
    pack, _ = pack_clips(clips, len(clips), 24)
    media = np.where(tokens == 63, np.cumsum(tokens == 63) - 1, -1).astype(np.int32)
    ones, zeros = np.ones_like(tokens), np.zeros(tokens.shape, np.float32)
    batch = Batch(tokens, tokens, zeros, ones, np.arange(tokens.size, dtype=np.int32)[None], media, pack)
    return jax.jit(forward, static_argnums=2)(load_params(folder, config), batch, config)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    """Both of what transformers wrote, and of what we wrote: it takes our config as it takes its own."""
    whole_model(name).save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    save_params(load_params(tmp_path / "theirs", config), config, tmp_path / "ours", dtype=np.float32)
    patches = np.random.default_rng(0).normal(size=(24, 588)).astype(np.float32)
    tokens = np.array([[7, 61, *[63] * 6, 62, 9, 11, 30, 3]], np.int32)
    inputs = dict(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        pixel_values=torch.from_numpy(patches.reshape(24, 3, 14, 14)),
        image_grid_thw=torch.tensor([[1, 4, 6]]),
    )
    result = logits(tmp_path / "theirs", config, tokens, patches)
    for folder in ("theirs", "ours"):
        model = KIMI.from_pretrained(tmp_path / folder, experts_implementation="eager")
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        np.testing.assert_allclose(result, expected, atol=2e-5 * np.abs(expected).max())


def test_queries_without_a_latent(tmp_path, params):
    """transformers cannot save such a whole model (it turns the queries of the text), but it can load ours."""
    changes = dict(num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=None, hidden_size=24)
    text = randomise(transformers.DeepseekV3ForCausalLM(text_config(**changes)))
    text.save_pretrained(tmp_path / "text")
    config = dataclasses.replace(read_config(tmp_path / "text"), vision=TINY.vision, media_pad_id=63)
    tree = load_params(tmp_path / "text", config, text_only=True)
    tree |= {name: params[name] for name in ("vision", "projector")}
    save_params(tree, config, tmp_path / "ours", dtype=np.float32)
    model = KIMI.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    state = model.state_dict()
    for key, tensor in text.state_dict().items():
        assert torch.equal(state[key.replace("model.", "model.language_model.")], tensor), key
    tokens = np.array([[7, 9, 11, 30, 3]], np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "ours", config, tokens, None), expected, atol=1e-5)


def test_places_of_single_values_in_a_language_model_alone(tmp_path):
    model = randomise(
        transformers.DeepseekV3ForCausalLM(text_config(num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=9))
    )
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.vision == VisionConfig() and config.text.layers == 2
    with pytest.raises(CheckpointError, match="text_only=True"):
        load_params(tmp_path, config)
    tree = load_params(tmp_path, config, text_only=True)
    assert tree.keys() == {"embed", "final_norm", "head", "dense", "moe"}
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    layer = "model.layers.1."
    attention, moe = tree["moe"]["attention"], tree["moe"]["moe"]
    q_b, kv_b, o = (state[f"{layer}self_attn.{part}_proj.weight"] for part in ("q_b", "kv_b", "o"))
    gate_up = state[layer + "mlp.experts.gate_up_proj"]
    assert attention["q_b"][0, 8, 2, 9] == q_b[2 * 10 + 9, 8]
    assert attention["k_b"][0, 4, 1, 5] == kv_b[1 * 11 + 5, 4]
    assert attention["v_b"][0, 4, 1, 3] == kv_b[1 * 11 + 6 + 3, 4]
    assert attention["o"][0, 2, 4, 25] == o[25, 2 * 5 + 4]
    assert moe["experts"]["gate"][0, 5, 25, 9] == gate_up[5, 9, 25]
    assert moe["experts"]["up"][0, 5, 25, 9] == gate_up[5, 19, 25]
    assert moe["experts"]["down"][0, 3, 8, 20] == state[layer + "mlp.experts.down_proj"][3, 20, 8]
    assert moe["router"][0, 20, 4] == state[layer + "mlp.gate.weight"][4, 20]
    assert tree["head"][25, 60] == state["lm_head.weight"][60, 25]
    assert tree["dense"]["mlp"]["down"][0, 39, 25] == state["model.layers.0.mlp.down_proj.weight"][25, 39]


# -------------------------------------------------------------------------------------------------------------- writing
def test_table_covers_every_parameter_of_every_preset():
    leaves = {leaf for tensor in TABLE for leaf in tensor.leaves.split()}
    for name in PRESETS:
        paths, _ = jax.tree_util.tree_flatten_with_path(abstract_params(preset(name)))
        assert {"/".join(key.key for key in path) for path, _ in paths} <= leaves


def test_only_checkpoints_and_empty_folders_are_replaced(tmp_path, params):
    folder = tmp_path / "c"
    folder.mkdir()
    save_params(params, TINY, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    save_params(params, TINY, folder, dtype=np.float32, shard_bytes=20_000)
    assert (folder / "tokenizer.json").read_text() == "{}" and (folder / "extra").is_dir()
    assert_equal(load_params(folder, TINY), params)
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for target in (other, other / "thesis.txt"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            save_params(params, TINY, target)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c", "notes"]
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_tree_that_is_not_the_models_is_not_written(tmp_path, params):
    wrong = dict(params, head=params["embed"], stray=params["embed"])
    del wrong["final_norm"]
    with pytest.raises(CheckpointError) as error:
        save_params(wrong, TINY, tmp_path / "c")
    for part in ("3 problems", "final_norm is missing", "stray is not part", "head has shape"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="quantise='int3'"):
        save_params(params, TINY, tmp_path / "c", quantise="int3")
    assert not any(tmp_path.iterdir())


def run(script, **environment):
    """Run a script in a process of its own; returns what it printed."""
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)} | environment
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, params):
    checkpoint = tmp_path / "c"
    save_params(params, TINY, checkpoint, dtype=np.float32)
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    out = run(f"""
        import resource, signal
        from k25_jax.checkpoint.hf_config import read_config
        from k25_jax.checkpoint.huggingface import load_params, save_params
        from k25_jax.checkpoint.store import CheckpointError
        config = read_config({str(checkpoint)!r})
        params = load_params({str(checkpoint)!r}, config)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            save_params(params, config, {str(checkpoint)!r})
        except CheckpointError as error:
            print(error)
        """)
    assert str(checkpoint) in out and "cannot be written" in out
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["c"]


# -------------------------------------------------------------------------------------------------------------- sharded
def test_eight_devices_and_memory(tmp_path):
    """Loading holds one shard beside the parameters, saving one tensor; values and donation are right."""
    out = run(
        f"""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from k25_jax.checkpoint.huggingface import load_params, save_params
        from k25_jax.config import K25Config, MoEConfig, TextConfig, VisionConfig
        from k25_jax.models.k25 import abstract_params

        def memory(kind):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

        def growth(run):
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
            before, result = memory("VmRSS"), run()
            return memory("VmHWM") - before, result

        text = TextConfig(vocab_size=64, d_model=1024, layers=3, ffn_dim=64, heads=4, q_lora_rank=32, kv_lora_rank=16,
                          qk_nope_dim=8, qk_rope_dim=4, v_dim=8, max_length=64,
                          moe=MoEConfig(experts=8, top_k=2, ffn_dim=1024))
        vision = VisionConfig(layers=1, width=16, heads=2, mlp_dim=20, pos_height=4, pos_width=4)
        config = K25Config(text=text, vision=vision, bos_id=0, eos_ids=(1,), pad_id=2)
        mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
        specs = dict(gate=P(None, "a", "b", "c"), up=P(None, "c", None, ("b", "a")), down=P(None, ("c", "a"), "b"),
                     q_a=P(None, "a", ("b", "c")), q_b=P(None, "a", "b", "c"), k_b=P(None, "a", None, "c"),
                     v_b=P(None, None, "b", "c"), o=P(None, "a", "b", "c"), embed=P("c", ("a", "b")), head=P("a"))

        def sharding(path, leaf):
            spec = specs.get(path[-1].key, P())
            return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else P(None, "a", "b"))

        shapes = abstract_params(config)
        shardings = jax.tree_util.tree_map_with_path(sharding, shapes)
        rng = np.random.default_rng(0)
        host = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), shapes)
        save_params(host, config, {str(tmp_path / "a")!r}, shard_bytes=5e7)
        loading, loaded = growth(lambda: load_params({str(tmp_path / "a")!r}, config, shardings))
        assert jax.tree.map(lambda a: a.sharding, loaded) == shardings
        for array, leaf in zip(jax.tree.leaves(host), jax.tree.leaves(loaded)):
            if leaf is not loaded["moe"]["moe"]["router_bias"]:
                array = array.astype("bfloat16")
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), array[shard.index])
        saving, _ = growth(lambda: save_params(loaded, config, {str(tmp_path / "b")!r}, shard_bytes=5e7))
        size = sum(shard.data.nbytes for leaf in jax.tree.leaves(loaded) for shard in leaf.addressable_shards)
        print(loading / size, saving / size, size)
        step = jax.jit(lambda x: x + 1, donate_argnums=0)
        expected = host["final_norm"].astype("bfloat16").astype(np.float32) + 2
        assert all((shard.data == expected).all() for shard in step(step(loaded["final_norm"])).addressable_shards)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    loading, saving, size = map(float, out.split())
    assert size > 2e8
    assert loading < 1.25, f"loading took {loading} times the parameters"  # with the files read first: 1.5
    assert saving < 0.8, f"saving took {saving} times the parameters"  # with the parameters gathered first: more than 1


# --------------------------------------------------------------------------------------------------------------- config
PUBLIC = {
    "architectures": ["KimiK25ForConditionalGeneration"], "bos_token_id": 163584, "eos_token_id": 163585,
    "ignore_index": -100, "media_placeholder_token_id": 163605, "model_type": "kimi_k25", "pad_token_id": 163839,
    "text_config": {
        "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 262144, "model_type": "kimi_k2",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 64, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 163840,
    },
    "vision_config": {
        "init_pos_emb_height": 64, "init_pos_emb_time": 4, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool", "mm_hidden_size": 1152, "mm_projector_type": "patchmerger", "patch_size": 14,
        "pos_emb_type": "divided_fixed", "projector_hidden_act": "gelu", "projector_ln_eps": 1e-05,
        "text_hidden_size": 7168, "video_attn_type": "spatial_temporal", "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304, "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27,
    },
}  # fmt: skip


def config_file(folder, contents):
    (folder / "config.json").write_text(json.dumps(contents))
    return folder


def test_the_public_config_is_the_full_model(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [163586, 163585]}')
    assert read_config(config_file(tmp_path, PUBLIC)) == preset("k25_1t")


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_by_both(tmp_path, name):
    config = preset(name)
    assert read_config(config_file(tmp_path, write_config(config))) == config
    theirs = transformers.Kimi_K25Config.from_pretrained(tmp_path)
    assert theirs.vision_config.hidden_size == config.vision.width
    assert theirs.text_config.rope_parameters["rope_theta"] == config.text.rope.theta
    (tmp_path / "again").mkdir()
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == config


def test_missing_fields_have_the_defaults_of_transformers(tmp_path):
    config_file(tmp_path, {"model_type": "kimi_k25", "image_token_id": 7, "text_config": {}, "vision_config": {}})
    config = read_config(tmp_path)
    theirs = transformers.Kimi_K25Config.from_pretrained(tmp_path)
    text, vision = theirs.text_config, theirs.vision_config
    ours = (config.text.vocab_size, config.text.heads, config.text.dense_layers, config.text.moe.experts,
            config.text.moe.groups, config.text.moe.scale, config.text.rope.theta, config.text.tie_embeddings,
            config.text.max_length, config.vision.layers, config.vision.pos_height, config.projector_eps)  # fmt: skip
    assert ours == (text.vocab_size, text.num_attention_heads, text.first_k_dense_replace, text.n_routed_experts,
                    text.n_group, text.routed_scaling_factor, text.rope_parameters["rope_theta"],
                    theirs.tie_word_embeddings, text.max_position_embeddings, vision.num_hidden_layers,
                    vision.pos_emb_height, theirs.projection_layer_norm_eps)  # fmt: skip
    assert config.text.tie_embeddings and not config.text.rope.yarn
    config_file(tmp_path, {"model_type": "kimi_k25", "text_config": {"q_lora_rank": None}, "vision_config": {}})
    assert not read_config(tmp_path).text.tie_embeddings and read_config(tmp_path).text.q_lora_rank == 0
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    config_file(tmp_path, {"model_type": "kimi_k2", "rope_scaling": yarn, "rope_theta": 7, "eos_token_id": [5, 6]})
    expected = RopeConfig(theta=7.0, factor=4.0, original_length=1024, mscale=0.0, mscale_all_dim=0.0, yarn=True)
    assert read_config(tmp_path).text.rope == expected
    assert (read_config(tmp_path).eos_ids, read_config(tmp_path).pad_id) == ((5, 6), 5)
    written = write_config(read_config(tmp_path))["text_config"]["rope_scaling"]
    assert "mscale" not in written and "mscale_all_dim" not in written


UNSUPPORTED = [
    ("", "model_type", "qwen3_vl"), ("", "projection_hidden_size", 1), ("", "media_placeholder_token_id", "x"),
    ("", "eos_token_id", "stop"), ("text_config", "model_type", "kimi_linear"), ("text_config", "hidden_act", "gelu"),
    ("text_config", "rope_interleave", False), ("text_config", "scoring_func", "softmax"),
    ("text_config", "topk_method", "greedy"), ("text_config", "moe_layer_freq", 2),
    ("text_config", "num_key_value_heads", 8), ("text_config", "hidden_size", "7168"),
    ("text_config", "num_hidden_layers", 61.0), ("text_config", "norm_topk_prob", 1),
    ("text_config.rope_scaling", "type", "linear"), ("text_config.rope_scaling", "truncate", False),
    ("text_config.rope_scaling", "attention_factor", 1.2), ("text_config.rope_scaling", "long_factor", [1.0]),
    ("text_config.quantization_config", "quant_method", "awq"),
    ("text_config.quantization_config", "format", "naive-quantized"), ("vision_config", "merge_type", "sd2"),
    ("vision_config", "pos_emb_type", "learned"), ("vision_config", "video_attn_type", "spatial"),
    ("vision_config", "mm_projector_type", "mlp"), ("vision_config", "hidden_act", "gelu"),
    ("vision_config", "mm_hidden_size", 1024), ("vision_config", "text_hidden_size", 4096),
    ("vision_config", "hidden_size", 1024), ("vision_config", "merge_kernel_size", 2),
]  # fmt: skip


@pytest.mark.parametrize(("section", "field", "value"), UNSUPPORTED)
def test_unsupported_values_are_named(tmp_path, section, field, value):
    contents = json.loads(json.dumps(PUBLIC))
    target = contents
    for name in section.split(".") if section else []:
        target = target[name]
    target[field] = value
    with pytest.raises(CheckpointError) as error:
        read_config(config_file(tmp_path, contents))
    for part in (str(tmp_path / "config.json"), field.removeprefix("rope_"), str(value)):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "kimi_k25", "text_config": 3}', "\udcff"])
def test_broken_config_files_are_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_config(tmp_path / "nowhere")


def test_impossible_models_are_named_with_the_file(tmp_path):
    contents = json.loads(json.dumps(PUBLIC))
    contents["text_config"]["num_experts_per_tok"] = 400
    with pytest.raises(CheckpointError, match="config.json: moe.top_k=400"):
        read_config(config_file(tmp_path, contents))
    for config, field in (
        (K25Config(vision=VisionConfig(norm_eps=1e-6)), "vision.norm_eps"),
        (K25Config(text=TextConfig(vocab_size=100)), "pad_id"),
    ):
        with pytest.raises(CheckpointError, match=field):
            write_config(config)
