"""Decoupled encoder process: vision is balanced over all devices, whatever the backbone does with them (K2.5 §3.8).

Phase 1: every device encodes its own packs under one checkpoint a pack, so nothing of the encoder is held while the
backbone runs. Phase 2: one all-to-all takes the features to the devices whose rows have their tokens, by tables that the
host builds (`routed`), and the backbone trains. Phase 3: the gradients go back through the same all-to-all, each device
encodes its packs again, and the gradients of the replicated weights are added up. All three are plain autodiff.

Arms for comparison (`train.vision`): "stage0" encodes on the first stage of the pipeline only; "plain" leaves it to the
compiler: every device encodes every pack, and `train.remat` says what is held.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import K25Config, VisionConfig
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import vision_features
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES, batch_shardings
from k25_jax.vision.patchpack import pack_flops

SMALL = 2**17  # numbers of a leaf
ENCODERS = {"dep": AXES, "stage0": AXES[1:]}  # the axes that the packs are split over


def encoders(mesh: Mesh, vision: str = "dep") -> int:
    """The number of devices that the packs are split over."""
    return int(np.prod([mesh.shape[axis] for axis in ENCODERS.get(vision, ())], dtype=int))


def place(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> Batch:
    """The batch on the devices of `mesh`, with tables where features must travel: not on one device, nor for text.

    Where `context` shares out a row's tokens they are reordered, so that each device has a stripe (models/context.py).
    """
    batch = striped(batch, mesh.shape["context"])
    if travels(batch, mesh, vision):
        batch = routed(batch, dict(mesh.shape), config, vision)
    return jax.device_put(batch, layout(batch, mesh, vision))


def travels(batch: Batch, mesh: Mesh, vision: str) -> bool:
    """Whether features are encoded on other devices than those of their tokens."""
    return mesh.size > 1 and len(batch.vision.patches_PNC) > 0 and vision in ENCODERS


def layout(batch: Batch, mesh: Mesh, vision: str):
    """NamedShardings of a batch with its tables, if it has any."""
    out = batch_shardings(batch, mesh)
    if batch.routes is None:
        return out
    packs, table = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (ENCODERS[vision], AXES))
    return out.replace(vision=jax.tree.map(lambda _: packs, batch.vision), routes=(table, table))


def abstract_routes(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str, most: int):
    """Tables as shapes, for features of which at most `most` travel between the same two devices."""
    table = table_shape(batch.vision.segments_PN.size // config.group, mesh.size, encoders(mesh, vision), most)
    return (jax.ShapeDtypeStruct(table, np.int32),) * 2


def striped(batch: Batch, shares: int) -> Batch:
    """Rows in which places 0, n, 2 n, ... come first, then 1, n + 1, ...; n shares."""
    reorder = lambda a: rearrange(a, "b (l n) -> b (n l)", n=shares)  # noqa: E731
    return jax.tree.map(reorder, batch.replace(vision=None)).replace(vision=batch.vision)


def routed(batch: Batch, shape: dict[str, int], config: VisionConfig, vision: str = "dep") -> Batch:
    """The batch with `routes` = (send_XJZU, land_ZJXU), by which features travel in J rounds: see `tables`."""
    features = batch.vision.segments_PN.size // config.group
    return batch.replace(routes=tables(batch.media_BL, features, shape, vision))


def tables(media_BL, features: int, shape: dict[str, int], vision: str = "dep"):
    """(send_XJZU, land_ZJXU) for tokens whose features are media_BL, of so many; `shape` is that of the mesh.

    In round j device x sends device z its features send_XJZU[x, j, z], and they land on the tokens land_ZJXU[z, j, x] of
    the rows of z, flattened. U is so small that a round carries about what a device has, and J is as many rounds as the
    two devices with most between them need; both are powers of two, so that few programs serve all batches of a run. A
    place that is not needed sends feature 0 to no token. Devices are numbered as in mesh.devices.
    """
    number = np.arange(math.prod(shape[axis] for axis in AXES)).reshape([shape[axis] for axis in AXES])
    axes = [AXES.index(axis) for axis in (*RULES["batch"], RULES["length"])]
    homes = number.transpose(axes).reshape(-1, shape["context"])  # of each block of rows, and of the tokens in them
    senders = number.reshape(-1) if vision == "dep" else number[0].reshape(-1)  # of each block of packs
    own = features // len(senders)  # features of a sender
    where = np.nonzero(media_BL >= 0)
    feature = media_BL[where]
    high, wide = (size // blocks for size, blocks in zip(media_BL.shape, homes.shape, strict=True))
    tokens, token = high * wide, where[0] % high * wide + where[1] % wide  # of one device
    sender, receiver = senders[feature // own], homes[where[0] // high, where[1] // wide]
    pair = sender * number.size + receiver
    counts = np.bincount(pair, minlength=number.size**2)
    order = np.argsort(pair, kind="stable")
    place = np.empty_like(order)  # of each feature among those of its pair
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = table_shape(features, number.size, len(senders), counts.max())
    width = table[-1]
    send_XJZU = np.zeros(table, np.int32)
    send_XJZU[sender, place // width, receiver, place % width] = feature % own
    land_ZJXU = np.broadcast_to(
        tokens + np.arange(number.size * width, dtype=np.int32).reshape(-1, width), table
    ).copy()
    land_ZJXU[receiver, place // width, sender, place % width] = token
    return send_XJZU, land_ZJXU


def table_shape(items: int, devices: int, senders: int, most: int) -> tuple[int, int, int, int]:
    """(devices, rounds, devices, items) of the tables by which so many items of all senders travel."""
    width = power_of_two(items / senders / devices)
    return devices, power_of_two(most / width), devices, width


def power_of_two(least: float) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << max(0, int(np.ceil(least)) - 1).bit_length()


def vision_at_tokens(params, batch: Batch, config: K25Config, dtype=jnp.float32, vision="dep", remat="full"):
    """The feature of every token that has one, else 0: [B,L,D], its rows laid out as those of the batch (K2.5 §3.8).

    `batch` comes from `place`; call it under jax.set_mesh of the same mesh. `remat` is that of `vision_features`.
    """

    def body(large, small, packs, routes, media_BL):
        weights = joined(large, small)
        if vision == "stage0":
            features_MD = _on_first_stage(lambda: vision_features(weights, packs, config, remat, dtype))
        else:
            features_MD = vision_features(weights, packs, config, remat, dtype)
        x_TD = exchange(features_MD, routes[0][0], routes[1][0], media_BL.size)
        return x_TD.reshape(*media_BL.shape, -1)

    large, small, joined = small_together({"vision": params["vision"], "projector": params["projector"]})
    rows = PartitionSpec(RULES["batch"], RULES["length"])
    every, packs = (PartitionSpec(axes) for axes in (AXES, ENCODERS[vision]))
    specs = (PartitionSpec(), PartitionSpec(), packs, every, rows)
    return jax.shard_map(body, in_specs=specs, out_specs=rows, check_vma=False)(
        large, small, batch.vision, batch.routes, batch.media_BL
    )


def small_together(weights):
    """(large leaves, all small leaves in one vector, the way back), so that the gradients of the small ones are one sum.

    A sum over devices takes a while however little it adds up, and most leaves are biases and norms.
    """
    leaves, tree = jax.tree.flatten(weights)
    large = {i: leaf for i, leaf in enumerate(leaves) if leaf.size > SMALL}
    small, unravel = ravel_pytree({i: leaf for i, leaf in enumerate(leaves) if i not in large})

    def joined(large, small):
        leaves = large | unravel(small)
        return jax.tree.unflatten(tree, [leaves[i] for i in range(len(leaves))])

    return large, small, joined


def exchange(features_MD, send_JZU, land_JXU, tokens: int):
    """One device's features to the devices of their tokens; what its own tokens get, [T,D]. Inside shard_map.

    Rounds follow each other in a loop, so that each takes the memory of the one before.
    """

    def one_round(out_TD, tables):
        send_ZU, land_XU = tables
        received_XUD = jax.lax.all_to_all(features_MD[send_ZU], AXES, split_axis=0, concat_axis=0, tiled=True)
        return out_TD.at[land_XU].add(received_XUD, mode="drop", unique_indices=True), None

    out_TD = jnp.zeros((tokens, features_MD.shape[-1]), features_MD.dtype)
    return jax.lax.scan(one_round, out_TD, (send_JZU, land_JXU))[0]


def _on_first_stage(compute):
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))  # noqa: E731
    return jax.lax.cond(jax.lax.axis_index("pipe") == 0, compute, nothing)


def balance_metrics(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> dict[str, float]:
    """FLOPs of the device with the most vision over the mean of all devices; nothing for text or one device."""
    if vision not in ENCODERS or mesh.size == 1 or not len(batch.vision.patches_PNC):
        return {}
    loads = pack_flops(batch.vision, config).reshape(encoders(mesh, vision), -1).sum(axis=1)
    return {"vision_max_over_mean": float(loads.max() * mesh.size / loads.sum())}
