"""Weights from stage to stage: encoder and projector, the language model, public files of a language model alone."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import torch
import transformers

from k25_jax.checkpoint.huggingface import save_params
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError, Store
from k25_jax.config import ConfigError, RopeConfig, load_experiment
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import forward
from k25_jax.train.handover import load_initial
from k25_jax.train.layout import mesh_of
from k25_jax.train.loop import train
from k25_jax.train.run import restore_or_init, save_run
from k25_jax.train.state import init_state
from k25_jax.vision.patchpack import pack_clips

NAMES = ("embed", "dense", "moe", "final_norm", "head")


def equal(tree, other) -> bool:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def source(finished):
    """The parameters of a run that is over."""
    return load_model(finished.run).params


def begun(finished, *changes):
    """(the experiment, fresh parameters of another seed, what it begins with)."""
    experiment = load_experiment(str(finished.file), ["train.seed=7", *changes])
    fresh = init_state(experiment).params
    return experiment, fresh, load_initial(experiment, fresh)


def test_encoder_and_projector_of_a_run_join_a_language_model_of_another(finished, source, tmp_path):
    """As in joint pre-training: the language model from public files, though these have an encoder of their own."""
    other = load_experiment(str(finished.file), ["train.seed=3"])
    language = init_state(other).params
    save_params(language, other.model, tmp_path / "public", dtype=np.float32)
    _, _, params = begun(finished, f"train.init_from={tmp_path / 'public'}", f"train.init_vision_from={finished.run}")
    assert equal([params["vision"], params["projector"]], [source["vision"], source["projector"]])
    assert equal([params[name] for name in NAMES], [language[name] for name in NAMES])
    _, fresh, params = begun(finished, f"train.init_vision_from={finished.run}")
    assert equal([params["vision"], params["projector"]], [source["vision"], source["projector"]])
    assert equal([params[name] for name in NAMES], [fresh[name] for name in NAMES])


def test_a_projector_of_another_width_stays_fresh_and_the_log_says_so(finished, source, caplog):
    with caplog.at_level(logging.WARNING):
        _, fresh, params = begun(finished, f"train.init_vision_from={finished.run}", "model.text.d_model=32")
    assert equal(params["vision"], source["vision"]) and equal(params["projector"], fresh["projector"])
    assert f"projector of {finished.run} has text.d_model=24, this model 32: it is fresh" in caplog.text


def test_yarn_and_a_longer_context_take_the_weights_as_they_are(finished, source):
    """From a run and into one: the optimizer is fresh, the schedule begins at its start."""
    rope = dict(factor=8.0, original_length=64, yarn=True)
    changes = (f"train.init_from={finished.run}", "model.text.max_length=1024", f"model.text.rope={rope}")
    experiment, _, params = begun(finished, *changes)
    assert equal(params, source) and experiment.model.text.rope == RopeConfig(**rope)


def test_a_run_begins_with_what_is_handed_over_and_nothing_else(finished, source, tmp_path):
    experiment = load_experiment(str(finished.file), [f"train.init_from={finished.run}", "train.seed=7"])
    store = Store(tmp_path / "checkpoints")
    state, step, bad = restore_or_init(experiment, store, None, mesh_of(experiment))
    store.close()
    assert (step, bad, int(state.step), int(state.opt_state.count)) == (0, 0, 0, 0)
    assert equal(state.params, source)
    assert not any(np.asarray(a).any() for a in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu)))


# ------------------------------------------------------------------------------------------------------ public text only
def public_language_model(folder, **changes):
    """DeepSeek-V3's layout, as Kimi K2's public files have it, in the sizes of the minute model."""
    values = dict(
        vocab_size=288, hidden_size=24, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=32,
        moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, routed_scaling_factor=2.827, rms_norm_eps=1e-6, max_position_embeddings=128, initializer_range=0.1,
        rope_parameters=dict(rope_type="default", rope_theta=5e4), bos_token_id=256, eos_token_id=258, pad_token_id=276,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def test_a_public_language_model_alone_is_taken_and_vision_stays_fresh(finished, source, tmp_path, caplog):
    theirs = public_language_model(tmp_path / "k2")
    with caplog.at_level(logging.WARNING):
        experiment, fresh, params = begun(finished, f"train.init_from={tmp_path / 'k2'}")
    assert "holds a language model alone: encoder and projector are fresh" in caplog.text
    assert equal([params["vision"], params["projector"]], [fresh["vision"], fresh["projector"]])
    tokens = np.array([[7, 9, 11, 30, 3, 200, 90]], np.int32)
    blank = np.zeros_like(tokens)
    vision = experiment.model.vision
    pack, _ = pack_clips([], 0, 64, vision.merge, vision.patch_dim)
    batch = Batch(tokens, blank, blank.astype(np.float32), blank + 1, np.arange(7)[None], blank - 1, pack)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(forward(params, batch, experiment.model), expected, atol=1e-5)
    changes = (f"train.init_from={tmp_path / 'k2'}", f"train.init_vision_from={finished.run}")
    _, _, joined = begun(finished, *changes)
    assert equal([joined["vision"], joined["projector"]], [source["vision"], source["projector"]])
    assert equal([joined[name] for name in NAMES], [params[name] for name in NAMES])


# --------------------------------------------------------------------------------------------------------------- misfits
def test_models_that_do_not_fit_are_named_field_by_field(finished, tmp_path):
    public_language_model(tmp_path / "k2", num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=1)
    run, public = f"train.init_from={finished.run}", f"train.init_from={tmp_path / 'k2'}"
    vision = f"train.init_vision_from={finished.run}"
    for changes, words in (
        ((run, "model.text.layers=3"), "model.text.layers is 2 there and 3 here"),
        ((run, "model.vision.layers=2"), "model.vision.layers is 1 there and 2 here"),
        ((run, "model.text.moe.experts=8", "model.text.v_dim=4"), "v_dim is 8 there and 4 here; .*moe.experts is 4 there"),
        ((vision, "model.vision.width=32"), "train.init_vision_from=.*model.vision.width is 16 there and 32 here"),
        ((public,), "model.text.heads is 4 there and 2 here; model.text.moe.top_k is 1 there and 2 here"),
        ((f"train.init_from={tmp_path}",), "neither a run .* nor a public checkpoint: .*config.json: No such file"),
        ((f"train.init_vision_from={tmp_path / 'none'}",), "none"),
    ):  # fmt: skip
        with pytest.raises((CheckpointError, ConfigError), match=words):
            load_initial(load_experiment(str(finished.file), list(changes)), {})


def test_a_stage_of_another_model_wants_another_folder(finished, tmp_path):
    experiment = load_experiment(str(finished.file))
    save_run(experiment, tmp_path)
    text = dataclasses.replace(experiment.model.text, max_length=1024)
    longer = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, text=text))
    with pytest.raises(ConfigError, match="holds a run of another model; choose another --workdir"):
        train(longer, tmp_path)
