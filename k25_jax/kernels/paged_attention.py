"""Attention of new tokens to latents that lie in pages: MLA's decoding form, keys and values never expanded (K2.5 §3.1).

`reference_paged_attention` is the definition. `paged_attention` walks over blocks of pages, as many as the longest row
has, with a running maximum: its cost follows the tokens that are there, under one program for every length. A chunk of a
prompt passes through the latents too. Expanding keys and values would take fewer products only for chunks longer than
R (nope + v) / (2 R - nope - v) tokens: 128 for the preset 100m, 171 for K2.5.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

KEYS = 128  # places of a block, about
MASKED = -1e30  # finite: a row without tokens stays finite

# Scores and sums are float32 whatever the inputs are: at logits of 100 bfloat16 is off by half a unit.
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def reference_paged_attention(q_BLHR, q_BLHK, c_QOR, r_QOK, tables_BW, positions_BL, scale: float):
    """Latents weighted by the softmax of their scores: [B,L,H,R].

    Token (b, l) stands at place positions_BL[b, l] of its row, -1 where there is none, and sees the places up to its own.
    Place s of row b is place s % O of page tables_BW[b, s // O]. A query has a part for the latent and a rotary part.
    """
    c_BSR, r_BSK = (rearrange(pool[tables_BW], "b w o r -> b (w o) r") for pool in (c_QOR, r_QOK))
    scores = _product("blhr,bsr->blhs", q_BLHR, c_BSR) + _product("blhk,bsk->blhs", q_BLHK, r_BSK)
    seen_BLS = jnp.arange(c_BSR.shape[1]) <= positions_BL[..., None]
    weights = jax.nn.softmax(jnp.where(seen_BLS[:, :, None], scores * scale, MASKED))
    return _product("blhs,bsr->blhr", weights.astype(c_BSR.dtype), c_BSR).astype(q_BLHR.dtype)


def paged_attention(q_BLHR, q_BLHK, c_QOR, r_QOK, tables_BW, positions_BL, scale: float):
    """`reference_paged_attention`, a block of pages at a time; tokens that are not there get no defined result."""
    size, heads = c_QOR.shape[1], q_BLHR.shape[2]
    pages = min(max(1, KEYS // size), tables_BW.shape[1])
    tables_BW = jnp.pad(tables_BW, ((0, 0), (0, -tables_BW.shape[1] % pages)))
    q_BNR, q_BNK = (rearrange(q, "b l h r -> b (l h) r") for q in (q_BLHR, q_BLHK))
    position_BN1 = jnp.repeat(positions_BL, heads, axis=1)[..., None]
    end_B11 = positions_BL.max(axis=1)[:, None, None]

    def block(i, carry):
        top_BN1, total_BN1, out_BNR = carry
        table_BW = jax.lax.dynamic_slice_in_dim(tables_BW, i * pages, pages, axis=1)
        c_BSR, r_BSK = (rearrange(pool[table_BW], "b w o r -> b (w o) r") for pool in (c_QOR, r_QOK))
        place_S = i * pages * size + jnp.arange(pages * size)
        c_BSR = jnp.where(place_S[:, None] <= end_B11, c_BSR, 0)  # what others left there may not be finite
        scores = _product("bnr,bsr->bns", q_BNR, c_BSR) + _product("bnk,bsk->bns", q_BNK, r_BSK)
        scores = jnp.where(place_S <= position_BN1, scores * scale, MASKED)
        new_BN1 = jnp.maximum(top_BN1, scores.max(axis=-1, keepdims=True))
        shrunk_BN1, weights = jnp.exp(top_BN1 - new_BN1), jnp.exp(scores - new_BN1)
        added_BNR = _product("bns,bsr->bnr", weights.astype(c_BSR.dtype), c_BSR)
        total_BN1 = total_BN1 * shrunk_BN1 + weights.sum(axis=-1, keepdims=True)
        return new_BN1, total_BN1, out_BNR * shrunk_BN1 + added_BNR

    blocks = positions_BL.max() // (pages * size) + 1
    one = jnp.ones_like(position_BN1, jnp.float32)
    start = MASKED * one, 0 * one, jnp.zeros(q_BNR.shape, jnp.float32)
    _, total_BN1, out_BNR = jax.lax.fori_loop(0, blocks, block, start)
    out_BNR = (out_BNR / jnp.maximum(total_BN1, 1e-30)).astype(q_BLHR.dtype)
    return out_BNR.reshape(q_BLHR.shape)
