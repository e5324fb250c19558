"""Routed experts over rows sorted by expert: each row through its own expert's matrices (K2.5 §3.1, dropless MoE).

`reference_grouped_matmul` is the definition of one product, `expert_swiglu` the whole feed-forward. `blocked` runs
anywhere in plain XLA and costs what the rows cost: it walks over the experts that have rows, a block of rows at a time,
through all three matrices. `megablox` is JAX's Pallas kernel for TPU, `triton` ours for GPUs (grouped_triton.py). `ragged`
is XLA's `ragged_dot`, kept for comparison: on CPU and GPU it multiplies every row with every expert.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from k25_jax.sharding.mesh import on_own_device, platform

KERNELS = {"tpu": "megablox", "gpu": "triton"}  # what `auto` means, by platform; elsewhere `blocked`

# Of the TPU kernel. It takes rows in whole tiles, and one that lies on a border between experts twice: tiles are small. Of
# a matrix it holds a large part, twice over, in a cache of 16 MB.
TILE, LANES = 128, 128
MATRIX_TILE = 2**21  # entries
SIDE = 1024  # of a tile of a gradient of a matrix
BLOCKS = (256, 64)  # rows that are multiplied at once, outside of it: fast, and little waste on an expert's last rows
FEW, SMALL = 16, 8  # with fewer rows an expert than FEW, as in decoding, blocks are small


@jax.named_scope("moe.experts")
def expert_swiglu(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E, implementation: str = "auto"):
    """SwiGLU [N,D] -> [N,D]; the first sizes_E[0] rows pass through expert 0, and so on.

    Rows beyond sum(sizes_E) have no defined result: give them no weight.
    """
    if implementation == "auto":
        implementation = KERNELS.get(platform(), "blocked") if on_own_device() else "blocked"
    if implementation == "blocked":
        return blocked_swiglu(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E)
    gate_NF = grouped_matmul(x_ND, gate_EDF, sizes_E, implementation)
    up_NF = grouped_matmul(x_ND, up_EDF, sizes_E, implementation)
    return grouped_matmul(jax.nn.silu(gate_NF) * up_NF, down_EFD, sizes_E, implementation)


def grouped_matmul(x_ND, w_EDF, sizes_E, implementation: str):
    """One product, [N,D] x [E,D,F] -> [N,F]."""
    if implementation == "ragged":
        return jax.lax.ragged_dot(x_ND, w_EDF, sizes_E.astype(jnp.int32))
    if implementation == "triton":
        from k25_jax.kernels.grouped_triton import grouped_triton  # JAX may drop what it imports: jax 0.11 says so

        return grouped_triton(x_ND, w_EDF, sizes_E)
    if implementation == "megablox":
        tiles_ND = jnp.pad(x_ND, ((0, -x_ND.shape[0] % TILE), (0, 0)))
        return megablox(tiles_ND, w_EDF, sizes_E.astype(jnp.int32))[: x_ND.shape[0]]
    if implementation == "reference":
        return reference_grouped_matmul(x_ND, w_EDF, sizes_E)
    raise ValueError(
        f"moe.grouped_matmul={implementation!r} is none of auto, blocked, megablox, triton, ragged, reference"
    )


def reference_grouped_matmul(x_ND, w_EDF, sizes_E):
    """Dense one-hot form: every row through every expert, then a choice."""
    ends_E = jnp.cumsum(sizes_E)
    owner_N = jnp.searchsorted(ends_E, jnp.arange(x_ND.shape[0]), side="right")
    one_hot_NE = jax.nn.one_hot(owner_N, w_EDF.shape[0], dtype=x_ND.dtype)
    return jnp.einsum("nd,edf,ne->nf", x_ND, w_EDF, one_hot_NE)


# ------------------------------------------------------------------------------------------------------------- megablox
@jax.custom_vjp
def megablox(x_ND, w_EDF, sizes_E):
    """JAX's TPU kernel with tiles of our choice; N is a multiple of TILE. Rows beyond sum(sizes_E) hold anything."""
    return _gmm(x_ND, w_EDF, sizes_E, transposed=False)


