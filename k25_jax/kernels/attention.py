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


def attention(q_BLHK, k_BSHK, v_BSHK, segments_BS, *, scale: float, causal: bool, block: int = BLOCK, first=0):
    """`reference_attention` in blocks of queries.

    With fewer queries than keys, S = n L, the queries are those of the places first, first + n, first + 2 n, ...: the
    stripe of one device, where a sequence is shared out over n.
    """
    by_head = jax.lax.optimization_barrier(tuple(jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSHK, v_BSHK)))
    out_BHLK, top_H = _blocked(scale, causal, block, *by_head, segments_BS, jnp.asarray(first, jnp.int32))
    return jnp.swapaxes(out_BHLK, 1, 2), top_H


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked(scale, causal, block, q_BHLK, k_BHSK, v_BHSK, segments_BS, first):
    return _forward(scale, causal, block, q_BHLK, k_BHSK, v_BHSK, segments_BS, first)[0]


def _forward(scale, causal, block, q_BHLK, k_BHSK, v_BHSK, segments_BS, first):
    outs, normalisers, tops = [], [], []
    segments_BL = _stripe(segments_BS, q_BHLK.shape[2], first)
    for rows, keys in _blocks(q_BHLK.shape[2], k_BHSK.shape[2], causal, block):
        scores = _scores(q_BHLK, k_BHSK, segments_BS, first, rows, keys, scale, causal)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / total).astype(v_BHSK.dtype)
        outs.append(jnp.einsum("bhls,bhsk->bhlk", weights, v_BHSK[:, :, keys]))
        normalisers.append(top + jnp.log(total))
        tops.append(jnp.where(segments_BL[:, None, rows, None] > 0, top, MASKED).max(axis=(0, 2, 3)))
    kept = jnp.concatenate(outs, axis=2), jnp.concatenate(normalisers, axis=2)
    out_BHLK, normaliser_BHL1 = checkpoint_name(kept, "attention")
    top_H = functools.reduce(jnp.maximum, tops)
    return (out_BHLK, top_H), (q_BHLK, k_BHSK, v_BHSK, segments_BS, first, out_BHLK, normaliser_BHL1)


def _backward(scale, causal, block, saved, gradients):
    dout_BHLK, _ = gradients  # the largest logits are looked at, not learned from
    q_BHLK, k_BHSK, v_BHSK, segments_BS, first, out_BHLK, normaliser_BHL1 = saved
    shift_BHL1 = jnp.sum(dout_BHLK.astype(jnp.float32) * out_BHLK, axis=-1, keepdims=True)
    # Keys and values gather their gradients as [..., K, S], a product that XLA's CPU library does faster.
    q_BHKL, dout_BHKL = jax.lax.optimization_barrier((q_BHLK.swapaxes(2, 3), dout_BHLK.swapaxes(2, 3)))
    dk_BHKS, dv_BHKS = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k_BHSK, v_BHSK))
    dqs = []
    for rows, keys in _blocks(q_BHLK.shape[2], k_BHSK.shape[2], causal, block):
        dout = dout_BHLK[:, :, rows]
        scores = _scores(q_BHLK, k_BHSK, segments_BS, first, rows, keys, scale, causal)
        weights = jnp.exp(scores - normaliser_BHL1[:, :, rows])
        dweights = jnp.einsum("bhlk,bhsk->bhls", dout, v_BHSK[:, :, keys]).astype(jnp.float32)
        dscores = (weights * (dweights - shift_BHL1[:, :, rows]) * scale).astype(dout.dtype)
        weights = weights.astype(dout.dtype)
        dqs.append(jnp.einsum("bhls,bhsk->bhlk", dscores, k_BHSK[:, :, keys]))
        dk_BHKS = dk_BHKS.at[..., keys].add(jnp.einsum("bhkl,bhls->bhks", q_BHKL[..., rows], dscores))
        dv_BHKS = dv_BHKS.at[..., keys].add(jnp.einsum("bhkl,bhls->bhks", dout_BHKL[..., rows], weights))
    dk, dv = dk_BHKS.swapaxes(2, 3).astype(k_BHSK.dtype), dv_BHKS.swapaxes(2, 3).astype(v_BHSK.dtype)
    return jnp.concatenate(dqs, axis=2), dk, dv, None, None


_blocked.defvjp(_forward, _backward)


def _blocks(queries: int, keys: int, causal: bool, block: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block."""
    stops = [min(start + block, queries) for start in range(0, queries, block)]
    stride = keys // queries
    return [(slice(i * block, stop), slice(0, stop * stride if causal else keys)) for i, stop in enumerate(stops)]


def _scores(q_BHLK, k_BHSK, segments_BS, first, rows: slice, keys: slice, scale: float, causal: bool):
    """Scaled scores of one block in float32, MASKED where a query may not look."""
    queries = q_BHLK.shape[2]
    mask = _stripe(segments_BS, queries, first)[:, rows, None] == segments_BS[:, None, keys]
    if causal:
        place_L = first + jnp.arange(rows.start, rows.stop) * (segments_BS.shape[1] // queries)
        mask &= place_L[:, None] >= jnp.arange(keys.stop)[None, :]
    scores = jnp.einsum("bhlk,bhsk->bhls", q_BHLK[:, :, rows], k_BHSK[:, :, keys]).astype(jnp.float32) * scale
    return jnp.where(mask[:, None], scores, MASKED)


def _stripe(a_BS, queries: int, first):
    """The places of the queries."""
    return jax.lax.dynamic_index_in_dim(a_BS.reshape(len(a_BS), queries, -1), first, axis=2, keepdims=False)
