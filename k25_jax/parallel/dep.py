"""Decoupled encoder process: vision is balanced over all devices, whatever the backbone does with them (K2.5 §3.8).

Phase 1: every device encodes its own packs under one checkpoint a pack, so nothing of the encoder is held while the
backbone runs. Phase 2: one all-to-all takes the features to the devices whose rows have their tokens, by tables that the
host builds (`routed`), and the backbone trains. Phase 3: the gradients go back through the same all-to-all, each device
encodes its packs again, and the gradients of the replicated weights are added up. All three are plain autodiff.

Arms for comparison (`train.vision`): "stage0" encodes on the first stage of the pipeline only; "plain" leaves it to the
compiler: every device encodes every pack, and `train.remat` says what is held.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import K25Config, VisionConfig
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import vision_features
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES, batch_shardings
from k25_jax.vision.patchpack import pack_flops

ENCODERS = {"dep": RULES["packs"], "stage0": ("fsdp", "expert")}  # the axes that the packs are split over


def encoders(mesh: Mesh, vision: str = "dep") -> int:
    """The number of devices that the packs are split over."""
    return int(np.prod([mesh.shape[axis] for axis in ENCODERS.get(vision, ())], dtype=int))


def place(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> Batch:
    """The batch on the devices of `mesh`, with tables where features must travel: not on one device, nor for text."""
    layout = batch_shardings(batch, mesh)
    if mesh.size > 1 and len(batch.vision.patches_PNC) and vision in ENCODERS:
        batch = routed(batch, dict(mesh.shape), config, vision)
        packs, table = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (ENCODERS[vision], AXES))
        layout = layout.replace(vision=jax.tree.map(lambda _: packs, batch.vision), send_XZU=table)
    return jax.device_put(batch, layout)


def routed(batch: Batch, shape: dict[str, int], config: VisionConfig, vision: str = "dep") -> Batch:
    """The batch with `send_XZU`, and with `media_BL` as an index into what the device of each row receives.

    send_XZU[x, z] lists the features that device x sends to device z, as indices into its own. U is the largest number
    that any device sends to any other, rounded up to a power of two, so that few programs serve all batches of a run. A
    place that is not needed holds 0, and nobody reads what arrives there. Devices are numbered as in mesh.devices.
    """
    number = np.arange(np.prod([shape[axis] for axis in AXES])).reshape([shape[axis] for axis in AXES])
    homes = number.transpose([AXES.index(axis) for axis in RULES["batch"]]).reshape(-1)  # of each block of rows
    senders = number.reshape(-1) if vision == "dep" else number[0].reshape(-1)  # of each block of packs
    own = batch.vision.segments_PN.size // config.group // len(senders)  # features of a sender
    where = np.nonzero(batch.media_BL >= 0)
    feature = batch.media_BL[where]
    sender, receiver = senders[feature // own], homes[where[0] * len(homes) // len(batch.media_BL)]
    pair = sender * number.size + receiver
    counts = np.bincount(pair, minlength=number.size**2)
    order = np.argsort(pair, kind="stable")
    place = np.empty_like(order)  # of each feature among those of its pair
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    capacity = 1 << int(counts.max() - 1).bit_length()
    send_XZU = np.zeros((number.size, number.size, capacity), np.int32)
    send_XZU[sender, receiver, place] = feature % own
    media_BL = np.full_like(batch.media_BL, -1)
    media_BL[where] = sender * capacity + place
    return batch.replace(media_BL=media_BL, send_XZU=send_XZU)


def vision_at_tokens(params, batch: Batch, config: K25Config, dtype=jnp.float32, vision: str = "dep"):
    """The feature of every token that has one, else 0: [B,L,D], its rows laid out as those of the batch (K2.5 §3.8).

    `batch` comes from `place`; call it under jax.set_mesh of the same mesh.
    """

    def body(weights, packs, send_XZU, media_BL):
        if vision == "stage0":
            features_MD = _on_first_stage(lambda: vision_features(weights, packs, config, "full", dtype))
        else:
            features_MD = vision_features(weights, packs, config, "full", dtype)
        return exchange(features_MD, send_XZU[0], media_BL)

    weights = {"vision": params["vision"], "projector": params["projector"]}
    rows, every, packs = (PartitionSpec(axes) for axes in (RULES["batch"], AXES, ENCODERS[vision]))
    specs = (PartitionSpec(), packs, every, rows)
    return jax.shard_map(body, in_specs=specs, out_specs=rows, check_vma=False)(
        weights, batch.vision, batch.send_XZU, batch.media_BL
    )


def exchange(features_MD, send_ZU, media_BL):
    """One device's features to the devices of their tokens; what its own rows get, [B,L,D]. Inside shard_map."""
    received_ZUD = jax.lax.all_to_all(features_MD[send_ZU], AXES, split_axis=0, concat_axis=0, tiled=True)
    received_MD = received_ZUD.reshape(-1, received_ZUD.shape[-1])
    return jnp.where(media_BL[..., None] >= 0, received_MD[jnp.maximum(media_BL, 0)], 0)


def _on_first_stage(compute):
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))  # noqa: E731
    return jax.lax.cond(jax.lax.axis_index("pipe") == 0, compute, nothing)


def balance_metrics(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> dict[str, float]:
    """FLOPs of the device with the most vision over the mean of all devices; nothing for text or one device."""
    if vision not in ENCODERS or mesh.size == 1 or not len(batch.vision.patches_PNC):
        return {}
    loads = pack_flops(batch.vision, config).reshape(encoders(mesh, vision), -1).sum(axis=1)
    return {"vision_max_over_mean": float(loads.max() * mesh.size / loads.sum())}
