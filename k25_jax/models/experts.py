"""Routed experts on one device, and over a mesh by expert parallelism (K2.5 §3.1, §3.8)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k25_jax.config import ConfigError, MoEConfig
from k25_jax.kernels.grouped_matmul import copy_rows, expert_swiglu, permute_rows
from k25_jax.models.dispatch import exchanged, in_rounds, places_for
from k25_jax.models.masters import cast_from, whole
from k25_jax.sharding.rules import ENGINE_AXES

ROWS = ("fsdp", "expert")  # the axes of the mesh that share out the rows of a batch; `context` shares out their tokens
WIDTH = ("fsdp", "context")  # the axes that share out an expert's matrices
ROOM = 1.25  # rows in a chunk, over those that a device gets when all get alike
SPLIT = (("gate", 1), ("up", 1), ("down", 2))  # which axis of each matrix they split: the width of the model


@jax.named_scope("moe.dispatch")
def routed(p, x_BLD, weights_BLK, experts_BLK, load_E, config: MoEConfig):
    """What the chosen experts make of each token, weighted and added up: [B,L,D].

    `experts_BLK` is the number of experts where nothing is chosen, as in padding. In a mesh of more than one device
    (jax.set_mesh; stages of a pipeline aside) the tokens, the experts and their matrices are shared out over it;
    ConfigError where one of the three does not divide. On the engine's mesh there is a row for each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" in mesh.axis_names:
        return _stationary(p, x_BLD, weights_BLK, experts_BLK, config)
    if not mesh.empty and _devices(mesh, (*ROWS, "context")) > 1:
        _check(mesh, x_BLD.shape, config)
        return _parallel(p, x_BLD, weights_BLK, experts_BLK, config)
    p = {name: whole(p[name], x_BLD.dtype) for name, _ in SPLIT}
    x_TD, *chosen = (a.reshape(-1, a.shape[-1]) for a in (x_BLD, weights_BLK, experts_BLK))
    return _local(p, x_TD, *chosen, load_E, config.grouped_matmul).reshape(x_BLD.shape)


def _check(mesh, shape, config: MoEConfig) -> None:
    rows, tokens, width = shape
    for name, size, axes in (
        ("rows of a step (data.batch_size / train.accumulate / mesh.microbatches)", rows, ROWS),
        ("tokens of a row (data.seq_len)", tokens, ("context",)),
        ("moe.experts", config.experts, ("expert",)),
        ("text.d_model", width, WIDTH),
    ):
        parts = _devices(mesh, axes)
        if size % parts:
            named = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ConfigError(f"{name}: {size} must be a multiple of {named}, {parts}; change one of them")


def _devices(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _local(p, x_TD, weights_TK, experts_TK, load_E, implementation: str):
    """Sort token copies by expert, run the experts' SwiGLU, sort back and add up."""
    order_N = jnp.argsort(experts_TK.reshape(-1), stable=True)
    inverse_N = jnp.argsort(order_N)
    rows_ND = copy_rows(experts_TK.shape[1], x_TD, order_N, inverse_N, load_E.sum())
    out_ND = expert_swiglu(rows_ND, p["gate"], p["up"], p["down"], load_E, implementation)
    out_TKD = permute_rows(out_ND, inverse_N, order_N).reshape(*experts_TK.shape, -1)
    out_TKD = jnp.where((experts_TK < load_E.shape[0])[..., None], out_TKD, 0)  # padding's rows hold no defined value
    return (out_TKD * weights_TK[..., None]).sum(axis=1).astype(x_TD.dtype)  # the weights, and so the sum, are float32


def _parallel(p, x_BLD, weights_BLK, experts_BLK, config: MoEConfig):
    """Expert parallelism, dropless, in one of two forms (`moe.dispatch`; models/dispatch.py compares what they send).

    Matrices are split over WIDTH too and gathered for use, once for all chunks of tokens (`moe.chunk`); in the backward
    pass the same exchanges run the other way round and add up the gradients.
    """

    def body(p, x_BLD, *chosen_BLK):
        p = {name: whole(p[name], x_BLD.dtype, WIDTH, axis, config.reduce_dtype) for name, axis in SPLIT}
        form = _by_gather if config.dispatch == "gather" else _by_all_to_all
        arguments = [a.reshape(-1, a.shape[-1]) for a in (x_BLD, *chosen_BLK)]
        return _in_chunks(lambda p, *some: form(p, *some, config), config.chunk, p, arguments).reshape(x_BLD.shape)

    tokens = PartitionSpec(ROWS, "context", None)
    matrices = {name: PartitionSpec("expert", *(WIDTH if i == axis else None for i in (1, 2))) for name, axis in SPLIT}
    weights = {name: cast_from(p[name], x_BLD.dtype) for name in matrices}
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.axis_names) - set(mesh.manual_axes)  # every axis, as TPU kernels demand, but an outer shard_map's
    return jax.shard_map(
        body, in_specs=(matrices, tokens, tokens, tokens), out_specs=tokens, axis_names=manual, check_vma=False
    )(weights, x_BLD, weights_BLK, experts_BLK)


