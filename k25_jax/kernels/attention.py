"""Attention over packed sequences: full or causal inside a segment, never across (K2.5 §3.1, §3.2).

`reference_attention` is the definition. `attention` gives the same numbers in blocks of queries, so that scores of
[heads, block, L] are held and never [heads, L, L]; causal blocks skip the keys that come after them. For the backward
pass it keeps the output and one log-normaliser a query, and computes each block's scores again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 256
MASKED = -1e30  # finite: a row whose keys are all masked stays finite


def reference_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, *, scale: float, causal: bool):
    """Softmax attention with the whole mask written out: (out_BLHK, the largest scaled score of each head).

    Padding (segment 0) attends to padding, and its scores are not among the largest.
    """
    length = q_BLHK.shape[1]
    mask_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
    if causal:
        mask_BLS &= jnp.tril(jnp.ones((length, length), bool))
    scores_BHLS = jnp.einsum("blhk,bshk->bhls", q_BLHK, k_BLHK).astype(jnp.float32) * scale
    scores_BHLS = jnp.where(mask_BLS[:, None], scores_BHLS, MASKED)
    weights_BHLS = jax.nn.softmax(scores_BHLS)
    out_BLHK = jnp.einsum("bhls,bshk->blhk", weights_BHLS.astype(v_BLHK.dtype), v_BLHK)
    return out_BLHK, jnp.where(segments_BL[:, None, :, None] > 0, scores_BHLS, MASKED).max(axis=(0, 2, 3))


def attention(
    q_BLHK, k_BLHK, v_BLHK, segments_BL, *, scale: float, causal: bool, block: int = BLOCK, keep_weights: bool = False
):
    """`reference_attention` in blocks of queries.

    `keep_weights` keeps the softmax's weights [B,H,L,S] for the backward pass, which then computes no scores again: a
    fifth fewer FLOPs there, for memory that grows with the square of the length.
    """
    by_head = jax.lax.optimization_barrier(tuple(jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BLHK, v_BLHK)))
    out_BHLK, top_H = _blocked(scale, causal, block, keep_weights, *by_head, segments_BL)
    return jnp.swapaxes(out_BHLK, 1, 2), top_H


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _blocked(scale, causal, block, keep_weights, q_BHLK, k_BHSK, v_BHSK, segments_BL):
    return _forward(scale, causal, block, keep_weights, q_BHLK, k_BHSK, v_BHSK, segments_BL)[0]


def _forward(scale, causal, block, keep_weights, q_BHLK, k_BHSK, v_BHSK, segments_BL):
    outs, normalisers, tops, kept_weights = [], [], [], []
    for rows, keys in _blocks(q_BHLK.shape[2], causal, block):
        scores = _scores(q_BHLK, k_BHSK, segments_BL, rows, keys, scale, causal)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / total).astype(v_BHSK.dtype)
        outs.append(jnp.einsum("bhls,bhsk->bhlk", weights, v_BHSK[:, :, keys]))
        normalisers.append(top + jnp.log(total))
        kept_weights += [weights] if keep_weights else []
        tops.append(jnp.where(segments_BL[:, None, rows, None] > 0, top, MASKED).max(axis=(0, 2, 3)))
    kept = jnp.concatenate(outs, axis=2), jnp.concatenate(normalisers, axis=2)
    out_BHLK, normaliser_BHL1 = checkpoint_name(kept, "attention")
    top_H = functools.reduce(jnp.maximum, tops)
    return (out_BHLK, top_H), (q_BHLK, k_BHSK, v_BHSK, segments_BL, out_BHLK, normaliser_BHL1, kept_weights)


def _backward(scale, causal, block, keep_weights, saved, gradients):
    dout_BHLK, _ = gradients  # the largest logits are looked at, not learned from
    q_BHLK, k_BHSK, v_BHSK, segments_BL, out_BHLK, normaliser_BHL1, kept_weights = saved
    shift_BHL1 = jnp.sum(dout_BHLK.astype(jnp.float32) * out_BHLK, axis=-1, keepdims=True)
    # Keys and values gather their gradients as [..., K, S], a product that XLA's CPU library does faster.
    q_BHKL, dout_BHKL = jax.lax.optimization_barrier((q_BHLK.swapaxes(2, 3), dout_BHLK.swapaxes(2, 3)))
    dk_BHKS, dv_BHKS = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k_BHSK, v_BHSK))
    dqs = []
    for i, (rows, keys) in enumerate(_blocks(q_BHLK.shape[2], causal, block)):
        dout = dout_BHLK[:, :, rows]
        if keep_weights:
            weights = kept_weights[i].astype(jnp.float32)
        else:
            scores = _scores(q_BHLK, k_BHSK, segments_BL, rows, keys, scale, causal)
            weights = jnp.exp(scores - normaliser_BHL1[:, :, rows])
        dweights = jnp.einsum("bhlk,bhsk->bhls", dout, v_BHSK[:, :, keys]).astype(jnp.float32)
        dscores = (weights * (dweights - shift_BHL1[:, :, rows]) * scale).astype(dout.dtype)
        weights = weights.astype(dout.dtype)
        dqs.append(jnp.einsum("bhls,bhsk->bhlk", dscores, k_BHSK[:, :, keys]))
        dk_BHKS = dk_BHKS.at[..., keys].add(jnp.einsum("bhkl,bhls->bhks", q_BHKL[..., rows], dscores))
        dv_BHKS = dv_BHKS.at[..., keys].add(jnp.einsum("bhkl,bhls->bhks", dout_BHKL[..., rows], weights))
    dk, dv = dk_BHKS.swapaxes(2, 3).astype(k_BHSK.dtype), dv_BHKS.swapaxes(2, 3).astype(v_BHSK.dtype)
    return jnp.concatenate(dqs, axis=2), dk, dv, None


_blocked.defvjp(_forward, _backward)


def _blocks(length: int, causal: bool, block: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block."""
    stops = [min(start + block, length) for start in range(0, length, block)]
    return [(slice(i * block, stop), slice(0, stop if causal else length)) for i, stop in enumerate(stops)]


def _scores(q_BHLK, k_BHSK, segments_BL, rows: slice, keys: slice, scale: float, causal: bool):
    """Scaled scores of one block in float32, MASKED where a query may not look."""
    mask = segments_BL[:, rows, None] == segments_BL[:, None, keys]
    if causal:
        mask &= jnp.arange(rows.start, rows.stop)[:, None] >= jnp.arange(keys.stop)[None, :]
    scores = jnp.einsum("bhlk,bhsk->bhls", q_BHLK[:, :, rows], k_BHSK[:, :, keys]).astype(jnp.float32) * scale
    return jnp.where(mask[:, None], scores, MASKED)