def _megablox_backward(saved, dy_NF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # importable only where Pallas knows TPUs

    x_ND, w_EDF, sizes_E = saved
    dx_ND = _gmm(dy_NF, w_EDF, sizes_E, transposed=True)
    tiling = TILE, _largest_tile(x_ND.shape[1], SIDE), _largest_tile(dy_NF.shape[1], SIDE)
    return dx_ND, tgmm(x_ND.swapaxes(0, 1), dy_NF, sizes_E, w_EDF.dtype, tiling), None


megablox.defvjp(lambda x, w, sizes: (megablox(x, w, sizes), (x, w, sizes)), _megablox_backward)


def _gmm(x_NK, w, sizes_E, transposed: bool):
    """[N,K] by [E,K,M], or by [E,M,K] transposed. All of K in one tile: a matrix then stays for all rows of its expert."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    inner, outer = x_NK.shape[1], w.shape[1 if transposed else 2]
    tile_k = _largest_tile(inner, 2 * MATRIX_TILE // LANES)
    tiling = TILE, tile_k, _largest_tile(outer, max(MATRIX_TILE // tile_k, LANES))
    return gmm(x_NK, w, sizes_E, x_NK.dtype, tiling, transpose_rhs=transposed)


def _largest_tile(size: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides `size` rounded up to one: no tile is partly empty."""
    blocks = -(-size // LANES)
    return LANES * max(n for n in range(1, blocks + 1) if not blocks % n and (n == 1 or n * LANES <= most))


# -------------------------------------------------------------------------------------------------------------- blocked
@jax.custom_vjp
def blocked_swiglu(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E):
    """The blocked form, all three products of a block together; rows beyond sum(sizes_E) come out zero."""
    return _forward(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E)[0]


def _forward(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E):
    sizes = _block_sizes(len(x_ND), len(sizes_E))

    def one_expert(expert, start, rows, carry):
        gate_DF, up_DF, down_FD = (_at(w, expert) for w in (gate_EDF, up_EDF, down_EFD))

        def one_block(at, mine_B1, carry):
            x_BD = _rows(x_ND, at, len(mine_B1))
            gate_BF, up_BF = x_BD @ gate_DF, x_BD @ up_DF
            results = (jax.nn.silu(gate_BF) * up_BF) @ down_FD, gate_BF, up_BF
            return tuple(_put(all_rows, new, at, mine_B1) for all_rows, new in zip(carry, results, strict=True))

        return _over_blocks(x_ND.shape[0], sizes, start, rows, one_block, carry)

    hidden_NF = jnp.zeros((x_ND.shape[0], gate_EDF.shape[2]), x_ND.dtype)
    results = _over_experts(sizes_E, one_expert, (jnp.zeros_like(x_ND), hidden_NF, hidden_NF))
    y_ND, gate_NF, up_NF = checkpoint_name(results, "experts")
    return y_ND, (x_ND, gate_EDF, up_EDF, down_EFD, sizes_E, gate_NF, up_NF)


def _backward(saved, dy_ND):
    x_ND, gate_EDF, up_EDF, down_EFD, sizes_E, gate_NF, up_NF = saved
    sizes = _block_sizes(len(x_ND), len(sizes_E))

    def one_expert(expert, start, rows, carry):
        dx_ND, *dweights = carry
        weights = [_at(w, expert) for w in (gate_EDF, up_EDF, down_EFD)]

        def one_block(at, mine_B1, carry):
            dx_ND, *sums = carry
            x_BD, dy_BD, gate_BF, up_BF = (_rows(a, at, len(mine_B1)) for a in (x_ND, dy_ND, gate_NF, up_NF))
            dx_BD, terms = _block_gradients(x_BD, dy_BD, gate_BF, up_BF, mine_B1, weights)
            return _put(dx_ND, dx_BD, at, mine_B1), *(a + b for a, b in zip(sums, terms, strict=True))

        zeros = [jnp.zeros(w.shape, jnp.float32) for w in weights]
        dx_ND, *sums = _over_blocks(x_ND.shape[0], sizes, start, rows, one_block, (dx_ND, *zeros))
        dweights = [
            jax.lax.dynamic_update_index_in_dim(a, s.astype(a.dtype), expert, 0)
            for a, s in zip(dweights, sums, strict=True)
        ]
        return dx_ND, *dweights

    init = (jnp.zeros_like(x_ND), *(jnp.zeros_like(w) for w in (gate_EDF, up_EDF, down_EFD)))
    return *_over_experts(sizes_E, one_expert, init), None


blocked_swiglu.defvjp(_forward, _backward)


def _block_gradients(x_BD, dy_BD, gate_BF, up_BF, mine_B1, weights):
    """(dx_BD, gradients of the three matrices) of one block; rows of other experts add nothing to a matrix."""
    gate_DF, up_DF, down_FD = weights
    sigmoid_BF = jax.nn.sigmoid(gate_BF)
    hidden_BF = gate_BF * sigmoid_BF
    dhidden_BF = _times_transposed(dy_BD, down_FD)
    dup_BF = jnp.where(mine_B1, dhidden_BF * hidden_BF, 0)
    dgate_BF = jnp.where(mine_B1, dhidden_BF * up_BF * (sigmoid_BF + hidden_BF * (1 - sigmoid_BF)), 0)
    dx_BD = _times_transposed(dgate_BF, gate_DF) + _times_transposed(dup_BF, up_DF)
    ddown_FD = _transposed_times(jnp.where(mine_B1, hidden_BF * up_BF, 0), dy_BD)
    return dx_BD, (_transposed_times(x_BD, dgate_BF), _transposed_times(x_BD, dup_BF), ddown_FD)


def _over_experts(sizes_E, body, init):
    """Fold body(expert, first row, rows, carry) over the experts that have rows, in order."""
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    order_E = jnp.argsort(sizes_E == 0, stable=True)

    def one(i, carry):
        expert = order_E[i]
        return body(expert, starts_E[expert], sizes_E[expert], carry)

    return jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), one, init)


