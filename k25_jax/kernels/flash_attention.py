"""Attention as kernels for TPUs (Pallas): scores never leave the chip, blocks that no query may see are skipped.

`kernels/attention.py` chooses it and has the definition. Besides what other flash kernels give, this one gives the largest
logit of each query, which QK-Clip needs (K2.5 §3.1), serves the stripes of a sequence that is shared out, and takes keys and
values of different widths, as MLA has them. Scores stand transposed, [keys, queries]: what belongs to a query is a row then.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k25_jax.sharding.mesh import platform

BLOCK = 512  # queries, and keys, of a block, at most
LANES = 128
MASKED = -1e30  # finite: a row whose keys are all masked stays finite
MOST_QUERIES = 16384  # the backward kernel holds the gradients of all queries of a head on the chip
VMEM = 2**20 * 60  # bytes that a kernel may take there


def suits(queries: int, keys: int) -> bool:
    """Whether the kernels take so many queries and keys."""
    return not (queries % LANES or keys % LANES or queries > MOST_QUERIES)


def flash_forward(q_BHLK, k_BHSK, v_BHSV, segments_BL, segments_BS, first, *, scale: float, causal: bool):
    """(out_BHLV, log-normaliser_BHL1, largest scaled score_BHL1); queries are the places first, first + S / L, ..."""
    (batch, heads, queries, width), keys, value_width = q_BHLK.shape, k_BHSK.shape[2], v_BHSV.shape[3]
    form = _Form(queries, keys, causal)
    out, row = pl.BlockSpec((1, 1, form.q, value_width), form.at_query), pl.BlockSpec((1, 1, 1, form.q), form.row)
    rows = jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32)
    out_BHLV, *statistics = _call(
        functools.partial(_forward_kernel, scale=scale, form=form),
        (batch, heads, form.q_blocks, form.k_blocks),
        [
            pl.BlockSpec((1, 1, form.q, width), form.at_query),
            pl.BlockSpec((1, 1, form.k, width), form.at_key),
            pl.BlockSpec((1, 1, form.k, value_width), form.at_key),
            pl.BlockSpec((1, 1, form.q), lambda b, h, i, j, first: (b, 0, i)),
            pl.BlockSpec((1, form.k, LANES), lambda b, h, i, j, first: (b, form.seen_key(i, j, first), 0)),
        ],
        [out, row, row],
        [jax.ShapeDtypeStruct((batch, heads, queries, value_width), v_BHSV.dtype), rows, rows],
        [(value_width, form.q), (1, form.q), (1, form.q)],
        form.pairs * batch * heads * 2 * (width + value_width),
    )(_scalar(first), q_BHLK, k_BHSK, v_BHSV, segments_BL[:, None], _in_lanes(segments_BS))
    return out_BHLV, *(jnp.swapaxes(a, 2, 3) for a in statistics)


def flash_backward(
    q_BHLK, k_BHSK, v_BHSV, segments_BL, segments_BS, first, normaliser_BHL1, shift_BHL1, dout_BHLV, *, scale, causal
):
    """(dq, dk, dv), from the log-normaliser of each query and `shift`, the sum of its output times its gradient."""
    (batch, heads, queries, width), keys, value_width = q_BHLK.shape, k_BHSK.shape[2], v_BHSV.shape[3]
    form = _Form(queries, keys, causal)

    def swapped(index):  # the grid walks over queries within keys
        return lambda b, h, j, i, first: index(b, h, i, j, first)

    at_query = lambda b, h, i, j, first: (b, h, form.seen_query(i, j, first), 0)  # noqa: E731
    row = pl.BlockSpec((1, 1, 1, form.q), swapped(lambda b, h, i, j, first: (b, h, 0, form.seen_query(i, j, first))))
    at_key = swapped(lambda b, h, i, j, first: (b, h, j, 0))
    key, value = pl.BlockSpec((1, 1, form.k, width), at_key), pl.BlockSpec((1, 1, form.k, value_width), at_key)
    return _call(
        functools.partial(_backward_kernel, scale=scale, form=form),
        (batch, heads, form.k_blocks, form.q_blocks),
        [
            pl.BlockSpec((1, 1, form.q, width), swapped(at_query)),
            key,
            value,
            pl.BlockSpec((1, 1, form.q), swapped(lambda b, h, i, j, first: (b, 0, form.seen_query(i, j, first)))),
            pl.BlockSpec((1, form.k, LANES), swapped(lambda b, h, i, j, first: (b, j, 0))),
            row,
            row,
            pl.BlockSpec((1, 1, form.q, value_width), swapped(at_query)),
        ],
        [pl.BlockSpec((1, 1, queries, width), lambda b, h, j, i, first: (b, h, 0, 0)), key, value],
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_BHLK, k_BHSK, v_BHSV)],
        [(queries, width), (form.k, width), (form.k, value_width)],
        form.pairs * batch * heads * 2 * (3 * width + 2 * value_width),
    )(
        *(_scalar(first), q_BHLK, k_BHSK, v_BHSV, segments_BL[:, None], _in_lanes(segments_BS)),
        *(jnp.swapaxes(a, 2, 3) for a in (normaliser_BHL1, shift_BHL1)),
        dout_BHLV,
    )


# -------------------------------------------------------------------------------------------------------------- kernels
def _forward_kernel(
    first, q, k, v, q_segments, k_segments, out, normaliser, top, acc_VL, top_1L, total_1L, *, scale, form
):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc_VL[...] = jnp.zeros_like(acc_VL)
        top_1L[...] = jnp.full_like(top_1L, MASKED)
        total_1L[...] = jnp.zeros_like(total_1L)

    @pl.when(form.seen(i, j, first))
    def _():
        scores_SL = _scores(q, k, q_segments, k_segments, i, j, first, scale, form)
        new_1L = jnp.maximum(top_1L[...], scores_SL.max(axis=0, keepdims=True))
        weights_SL, before_1L = jnp.exp(scores_SL - new_1L), jnp.exp(top_1L[...] - new_1L)
        total_1L[...] = total_1L[...] * before_1L + weights_SL.sum(axis=0, keepdims=True)
        top_1L[...] = new_1L
        acc_VL[...] = acc_VL[...] * before_1L + _product(v[0, 0], weights_SL.astype(v.dtype), 0, 0)

    @pl.when(j == form.k_blocks - 1)
    def _():
        out[0, 0] = (acc_VL[...] / total_1L[...]).T.astype(out.dtype)
        normaliser[0, 0] = top_1L[...] + jnp.log(total_1L[...])
        top[0, 0] = top_1L[...]


def _backward_kernel(
    first, q, k, v, q_segments, k_segments, normaliser, shift, dout, dq, dk, dv, dq_LK, dk_SK, dv_SV, *, scale, form
):
    j, i = pl.program_id(2), pl.program_id(3)

    @pl.when((i == 0) & (j == 0))
    def _():
        dq_LK[...] = jnp.zeros_like(dq_LK)

    @pl.when(i == 0)
    def _():
        dk_SK[...] = jnp.zeros_like(dk_SK)
        dv_SV[...] = jnp.zeros_like(dv_SV)

    @pl.when(form.seen(i, j, first))
    def _():
        scores_SL = _scores(q, k, q_segments, k_segments, i, j, first, scale, form)
        weights_SL = jnp.exp(scores_SL - normaliser[0, 0])
        dweights_SL = _product(v[0, 0], dout[0, 0], 1, 1)
        dscores_SL = (weights_SL * (dweights_SL - shift[0, 0]) * scale).astype(q.dtype)
        dv_SV[...] += _product(weights_SL.astype(q.dtype), dout[0, 0], 1, 0)
        dk_SK[...] += _product(dscores_SL, q[0, 0], 1, 0)
        mine = pl.ds(pl.multiple_of(i * form.q, form.q), form.q)
        dq_LK[mine] += _product(dscores_SL, k[0, 0], 0, 0)

    @pl.when(i == form.q_blocks - 1)
    def _():
        dk[0, 0] = dk_SK[...].astype(dk.dtype)
        dv[0, 0] = dv_SV[...].astype(dv.dtype)

    @pl.when((i == form.q_blocks - 1) & (j == form.k_blocks - 1))
    def _():
        dq[0, 0] = dq_LK[...].astype(dq.dtype)


def _scores(q, k, q_segments, k_segments, i, j, first, scale, form):
    """Scaled scores [keys, queries] of a block in float32, MASKED where a query may not look."""
    scores_SL = _product(k[0, 0], q[0, 0], 1, 1) * scale
    mask_SL = k_segments[0][:, :1] == q_segments[0]
    if form.causal:
        key_SL = j * form.k + jax.lax.broadcasted_iota(jnp.int32, mask_SL.shape, 0)
        query_SL = i * form.q + jax.lax.broadcasted_iota(jnp.int32, mask_SL.shape, 1)
        mask_SL &= key_SL <= first[0] + query_SL * form.stride
    return jnp.where(mask_SL, scores_SL, MASKED)


def _product(a, b, over_a: int, over_b: int):
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


# --------------------------------------------------------------------------------------------------------------- blocks
class _Form:
    """Which blocks of queries and keys there are, and which see each other."""

    def __init__(self, queries: int, keys: int, causal: bool):
        self.q, self.k = (
            max(n for n in range(LANES, min(size, BLOCK) + 1, LANES) if not size % n) for size in (queries, keys)
        )
        self.q_blocks, self.k_blocks = queries // self.q, keys // self.k
        self.stride, self.causal = keys // queries, causal
        seen = sum(int(self.seen(i, j, (0,))) for i in range(self.q_blocks) for j in range(self.k_blocks))
        self.pairs = seen * self.q * self.k

    def _last_place(self, i, first):
        return first[0] + ((i + 1) * self.q - 1) * self.stride

    def seen(self, i, j, first):
        """Whether a query of block i may see a key of block j."""
        return not self.causal or j * self.k <= self._last_place(i, first)

    def seen_key(self, i, j, first):
        """Block j, or the last one that block i sees: nothing is fetched for a block that is skipped."""
        return jnp.minimum(j, self._last_place(i, first) // self.k) if self.causal else j

    def seen_query(self, i, j, first):
        """Block i, or the first one that sees block j."""
        if not self.causal:
            return i
        place = jnp.maximum(j * self.k - first[0], 0)
        return jnp.minimum(jnp.maximum(i, (place + self.stride - 1) // self.stride // self.q), self.q_blocks - 1)

    def at_query(self, b, h, i, j, first):
        return b, h, i, 0

    def at_key(self, b, h, i, j, first):
        return b, h, self.seen_key(i, j, first), 0

    def row(self, b, h, i, j, first):
        return b, h, 0, i


def _call(kernel, grid, in_specs, out_specs, out_shape, scratch, flops: int):
    """The kernel over its grid, whose last axis of the forward pass, last two of the backward pass, goes in order."""
    from jax.experimental.pallas import tpu as pltpu  # importable only where Pallas knows TPUs

    memory = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(1, grid, in_specs, out_specs, memory),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
        interpret=platform() != "tpu",
    )


def _scalar(first):
    return jnp.asarray(first, jnp.int32).reshape(1)


def _in_lanes(segments_BS):
    """One number a row of lanes, as a kernel wants what belongs to a key."""
    return jnp.broadcast_to(segments_BS[..., None], (*segments_BS.shape, LANES))
