"""Routed experts on one device, and over a mesh by expert parallelism (K2.5 §3.1, §3.8)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k25_jax.config import MoEConfig
from k25_jax.kernels.grouped_matmul import copy_rows, expert_swiglu, permute_rows

BOTH = ("fsdp", "expert")  # the axes of the mesh that share out the tokens
SPLIT = (("gate", 1), ("up", 1), ("down", 2))  # the axis of each matrix that fsdp splits: the width of the model


def routed(p, x_TD, weights_TK, experts_TK, load_E, config: MoEConfig):
    """What the chosen experts make of each token, weighted and added up: [T,D].

    `experts_TK` is the number of experts where nothing is chosen, as in padding. In a mesh with more than one device
    along fsdp and expert (jax.set_mesh) the tokens, the experts and their matrices are shared out over them, unless
    one of the three does not divide: then the compiler lays out the form for one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape["fsdp"] * mesh.shape["expert"]
    tokens, width = x_TD.shape
    if devices == 1 or tokens % devices or config.experts % mesh.shape["expert"] or width % mesh.shape["fsdp"]:
        return _local(p, x_TD, weights_TK, experts_TK, load_E, config.grouped_matmul)
    return _parallel(p, x_TD, weights_TK, experts_TK, config)


def _local(p, x_TD, weights_TK, experts_TK, load_E, implementation: str):
    """Sort token copies by expert, run the experts' SwiGLU, sort back and add up."""
    order_N = jnp.argsort(experts_TK.reshape(-1), stable=True)
    inverse_N = jnp.argsort(order_N)
    rows_ND = copy_rows(experts_TK.shape[1], x_TD, order_N, inverse_N, load_E.sum())
    out_ND = expert_swiglu(rows_ND, p["gate"], p["up"], p["down"], load_E, implementation)
    out_TKD = permute_rows(out_ND, inverse_N, order_N).reshape(*experts_TK.shape, -1)
    out_TKD = jnp.where((experts_TK < load_E.shape[0])[..., None], out_TKD, 0)  # padding's rows hold no defined value
    return jnp.einsum("tkd,tk->td", out_TKD, weights_TK.astype(out_TKD.dtype))


def _parallel(p, x_TD, weights_TK, experts_TK, config: MoEConfig):
    """Expert parallelism, dropless, by all-gather and reduce-scatter.

    Every device sees the tokens of its row of the `expert` axis, computes what its own experts make of them, and the
    contributions to a token are added up where it lives. Matrices are split over fsdp too and gathered for use; in the
    backward pass the same exchanges run the other way round and add up the gradients.
    """

    def body(p, x_TD, weights_TK, experts_TK):
        p = {name: jax.lax.all_gather(p[name], "fsdp", axis=axis, tiled=True) for name, axis in SPLIT}
        x_TD, weights_TK, experts_TK = (
            jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_TD, weights_TK, experts_TK)
        )
        own = p["gate"].shape[0]
        number_TK = experts_TK - jax.lax.axis_index("expert") * own
        number_TK = jnp.where((number_TK >= 0) & (number_TK < own), number_TK, own)  # another device's: like padding
        load_E = jnp.bincount(number_TK.reshape(-1), length=own)
        y_TD = _local(p, x_TD, weights_TK, number_TK, load_E, config.grouped_matmul)
        return jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)

    tokens = PartitionSpec(BOTH, None)
    matrices = {name: PartitionSpec("expert", *("fsdp" if i == axis else None for i in (1, 2))) for name, axis in SPLIT}
    weights = {name: p[name] for name in matrices}
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.axis_names) - set(mesh.manual_axes)  # every axis, as TPU kernels demand, but an outer shard_map's
    return jax.shard_map(
        body, in_specs=(matrices, tokens, tokens, tokens), out_specs=tokens, axis_names=manual, check_vma=False
    )(weights, x_TD, weights_TK, experts_TK)
