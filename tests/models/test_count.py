"""Parameter counts: by hand for a small model, by the paper for the large ones, and without allocating."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from k25_jax.config import PRESETS, preset
from k25_jax.models.count import count_params
from k25_jax.models.k25 import abstract_params, init_params


def test_the_model_of_the_paper():
    counts = count_params(preset("k25_1t"))
    attention = 7168 * 1536 + 1536 * 64 * 192 + 7168 * (512 + 64) + 512 * 64 * (128 + 128) + 64 * 128 * 7168
    assert counts["attention"] == 61 * attention
    assert counts["routed_experts"] == 60 * 384 * 3 * 7168 * 2048
    assert counts["shared_experts"] == 60 * 3 * 7168 * 2048
    assert counts["dense_ffn"] == 3 * 7168 * 18432
    assert counts["router"] == 60 * (7168 * 384 + 384)
    assert counts["embedding"] == counts["head"] == 163840 * 7168
    assert counts["norms"] == 61 * (2 * 7168 + 1536 + 512) + 7168
    assert counts["total"] == pytest.approx(1.027e12, rel=1e-3)
    assert 32e9 <= counts["active"] <= 33e9
    assert 0.41e9 <= counts["vision"] <= 0.42e9


def test_a_sixteen_billion_model():
    counts = count_params(preset("moonlight_16b"))
    assert counts["text"] == pytest.approx(16e9, rel=0.03)
    assert counts["active"] == pytest.approx(3e9, rel=0.1)  # with the embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_components_make_up_the_whole(name):
    counts = count_params(preset(name))
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(preset(name))))
    parts = ("embedding attention dense_ffn routed_experts shared_experts router norms head").split()
    assert counts["text"] == sum(counts[part] for part in parts)
    assert counts["total"] == whole == counts["text"] + counts["vision"] + counts["projector"]
    assert min(counts.values()) > 0


def test_active_leaves_out_the_experts_that_a_token_does_not_visit():
    config = preset("tiny")
    moe = dataclasses.replace(config.text.moe, top_k=config.text.moe.experts)
    everything = count_params(dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe)))
    assert everything["active"] == everything["text"]
    counts = count_params(config)
    one_expert = 3 * config.text.d_model * config.text.moe.ffn_dim * config.text.moe_layers
    assert counts["text"] - counts["active"] == 6 * one_expert


def test_abstract_parameters_are_those_of_a_fresh_model():
    config = preset("tiny")
    fresh = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0, impl="rbg"))  # quick to compile
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(config))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), fresh)
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(fresh))
    gate = fresh["moe"]["moe"]["experts"]["gate"]
    np.testing.assert_allclose(gate.std(), config.text.init_std, rtol=0.02)
    assert not np.array_equal(gate[0, 0], gate[0, 1]) and not np.array_equal(gate[0, 0], gate[1, 0])
    assert not fresh["moe"]["moe"]["router_bias"].any() and (fresh["final_norm"] == 1).all()


def test_options_add_and_remove_their_parameters():
    tiny = preset("tiny")

    def paths(**changes):
        config = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, **changes))
        return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config))}

    plain = paths()
    assert plain - paths(tie_embeddings=True) == {"['head']"}
    attention = ["['dense']['attention']", "['moe']['attention']"]
    assert paths(attention_bias=True) - plain == {f"{a}['{n}_bias']" for a in attention for n in ("q_a", "kv_a", "o")}
    assert plain - paths(q_lora_rank=0) == {f"{a}['{n}']" for a in attention for n in ("q_a", "q_a_norm", "q_b")}
    assert not any("['dense']" in path for path in paths(dense_layers=0))
    assert not any("['moe']" in path for path in paths(dense_layers=3))
    moe = dataclasses.replace(tiny.text.moe, shared_experts=0)
    assert plain - paths(moe=moe) == {f"['moe']['moe']['shared']['{n}']" for n in ("gate", "up", "down")}
