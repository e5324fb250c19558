"""The two forms of latent attention are one function; decoding step by step is the whole forward pass."""

import dataclasses

import jax
import numpy as np
import pytest

import reference
from k25_jax.config import K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig
from k25_jax.models import decoder
from k25_jax.models.mla import latents, mla, mla_decode
from k25_jax.models.rope import rope_tables
from k25_jax.sampling.latent_cache import cache_bytes, grow

TEXT = TextConfig(
    vocab_size=53, d_model=22, layers=2, ffn_dim=18, heads=3, q_lora_rank=7, kv_lora_rank=9, qk_nope_dim=5,
    qk_rope_dim=4, v_dim=6, max_length=64, attention_bias=True, moe=MoEConfig(experts=5, top_k=2, ffn_dim=11),
    rope=RopeConfig(theta=1000.0, factor=4.0, original_length=8, yarn=True),
)  # fmt: skip
VARIANTS = {
    "latent queries, biases, yarn": TEXT,
    "plain queries": dataclasses.replace(TEXT, q_lora_rank=0, attention_bias=False, heads=1, rope=RopeConfig()),
    "dense only": dataclasses.replace(TEXT, dense_layers=2, v_dim=3, qk_nope_dim=1),
    "experts only": dataclasses.replace(TEXT, dense_layers=0, layers=1, kv_lora_rank=1, tie_embeddings=True),
}


MLA, MLA_DECODE = jax.jit(lambda *a: mla(*a)[0], static_argnums=4), jax.jit(mla_decode, static_argnums=5)


def text_params(text: TextConfig):
    vision = VisionConfig(layers=1, width=8, heads=1, mlp_dim=4, pos_height=2, pos_width=2)
    return reference.random_params(K25Config(text=text, vision=vision), seed=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_form_is_the_training_form_at_every_position(name):
    text = VARIANTS[name]
    params = text_params(text)
    params = jax.tree.map(lambda a: a[0], params["dense" if text.dense_layers else "moe"]["attention"])
    x_BLD = np.random.default_rng(0).normal(size=(2, 19, text.d_model)).astype(np.float32)
    rope = rope_tables(text.rope, text.qk_rope_dim, np.broadcast_to(np.arange(19), (2, 19)))
    whole_BLD = MLA(params, x_BLD, rope, np.ones((2, 19), np.int32), text)
    cache = jax.jit(latents, static_argnums=3)(params, x_BLD, rope, text)
    assert cache[0].shape == (2, 19, text.kv_lora_rank) and cache[1].shape == (2, 19, text.qk_rope_dim)
    causal_BLS = np.broadcast_to(np.tril(np.ones((19, 19), bool)), (2, 19, 19))
    np.testing.assert_allclose(MLA_DECODE(params, x_BLD, rope, cache, causal_BLS, text), whole_BLD, atol=2e-5)
    for place in (0, 7, 18):  # one token at a time, in a cache with rubbish behind the token
        here = slice(place, place + 1)
        dirty = tuple(np.where(np.arange(19)[None, :, None] <= place, a, np.float32(1e4)) for a in cache)
        out = MLA_DECODE(params, x_BLD[:, here], tuple(t[:, here] for t in rope), dirty, causal_BLS[:, here], text)
        np.testing.assert_allclose(out, whole_BLD[:, here], atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_give_the_states_of_the_whole_pass(name):
    """Rows of different lengths in one batch: each goes on from its own end."""
    text = VARIANTS[name]
    params = text_params(text)
    lengths_B, steps = np.array([9, 4, 1]), 8
    x_BLD = np.random.default_rng(1).normal(size=(3, 9 + steps, text.d_model)).astype(np.float32)
    places_BL = np.broadcast_to(np.arange(9 + steps), (3, 9 + steps))
    whole_BLD, _ = jax.jit(decoder.decode, static_argnums=4)(params, x_BLD, np.ones_like(places_BL), places_BL, text)
    layers = decoder.unstack(params)
    prompts_BL = (places_BL[:, :9] < lengths_B[:, None]).astype(np.int32)
    out_BLD, cache = jax.jit(decoder.prefill, static_argnums=4)(
        layers, x_BLD[:, :9], prompts_BL, places_BL[:, :9], text
    )
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(out_BLD[row, :length], whole_BLD[row, :length], atol=5e-5)
    cache = grow(cache, 9 + steps)
    assert sum(a.nbytes for a in jax.tree.leaves(cache)) == cache_bytes(text, rows=3, slots=9 + steps)
    step = jax.jit(decoder.decode_step, static_argnums=4)
    for i in range(steps):
        places_B = lengths_B + i
        x_B1D = x_BLD[np.arange(3), places_B][:, None]
        out_B1D, cache = step(layers, x_B1D, cache, places_B, text)
        np.testing.assert_allclose(out_B1D[:, 0], whole_BLD[np.arange(3), places_B], atol=5e-5)


def test_segments_of_a_row_do_not_see_each_other():
    params = jax.tree.map(lambda a: a[0], text_params(TEXT)["dense"]["attention"])
    x_BLD = np.random.default_rng(2).normal(size=(1, 20, TEXT.d_model)).astype(np.float32)
    segments_L, positions_L = np.repeat([1, 2, 0], [8, 9, 3]), np.r_[np.arange(8), np.arange(9), np.zeros(3, int)]
    packed_BLD = MLA(params, x_BLD, rope_tables(TEXT.rope, 4, positions_L[None]), segments_L[None], TEXT)
    for segment in (slice(0, 8), slice(8, 17)):
        alone = x_BLD[:, segment]
        rope = rope_tables(TEXT.rope, 4, np.arange(alone.shape[1])[None])
        alone_BLD = MLA(params, alone, rope, np.ones(alone.shape[:2], np.int32), TEXT)
        np.testing.assert_allclose(packed_BLD[:, segment], alone_BLD, atol=2e-5)
