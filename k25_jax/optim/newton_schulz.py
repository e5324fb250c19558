"""Newton-Schulz iterations that make a matrix orthogonal, the heart of Muon, on one device or many (K2.5 §3.3, from K2)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic; published with Muon
STEPS = 5


def newton_schulz(stack_NRC, dtype=jnp.bfloat16):
    """Matrices [..., rows, columns] with their singular values brought near 1, in the dtype they came in.

    The products run in `dtype`, over the shorter side. After 5 steps the singular values lie between about 0.5 and 1.3.
    """
    x = stack_NRC.astype(jnp.float32)
    x = (x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-8)).astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    a, b, c = COEFFICIENTS

    def step(_, x):
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = b * gram + c * (gram @ gram)
        return a * x + (polynomial @ x if wide else x @ polynomial)

    return jax.lax.fori_loop(0, STEPS, step, x).astype(stack_NRC.dtype)  # a loop: five times less to compile


def sharded_newton_schulz(stack, sharding: NamedSharding, dtype=jnp.bfloat16):
    """`newton_schulz` of a stack of matrices laid out as `sharding` says, in the same layout.

    Devices that hold pieces of the same matrices take as many at a time as they are: one all_to_all in `dtype` gives each
    of them one whole matrix, which it makes orthogonal alone, and another gives the pieces back. Devices that hold copies
    share out these groups of matrices, and a sum brings the results together. Little memory is needed, and no device
    computes what another does, unless the matrices are fewer than the devices.
    """
    layout = tuple(sharding.spec) + (None,) * (stack.ndim - len(sharding.spec))
    rows, columns = (_names(entry) for entry in layout[-2:])
    used = {name for entry in layout for name in _names(entry)}
    copies = tuple(name for name in sharding.mesh.axis_names if name not in used and sharding.mesh.shape[name] > 1)
    body = functools.partial(_exchange, rows=rows, columns=columns, copies=copies, mesh=sharding.mesh, dtype=dtype)
    spec = PartitionSpec(*layout)
    return jax.shard_map(body, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)(stack)


def _exchange(local, *, rows, columns, copies, mesh, dtype):
    """On one device, group by group: its pieces to a whole matrix, that one made orthogonal, and back."""
    shares, copied = (math.prod(mesh.shape[name] for name in names) for names in ((*rows, *columns), copies))

    def one_group(pieces):
        for names, axis in ((rows, 1), (columns, 2)):
            if names:
                pieces = jax.lax.all_to_all(pieces, names, split_axis=0, concat_axis=axis, tiled=True)
        pieces = newton_schulz(pieces, dtype)
        for names, axis in ((columns, 2), (rows, 1)):
            if names:
                pieces = jax.lax.all_to_all(pieces, names, split_axis=axis, concat_axis=0, tiled=True)
        return pieces

    pieces = local.reshape(-1, *local.shape[-2:]).astype(dtype)
    padded = jnp.pad(pieces, ((0, -len(pieces) % shares), (0, 0), (0, 0)))
    groups = padded.reshape(-1, shares, *local.shape[-2:])
    groups = _shared_out(one_group, groups, copies, copied) if copies else jax.lax.map(one_group, groups)
    return groups.reshape(padded.shape)[: len(pieces)].reshape(local.shape).astype(local.dtype)


def _shared_out(function, groups, copies, copied: int):
    """`function` of every group, when devices along `copies` hold the same groups: each takes every copied-th."""
    first, count = jax.lax.axis_index(copies), len(groups)

    def add(turn, out):
        index = first + turn * copied
        result = jnp.where(index < count, function(groups[jnp.minimum(index, count - 1)]), 0)
        return out.at[jnp.minimum(index, count - 1)].add(result)

    out = jax.lax.fori_loop(0, -(-count // copied), add, jnp.zeros_like(groups))
    return jax.lax.psum(out, copies)


def _names(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
