"""Rows of a table by number: tokens' embeddings, their gradient added up in float32, on one device or many (K2.5 §3.8)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k25_jax.sharding.rules import RULES, row_axes

WIDTH = RULES["embed"]  # the axes that share out the width of the table while it is read


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_of(table_VD, index, dtype):
    """table[index] in `dtype`. However often a row is taken, its gradient is exact: a float32 sum."""
    return table_VD[index].astype(dtype)


def _rows_backward(dtype, saved, dy):
    like_0VD, index = saved
    total_VD = jnp.zeros(like_0VD.shape[1:], jnp.float32).at[index].add(dy.astype(jnp.float32))
    return total_VD.astype(like_0VD.dtype), None


def _rows_forward(table_VD, index, dtype):
    return rows_of(table_VD, index, dtype), (jnp.zeros((0, *table_VD.shape), table_VD.dtype), index)


rows_of.defvjp(_rows_forward, _rows_backward)


def lookup(table_VD, tokens_BL, dtype):
    """`rows_of`, each device of the mesh in use (jax.set_mesh) with its rows of the batch: [B,L,D].

    Numbers travel, not the table: each device takes its columns of the rows of all tokens, and sends each device its
    tokens'. So a row's gradient comes together whole on the devices of its columns, and the table is on none of them.
    Where rows or columns do not divide over the mesh, and for a few tokens, as in decoding, the compiler lays it out.
    """
    mesh, rows = jax.sharding.get_abstract_mesh(), row_axes(len(tokens_BL))
    shares = math.prod(mesh.shape[axis] for axis in WIDTH) if rows else 1
    few = tokens_BL.ndim != 2 or tokens_BL.size < len(table_VD)
    if shares == 1 or few or table_VD.shape[1] % shares or tokens_BL.shape[1] % mesh.shape["context"]:
        return rows_of(table_VD, tokens_BL, dtype)

    def body(table_VC, tokens_BL):
        every_T = jax.lax.all_gather(tokens_BL.reshape(-1), WIDTH, tiled=True)
        x_TC = rows_of(table_VC, every_T, dtype)
        x_TD = jax.lax.all_to_all(x_TC, WIDTH, split_axis=0, concat_axis=1, tiled=True)
        return x_TD.reshape(*tokens_BL.shape, -1)

    columns, own = PartitionSpec(None, WIDTH), PartitionSpec(rows, "context")
    manual = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(body, in_specs=(columns, own), out_specs=own, axis_names=manual, check_vma=False)(
        table_VD, tokens_BL
    )
