"""MLA: the decoding form equals the training form, place by place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.config import RopeConfig, preset
from k25_jax.models.k25 import init_params
from k25_jax.models.mla import latents, mla, mla_decode
from k25_jax.models.rope import rope_tables

TINY = preset("tiny")
YARN = RopeConfig(factor=4.0, original_length=8, beta_fast=1.0, yarn=True)


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("rope", [RopeConfig(), YARN])
def test_absorbed_decoding_equals_expanded_attention(rank, rope):
    config = dataclasses.replace(TINY.text, q_lora_rank=rank, rope=rope, attention_bias=bool(rank))
    model = dataclasses.replace(TINY, text=config)
    p = jax.tree.map(
        lambda a: a[0], jax.jit(lambda key: init_params(model, key))(jax.random.key(1))["moe"]["attention"]
    )
    p = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), p)
    x = jax.random.normal(jax.random.key(3), (2, 20, config.d_model))
    positions = jnp.tile(jnp.arange(20), (2, 1))
    tables = rope_tables(config.rope, config.qk_rope_dim, positions)
    whole = mla(p, x, tables, jnp.ones((2, 20), jnp.int32), config)
    cache = latents(p, x, tables, config)
    seen = jnp.tril(jnp.ones((20, 20), bool))[None].repeat(2, 0)
    decoded = mla_decode(p, x, tables, cache, seen, config)
    np.testing.assert_allclose(decoded, whole, rtol=1e-4, atol=2e-5)


def test_a_later_token_never_reaches_an_earlier_one():
    config = TINY.text
    p = jax.tree.map(lambda a: a[0], jax.jit(lambda key: init_params(TINY, key))(jax.random.key(1))["moe"]["attention"])
    x = jax.random.normal(jax.random.key(3), (1, 12, config.d_model))
    tables = rope_tables(config.rope, config.qk_rope_dim, jnp.arange(12)[None])
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    grad = jax.grad(lambda x: mla(p, x, tables, segments, config)[0, 8].sum())(x)
    touched = np.flatnonzero(np.abs(np.asarray(grad[0])).sum(-1))
    assert touched.tolist() == [5, 6, 7, 8]