def _in_chunks(form, chunk: int, p, arguments):
    """form(p, *arguments), `chunk` tokens after the other; what one chunk holds, the next one's memory is."""
    tokens = len(arguments[0])
    if not chunk or tokens <= chunk:
        return form(p, *arguments)
    if tokens % chunk:
        raise ConfigError(f"moe.chunk={chunk} must divide the {tokens} tokens that a device has in a microbatch")
    one = jax.checkpoint(lambda some: form(p, *some))
    return jax.lax.map(one, [a.reshape(-1, chunk, a.shape[-1]) for a in arguments])


def _stationary(p, x_ZTD, weights_ZTK, experts_ZTK, config: MoEConfig):
    """On the engine's mesh, where no matrix moves: a device has the width `tensor` of its experts.

    The devices of a `tensor` row compute for the tokens of all of them, and their shares of a result are added up.
    """

    def body(p, *arguments):
        p = {name: whole(p[name], x_ZTD.dtype) for name, _ in SPLIT}
        arguments = (a.reshape(-1, a.shape[-1]) for a in arguments)
        form = _by_gather if config.dispatch == "gather" else _by_all_to_all
        y_TD = form(p, *arguments, config).astype(jnp.float32)
        y_TD = jax.lax.psum_scatter(y_TD, "tensor", scatter_dimension=0, tiled=True)
        return y_TD.astype(x_ZTD.dtype)[None]

    tokens = PartitionSpec("expert")
    matrices = {
        name: PartitionSpec("expert", *("tensor" if i != axis else None for i in (1, 2))) for name, axis in SPLIT
    }
    weights = {name: p[name] for name in matrices}
    return jax.shard_map(
        body, in_specs=(matrices, tokens, tokens, tokens), out_specs=PartitionSpec(ENGINE_AXES), check_vma=False
    )(weights, x_ZTD, weights_ZTK, experts_ZTK)


def _by_gather(p, x_TD, weights_TK, experts_TK, config: MoEConfig):
    """By all-gather and reduce-scatter.

    Every device sees the tokens of its row of the `expert` axis, computes what its own experts make of them, and the
    contributions to a token are added up where it lives. A device takes its token copies in chunks, usually one. Were
    all tokens to choose the same experts there would be many, but memory is held for a single one.
    """
    x_TD, weights_TK, experts_TK = (
        jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_TD, weights_TK, experts_TK)
    )
    own = p["gate"].shape[0]
    number_TK = experts_TK - jax.lax.axis_index("expert") * own
    number_TK = jnp.where((number_TK >= 0) & (number_TK < own), number_TK, own)  # another device's: like padding
    load_E = jnp.bincount(number_TK.reshape(-1), length=own)
    if own == config.experts:
        y_TD = _local(p, x_TD, weights_TK, number_TK, load_E, config.grouped_matmul)
    else:
        rows = min(number_TK.size, 128 * math.ceil(ROOM * number_TK.size * own / config.experts / 128))
        chunks = functools.partial(_chunks, rows, config.grouped_matmul)
        y_TD = in_rounds(chunks, p, x_TD, weights_TK, (number_TK, load_E))
    return jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)


def _by_all_to_all(p, x_TD, weights_TK, experts_TK, config: MoEConfig):
    """Each token copy goes to the device that holds its expert, and its result comes back."""
    places = places_for(experts_TK.size, config.experts // p["gate"].shape[0], ROOM)
    layer = functools.partial(_local, implementation=config.grouped_matmul)
    return exchanged(layer, places, p, x_TD, weights_TK, experts_TK)


def _chunks(rows: int, implementation: str, choice):
    """Rounds (models/dispatch.py) of `rows` token copies, sorted by expert, as many as these experts have copies.

    `choice` is (number_TK, load_E). No array of all copies is made.
    """
    number_TK, load_E = choice
    order_N = jnp.argsort(number_TK.reshape(-1), stable=True)
    order_N = jnp.pad(order_N, (0, -len(order_N) % rows))
    ends_E = jnp.cumsum(load_E)

    def chunk(i):
        slot_N = jax.lax.dynamic_slice_in_dim(order_N, i * rows, rows)
        used_N1 = (i * rows + jnp.arange(rows) < ends_E[-1])[:, None]
        sizes_E = jnp.diff(jnp.clip(ends_E - i * rows, 0, rows), prepend=0)

        def function(p, x_ND, w_N):
            x_ND = jnp.where(used_N1, x_ND, 0)  # the gradient of a row that is not used may be anything
            y_ND = expert_swiglu(x_ND, p["gate"], p["up"], p["down"], sizes_E, implementation)
            return jnp.where(used_N1, y_ND, 0) * w_N[:, None]  # float32, as the weights are

        return function, slot_N // number_TK.shape[1], slot_N

    return -(-load_E.sum() // rows), chunk
