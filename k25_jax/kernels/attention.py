"""Attention over packed sequences: full or causal inside a segment, never across (K2.5 §3.1, §3.2).

`reference_attention` is the definition. `attention` gives the same numbers in blocks of queries, so that scores of
[heads, block, L] are held and never [heads, L, L]; causal blocks skip keys that come after them. For the backward
pass it keeps the output and one log-normaliser a query, and computes each block's scores again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from k25_jax.kernels.flash_attention import flash_backward, flash_forward, suits
from k25_jax.sharding.mesh import on_own_device, platform

BLOCK = 256
GROUPS = 16  # of blocks, each group with all the keys that its last query may see
MASKED = -1e30  # finite: a row whose keys are all masked stays finite


def reference_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, *, scale: float, causal: bool):
    """Softmax attention with the whole mask written out: (out_BLHK, the largest scaled score of each head).

    Padding (segment 0) attends to padding, and its scores are not among the largest.
    """
    length = q_BLHK.shape[1]
    mask_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
    if causal:
        mask_BLS &= jnp.tril(jnp.ones((length, length), bool))
    scores_BHLS = jnp.einsum("blhk,bshk->bhls", q_BLHK, k_BLHK, preferred_element_type=jnp.float32) * scale
    scores_BHLS = jnp.where(mask_BLS[:, None], scores_BHLS, MASKED)
    weights_BHLS = jax.nn.softmax(scores_BHLS)
    out_BLHK = jnp.einsum("bhls,bshk->blhk", weights_BHLS.astype(v_BLHK.dtype), v_BLHK)
    return out_BLHK, jnp.where(segments_BL[:, None, :, None] > 0, scores_BHLS, MASKED).max(axis=(0, 2, 3))


def attention(
    q_BLHK,
    k_BSHK,
    v_BSHK,
    segments_BS,
    *,
    scale: float,
    causal: bool,
    block: int = BLOCK,
    first=0,
    keep_weights: bool = False,
    implementation: str = "auto",
):
    """`reference_attention` in blocks of queries.

    With fewer queries than keys, S = n L, the queries are those of the places first, first + n, first + 2 n, ...: the
    stripe of one device, where a sequence is shared out over n.

    `keep_weights` keeps the softmax's weights [B,H,L,S] for the backward pass, which then computes no scores again: a
    fifth fewer FLOPs there, for memory that grows with the square of the length.

    `implementation` is "blocked", which is plain XLA; "flash", the kernels for TPUs (elsewhere interpreted, which is slow),
    which keep no weights; or "auto", these on a TPU for lengths that they take, unless weights are to be kept or the
    compiler is to share out the work.
    """
    by_head = jax.lax.optimization_barrier(tuple(jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSHK, v_BSHK)))
    if implementation == "auto":
        flash = platform() == "tpu" and on_own_device() and suits(q_BLHK.shape[1], k_BSHK.shape[1])
        implementation = "flash" if flash and not keep_weights else "blocked"
    form = scale, causal, block, keep_weights, implementation == "flash"
    out_BHLK, top_H = _attention(*form, *by_head, segments_BS, jnp.asarray(first, jnp.int32))
    return jnp.swapaxes(out_BHLK, 1, 2), top_H


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _attention(scale, causal, block, keep_weights, flash, q_BHLK, k_BHSK, v_BHSK, segments_BS, first):
    return _forward(scale, causal, block, keep_weights, flash, q_BHLK, k_BHSK, v_BHSK, segments_BS, first)[0]


def _forward(scale, causal, block, keep_weights, flash, q_BHLK, k_BHSK, v_BHSK, segments_BS, first):
    segments_BL, kept_weights = _stripe(segments_BS, q_BHLK.shape[2], first), []
    arguments = q_BHLK, k_BHSK, v_BHSK, segments_BL, segments_BS, first
    if flash:
        *kept, top_BHL1 = flash_forward(*arguments, scale=scale, causal=causal)
        top_H = jnp.where(segments_BL[:, None, :, None] > 0, top_BHL1, MASKED).max(axis=(0, 2, 3))
    else:
        kept, top_H, kept_weights = _blocked_forward(*arguments, scale, causal, block, keep_weights)
    out_BHLK, normaliser_BHL1 = checkpoint_name(tuple(kept), "attention")
    return (out_BHLK, top_H), (q_BHLK, k_BHSK, v_BHSK, segments_BS, first, out_BHLK, normaliser_BHL1, kept_weights)


def _blocked_forward(q_BHLK, k_BHSK, v_BHSK, segments_BL, segments_BS, first, scale, causal, block, keep_weights):
    """((out_BHLK, log-normaliser_BHL1), the largest logit of each head, the weights of each group or None)."""
    outs, normalisers, tops, kept_weights = [], [], [], []
    for start, size, count, keys in _groups(q_BHLK.shape[2], k_BHSK.shape[2], causal, block):
        k_BHsK, v_BHsK = k_BHSK[:, :, :keys], v_BHSK[:, :, :keys]

        def one(_, piece, at=start, size=size, k=k_BHsK, v=v_BHsK):
            at = at + piece[0] * size
            scores = _scores(_cut(q_BHLK, at, size), k, segments_BL, segments_BS, first, at, scale, causal)
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            weights = (weights / total).astype(v.dtype)
            seen = jnp.where(_cut(segments_BL[:, None], at, size)[..., None] > 0, top, MASKED).max(axis=(0, 2, 3))
            kept = weights if keep_weights else None
            return None, (jnp.einsum("bhls,bhsk->bhlk", weights, v), top + jnp.log(total), seen, kept)

        _, (out, normaliser, top_NH, kept) = _scan(one, None, count)
        kept_weights.append(kept)
        outs.append(_in_line(out))
        normalisers.append(_in_line(normaliser))
        tops.append(top_NH.max(axis=0))
    kept = jnp.concatenate(outs, axis=2), jnp.concatenate(normalisers, axis=2)
    return kept, functools.reduce(jnp.maximum, tops), kept_weights


def _backward(scale, causal, block, keep_weights, flash, saved, gradients):
    dout_BHLK, _ = gradients  # the largest logits are looked at, not learned from
    q_BHLK, k_BHSK, v_BHSK, segments_BS, first, out_BHLK, normaliser_BHL1, kept_weights = saved
    segments_BL = _stripe(segments_BS, q_BHLK.shape[2], first)
    shift_BHL1 = jnp.sum(dout_BHLK.astype(jnp.float32) * out_BHLK, axis=-1, keepdims=True)
    arguments = q_BHLK, k_BHSK, v_BHSK, segments_BL, segments_BS, first, normaliser_BHL1, shift_BHL1, dout_BHLK
    if flash:
        return *flash_backward(*arguments, scale=scale, causal=causal), None, None
    return *_blocked_backward(*arguments, kept_weights, scale, causal, block), None, None


def _blocked_backward(
    q_BHLK, k_BHSK, v_BHSK, segments_BL, segments_BS, first, normaliser_BHL1, shift_BHL1, dout_BHLK,
    kept_weights, scale, causal, block,
):  # fmt: skip
    """(dq, dk, dv)."""
    # Keys and values gather their gradients as [..., K, S], a product that XLA's CPU library does faster.
    q_BHKL, dout_BHKL = jax.lax.optimization_barrier((q_BHLK.swapaxes(2, 3), dout_BHLK.swapaxes(2, 3)))
    dk_BHKS, dv_BHKS = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k_BHSK, v_BHSK))
    dqs, groups = [], _groups(q_BHLK.shape[2], k_BHSK.shape[2], causal, block)
    for (start, size, count, keys), kept in zip(groups, kept_weights, strict=True):
        k_BHsK, v_BHsK = k_BHSK[:, :, :keys], v_BHSK[:, :, :keys]

        def one(carry, piece, at=start, size=size, keys=keys, k=k_BHsK, v=v_BHsK):
            (dk_BHKS, dv_BHKS), (i, weights) = carry, piece
            at = at + i * size
            q, dout, shift, normaliser = (_cut(a, at, size) for a in (q_BHLK, dout_BHLK, shift_BHL1, normaliser_BHL1))
            if weights is None:
                weights = jnp.exp(_scores(q, k, segments_BL, segments_BS, first, at, scale, causal) - normaliser)
            dweights = jnp.einsum("bhlk,bhsk->bhls", dout, v, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - shift) * scale).astype(dout.dtype)
            weights = weights.astype(dout.dtype)
            q_BHKl, dout_BHKl = (_cut(a, at, size, axis=3) for a in (q_BHKL, dout_BHKL))
            add_up = functools.partial(jnp.einsum, "bhkl,bhls->bhks", preferred_element_type=jnp.float32)
            dk_BHKS = dk_BHKS.at[..., :keys].add(add_up(q_BHKl, dscores))
            dv_BHKS = dv_BHKS.at[..., :keys].add(add_up(dout_BHKl, weights))
            return (dk_BHKS, dv_BHKS), jnp.einsum("bhls,bhsk->bhlk", dscores, k)

        (dk_BHKS, dv_BHKS), dq = _scan(one, (dk_BHKS, dv_BHKS), count, kept)
        dqs.append(_in_line(dq))
    dk, dv = dk_BHKS.swapaxes(2, 3).astype(k_BHSK.dtype), dv_BHKS.swapaxes(2, 3).astype(v_BHSK.dtype)
    return jnp.concatenate(dqs, axis=2), dk, dv


_attention.defvjp(_forward, _backward)


def _groups(queries: int, keys: int, causal: bool, block: int) -> list[tuple[int, int, int, int]]:
    """(first query, queries of a block, blocks, keys before which all of them end) of each group of blocks.

    The program has a piece for each group. Where all queries may see all keys one group has all whole blocks; causal groups
    are about GROUPS, of one block if they suffice.
    """
    stride, full = keys // queries, queries // block
    blocks = max(1, -(-full // GROUPS) if causal else full)
    groups = [(i * block, block, min(blocks, full - i)) for i in range(0, full, blocks)]
    if queries % block:
        groups.append((full * block, queries % block, 1))
    return [(at, size, count, (at + size * count) * stride if causal else keys) for at, size, count in groups]


def _scan(one, carry, count: int, kept=None):
    """`one(carry, (i, what is kept of it))` for each block of a group; a single one stands in the program as it is."""
    if count > 1:
        return jax.lax.scan(one, carry, (jnp.arange(count), kept))
    carry, out = one(carry, (0, None if kept is None else kept[0]))
    return carry, jax.tree.map(lambda a: a[None], out)


def _in_line(a_NBHLK):
    """The queries of all blocks of a group in one axis."""
    blocks, rows, heads, queries, width = a_NBHLK.shape
    return jnp.moveaxis(a_NBHLK, 0, 2).reshape(rows, heads, blocks * queries, width)


def _cut(a, at, size: int, axis: int = 2):
    return jax.lax.dynamic_slice_in_dim(a, at, size, axis)


def _scores(q_BHLK, k_BHSK, segments_BL, segments_BS, first, at, scale: float, causal: bool):
    """Scaled scores in float32 of the queries from number `at` on, MASKED where a query may not look."""
    queries, keys = q_BHLK.shape[2], k_BHSK.shape[2]
    mask = _cut(segments_BL, at, queries, axis=1)[:, :, None] == segments_BS[:, None, :keys]
    if causal:
        place_L = first + (at + jnp.arange(queries)) * (segments_BS.shape[1] // segments_BL.shape[1])
        mask &= place_L[:, None] >= jnp.arange(keys)[None, :]
    scores = jnp.einsum("bhlk,bhsk->bhls", q_BHLK, k_BHSK, preferred_element_type=jnp.float32) * scale
    return jnp.where(mask[:, None], scores, MASKED)


def _stripe(a_BS, queries: int, first):
    """The places of the queries."""
    return jax.lax.dynamic_index_in_dim(a_BS.reshape(len(a_BS), queries, -1), first, axis=2, keepdims=False)