def _over_blocks(total, sizes, start, rows, body, init):
    """Fold body(first row, mine_B1, carry) over the blocks that cover rows [start, start + rows), large ones first.

    A block that would run past the last of `total` rows begins earlier; `mine_B1` marks the rows not yet done.
    """
    stop, carry = start + rows, init
    for size in sizes:
        blocks = (rows + (size - 1 if size == sizes[-1] else 0)) // size

        def one(i, carry, start=start, size=size):
            first = start + i * size
            at = jnp.minimum(first, total - size)
            index_B = at + jnp.arange(size)
            return body(at, ((index_B >= first) & (index_B < stop))[:, None], carry)

        carry = jax.lax.fori_loop(0, blocks, one, carry)
        start, rows = start + blocks * size, rows - blocks * size
    return carry


def _block_sizes(total: int, experts: int) -> list[int]:
    """Rows of the blocks, the largest first.

    At least 64 where there are as many: XLA's CPU products then give a row the same bits whatever the size, so that a
    document does not feel its neighbours. When decoding there are few rows, and a large block would be mostly empty.
    """
    if total < FEW * experts:
        return [min(total, SMALL)]
    return [size for size in BLOCKS if size <= total] or [min(total, SMALL)]


def _at(w_EDF, expert):
    return jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)


def _rows(x_ND, at, block: int):
    return jax.lax.dynamic_slice_in_dim(x_ND, at, block)


def _put(out_ND, new_BD, at, mine_B1):
    """Write the rows of a block that are its own."""
    old_BD = _rows(out_ND, at, new_BD.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out_ND, jnp.where(mine_B1, new_BD, old_BD), at, 0)


def _times_transposed(x_BF, w_DF):
    return jax.lax.dot_general(x_BF, w_DF, (((1,), (1,)), ((), ())))


def _transposed_times(x_BD, y_BF):
    return jax.lax.dot_general(x_BD, y_BF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


# --------------------------------------------------------------------------------------------------------- to and back
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def copy_rows(copies: int, x_TD, order_N, inverse_N, used):
    """`copies` of each token, sorted: row n is token order[n] // copies; rows from `used` on are padding, and zero.

    The gradient gathers a token's copies by `inverse_N` and adds them up, instead of a scatter.
    """
    return _first_rows(x_TD[order_N // copies], used)


def _copy_forward(copies, x_TD, order_N, inverse_N, used):
    return copy_rows(copies, x_TD, order_N, inverse_N, used), (inverse_N, used)


def _copy_backward(copies, saved, dy_ND):
    inverse_N, used = saved
    dy_ND = _first_rows(dy_ND, used)  # of padding, a kernel may leave any gradient
    rows_KT = inverse_N.reshape(-1, copies).T
    return sum(dy_ND[rows_T].astype(jnp.float32) for rows_T in rows_KT).astype(dy_ND.dtype), None, None, None


copy_rows.defvjp(_copy_forward, _copy_backward)


def _first_rows(x_ND, count):
    return jnp.where(jnp.arange(x_ND.shape[0])[:, None] < count, x_ND, 0)


@jax.custom_vjp
def permute_rows(x_ND, order_N, inverse_N):
    """x[order], whose gradient is a gather by the inverse instead of a scatter."""
    return x_ND[order_N]


permute_rows.defvjp(
    lambda x, order, inverse: (x[order], (inverse,)),
    lambda saved, dy: (dy[saved[0]], None, None),
)
