"""Attention over packed sequences: full or causal inside a segment, never across (K2.5 §3.1, §3.2).

`reference_attention` is the definition. `attention` gives the same numbers in blocks of queries, so that scores of
[heads, block, L] are held and never [heads, L, L]; causal blocks skip the keys that come after them.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128
MASKED = -1e30  # finite: a row whose keys are all masked stays finite


def reference_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, *, scale: float, causal: bool):
    """Softmax attention with the whole mask written out. Padding (segment 0) attends to padding."""
    length = q_BLHK.shape[1]
    mask_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
    if causal:
        mask_BLS &= jnp.tril(jnp.ones((length, length), bool))
    return _attend(q_BLHK, k_BLHK, v_BLHK, mask_BLS, scale)


def attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, *, scale: float, causal: bool, block: int = BLOCK):
    """Blocked attention; the backward pass computes each block's scores again instead of storing them."""
    length = q_BLHK.shape[1]
    if length <= block:
        return reference_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, scale=scale, causal=causal)
    step = functools.partial(_query_block, scale=scale, causal=causal)
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        keys = stop if causal else length
        out.append(
            jax.checkpoint(step, static_argnums=())(
                q_BLHK[:, start:stop], k_BLHK[:, :keys], v_BLHK[:, :keys], segments_BL[:, start:stop],
                segments_BL[:, :keys], jnp.arange(start, stop),
            )
        )  # fmt: skip
    return jnp.concatenate(out, axis=1)


def _query_block(q, k, v, q_segments, k_segments, q_index, *, scale, causal):
    mask = q_segments[:, :, None] == k_segments[:, None, :]
    if causal:
        mask &= q_index[:, None] >= jnp.arange(k.shape[1])[None, :]
    return _attend(q, k, v, mask, scale)


def _attend(q_BLHK, k_BSHK, v_BSHK, mask_BLS, scale):
    scores = jnp.einsum("blhk,bshk->bhls", q_BLHK, k_BSHK).astype(jnp.float32) * scale
    scores = jnp.where(mask_BLS[:, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v_BSHK.dtype)
    return jnp.einsum("bhls,bshk->blhk", weights, v_BSHK)
