"""Grouped matmul: rows sorted by expert times each expert's own matrix (K2.5 §3.1, dropless MoE).

`reference_grouped_matmul` is the definition. `blocked` runs anywhere in plain XLA and costs what the rows cost: it
walks over the experts that have rows, in blocks of rows. `megablox` is JAX's Pallas kernel for TPU. `ragged` is XLA's
`ragged_dot`, kept for comparison: on CPU and GPU it multiplies every row with every expert.
"""

import jax
import jax.numpy as jnp

BLOCK = 64  # rows; one size for all, as a row's last bit depends on the shape of the product that it is part of
TILE = 128  # the TPU kernel takes rows in whole tiles


def grouped_matmul(x_ND, w_EDF, sizes_E, implementation: str = "auto"):
    """[N,D] x [E,D,F] -> [N,F]; the first sizes_E[0] rows belong to expert 0, and so on.

    Rows beyond sum(sizes_E) have no defined result: give them no weight.
    """
    if implementation == "auto":
        implementation = "megablox" if jax.default_backend() == "tpu" else "blocked"
    if implementation == "blocked":
        return blocked_grouped_matmul(x_ND, w_EDF, sizes_E)
    if implementation == "ragged":
        return jax.lax.ragged_dot(x_ND, w_EDF, sizes_E.astype(jnp.int32))
    if implementation == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox import gmm  # importable only where Pallas knows TPUs

        tiles_ND = jnp.pad(x_ND, ((0, -x_ND.shape[0] % TILE), (0, 0)))
        out_NF = gmm(tiles_ND, w_EDF, sizes_E.astype(jnp.int32), preferred_element_type=x_ND.dtype)
        return out_NF[: x_ND.shape[0]]
    if implementation == "reference":
        return reference_grouped_matmul(x_ND, w_EDF, sizes_E)
    raise ValueError(f"moe.grouped_matmul={implementation!r} is none of auto, blocked, megablox, ragged, reference")


def reference_grouped_matmul(x_ND, w_EDF, sizes_E):
    """Dense one-hot form: every row through every expert, then a choice."""
    ends_E = jnp.cumsum(sizes_E)
    owner_N = jnp.searchsorted(ends_E, jnp.arange(x_ND.shape[0]), side="right")
    one_hot_NE = jax.nn.one_hot(owner_N, w_EDF.shape[0], dtype=x_ND.dtype)
    return jnp.einsum("nd,edf,ne->nf", x_ND, w_EDF, one_hot_NE)


@jax.custom_vjp
def blocked_grouped_matmul(x_ND, w_EDF, sizes_E):
    """The blocked form; an expert's last block is at most partly filled."""
    return _rows_times_experts(x_ND, w_EDF, sizes_E, transpose=False)


def _forward(x_ND, w_EDF, sizes_E):
    return blocked_grouped_matmul(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _backward(saved, dy_NF):
    x_ND, w_EDF, sizes_E = saved
    dx_ND = _rows_times_experts(dy_NF, w_EDF, sizes_E, transpose=True)
    dw_EDF = _rows_times_rows(x_ND, dy_NF, sizes_E)
    return dx_ND, dw_EDF, None


blocked_grouped_matmul.defvjp(_forward, _backward)


def _over_experts(sizes_E, body, init):
    """Fold body(expert, first row, rows, carry) over the experts that have rows, in order."""
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    order_E = jnp.argsort(sizes_E == 0, stable=True)

    def one(i, carry):
        expert = order_E[i]
        return body(expert, starts_E[expert], sizes_E[expert], carry)

    return jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), one, init)


def _over_blocks(block, start, rows, body, init):
    """Fold body(first row, carry) over the blocks that cover rows [start, start + rows)."""
    count = (rows + block - 1) // block
    return jax.lax.fori_loop(0, count, lambda i, carry: body(start + i * block, carry), init)


def _block(rows: int) -> int:
    """Rows of a block, given the rows in all: when decoding there are few, and a large block would be mostly empty."""
    return BLOCK if rows >= BLOCK else 8


def _padded(x_ND, block):
    """Room for the last block to run past the end."""
    return jnp.pad(x_ND, ((0, block), (0, 0)))


def _rows_times_experts(x_ND, w_EDF, sizes_E, *, transpose: bool):
    """x @ w[e], or x @ w[e].T. A block may run past its group; the next group's first block then overwrites the rest."""
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    block = _block(x_ND.shape[0])
    x = _padded(x_ND, block)

    def one_expert(expert, start, rows, out):
        w_DF = jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)

        def one_block(at, out):
            product = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(x, at, block), w_DF, contract)
            return jax.lax.dynamic_update_slice_in_dim(out, product, at, 0)

        return _over_blocks(block, start, rows, one_block, out)

    out = jnp.zeros((x.shape[0], w_EDF.shape[1 if transpose else 2]), x.dtype)
    return _over_experts(sizes_E, one_expert, out)[: x_ND.shape[0]]


def _rows_times_rows(x_ND, dy_NF, sizes_E):
    """dw[e] = x[rows of e].T @ dy[rows of e]; zero for experts without rows."""
    block = _block(x_ND.shape[0])
    x, dy = _padded(x_ND, block), _padded(dy_NF, block)

    def one_expert(expert, start, rows, dw_EDF):
        def one_block(at, dw_DF):
            mine = (at + jnp.arange(block) < start + rows)[:, None]
            x_block = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, at, block), 0)
            dy_block = jax.lax.dynamic_slice_in_dim(dy, at, block)
            return dw_DF + jax.lax.dot_general(x_block, dy_block, (((0,), (0,)), ((), ())))

        dw_DF = _over_blocks(block, start, rows, one_block, jnp.zeros(dw_EDF.shape[1:], x.dtype))
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, expert, 0)

    dw_EDF = jnp.zeros((sizes_E.shape[0], x.shape[1], dy.shape[1]), x.dtype)
    return _over_experts(sizes_E, one_expert, dw_EDF)


@jax.custom_vjp
def permute_rows(x_ND, order_N, inverse_N):
    """x[order], whose gradient is a gather by the inverse instead of a scatter."""
    return x_ND[order_N]


permute_rows.defvjp(
    lambda x, order, inverse: (x[order], (inverse,)),
    lambda saved, dy: (dy[saved[0]], None, None),
)
