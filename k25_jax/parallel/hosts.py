"""One batch from those that several processes read: its rows stay, its images go where they are encoded (K2.5 §3.8).

Every process reads, decodes and packs its own share of the data. Then all learn how large each clip is and where its tokens
are, balance the clips over the devices of all, each for itself and all alike, and the pixels travel in rounds as the features
will (parallel/dep.py).

What it costs beyond one process: two small gathers of the hosts' figures a step; pixels go over the network once, a sixth of
the bytes of the features at the width of K2.5, and are twice on a device for a moment; every process makes the whole tables
of the features, in time proportional to the media tokens of the whole batch.
"""

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import VisionConfig
from k25_jax.data.packing import Batch, batch_stats
from k25_jax.parallel import dep
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.processes import Reader, assembled, gathered, own_reader, owners_of, readers, spread
from k25_jax.vision.patchpack import VisionPack, balance, blank_pack, pack_flops, write_grid


def place(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> Batch:
    """`dep.place` of the batch whose rows and packs the processes have read, each its own; all must call it.

    In one process the batch is whole. In several, a reader's rows become those of its blocks of rows, in their order.
    """
    if jax.process_count() == 1:
        return dep.place(batch, mesh, config, vision)
    owners = owners_of(mesh)
    everyone = readers(owners)
    own, blocks = everyone[own_reader(everyone)], sum(len(reader.rows) for reader in everyone)
    plan = make_plan(batch, everyone, mesh.size, config)
    mine = np.flatnonzero(owners == jax.process_index()).tolist()
    packs = _packs(batch.vision.patches_PNC, plan, own, mine, mesh, config)
    batch = dep.striped(batch.replace(media_BL=plan.media_BL, vision=None), mesh.shape["context"])
    whole = jax.tree.map(lambda _: batch.media_BL, batch).replace(vision=packs)  # rows of the right shape
    if dep.travels(whole, mesh, vision):
        features = plan.packs * plan.slots // config.group
        whole = whole.replace(routes=dep.tables(batch.media_BL, features, dict(mesh.shape), vision))
    layout = dep.layout(whole, mesh, vision)
    rows = {name: assembled(getattr(batch, name), own.rows, blocks, getattr(layout, name)) for name in ROWS}
    return whole.replace(
        **rows,
        media_BL=spread(batch.media_BL, layout.media_BL),
        vision=jax.device_put(packs, layout.vision),
        routes=jax.tree.map(spread, whole.routes, layout.routes),
    )


ROWS = ("tokens_BL", "targets_BL", "loss_weights_BL", "segments_BL", "positions_BL")


# ------------------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """Where each clip of the whole batch was read, is encoded, and has its tokens; every process makes the same.

    A place is the number of a clip's first patch slot among the slots of all packs.
    """

    packs: int
    slots: int  # of a pack
    dtype: str  # of the pixels
    media_BL: np.ndarray  # of all rows, not striped
    grids: np.ndarray  # [clips, 3]: frames, rows, columns of patches
    read: np.ndarray  # [clips]: place in the packs as their readers filled them
    encoded: np.ndarray  # [clips]: place in the packs as they are encoded
    segments: np.ndarray  # [clips]: number in that pack
    tokens: np.ndarray  # [clips]: first token in that pack

    @property
    def sizes(self) -> np.ndarray:
        """Patches of each clip."""
        return self.grids.prod(axis=1)


def make_plan(batch: Batch, everyone: list[Reader], devices: int, config: VisionConfig) -> Plan:
    """Learn of all clips and balance them over the packs of all devices."""
    told = gathered(
        {
            "clips": _clips(batch, config).tolist(),
            "packs": len(batch.vision.patches_PNC),
            "dtype": str(batch.vision.patches_PNC.dtype),
        }
    )
    told = [told[reader.processes[0]] for reader in everyone]
    most = max(told, key=lambda one: one["packs"])
    packs, slots, rows = most["packs"] * len(everyone), batch.vision.segments_PN.shape[1], len(batch.media_BL)
    share = packs // devices * slots  # of a device
    clips = np.concatenate(
        [_numbered(one["clips"], reader, share, rows) for one, reader in zip(told, everyone, strict=True)]
    )
    read, grids, homes = clips[:, 0], clips[:, 1:4], clips[:, 4:]
    sizes = grids.prod(axis=1).tolist()
    placement = balance(sizes, packs, slots, config, (read // slots).tolist()) if packs else []
    encoded, segments, tokens = _lay_out(placement, grids, packs, slots, config.group)
    media_BL = np.full((rows * len(everyone), batch.media_BL.shape[1]), -1, np.int32)
    counts = grids[:, 1] * grids[:, 2] // config.group
    first = encoded // slots * (slots // config.group) + tokens
    for (row, column), start, count in zip(homes.tolist(), first.tolist(), counts.tolist(), strict=True):
        media_BL[row, column : column + count] = np.arange(start, start + count)
    return Plan(packs, slots, most["dtype"], media_BL, grids, read, encoded, segments, tokens)


def _clips(batch: Batch, config: VisionConfig) -> np.ndarray:
    """[clips, 6] of the packs as they were read: place, frames, rows, columns; row and column of the first token.

    The tokens of a clip follow each other in one row (data/packing.py).
    """
    packs, slots = batch.vision.segments_PN.shape
    found = []
    token_row, token_column = np.nonzero(batch.media_BL >= 0)
    where = np.zeros((packs * slots // config.group, 2), np.int64)
    where[batch.media_BL[token_row, token_column]] = np.stack([token_row, token_column], axis=1)
    for pack, segments_N in enumerate(batch.vision.segments_PN):
        for segment in range(1, segments_N.max(initial=0) + 1):
            own = np.flatnonzero(segments_N == segment)
            height, width = batch.vision.coords_PN5[pack, own[0], 3:].tolist()
            feature = pack * (slots // config.group) + batch.vision.slots_PN[pack, own].min() // config.group
            grid = (len(own) // (height * width), height, width)
            found.append((pack * slots + own[0], *grid, *where[feature]))
    return np.asarray(found, np.int64).reshape(-1, 6)


def _numbered(clips, reader: Reader, share: int, rows: int) -> np.ndarray:
    """The clips of one reader, with places and rows counted in the whole batch."""
    clips = np.asarray(clips, np.int64).reshape(-1, 6)
    if len(clips):
        high = rows // len(reader.rows)
        clips[:, 0] = np.asarray(reader.devices)[clips[:, 0] // share] * share + clips[:, 0] % share
        clips[:, 4] = np.asarray(reader.rows)[clips[:, 4] // high] * high + clips[:, 4] % high
    return clips


def _lay_out(placement: list[int], grids: np.ndarray, packs: int, slots: int, group: int):
    """(place, number in the pack, first token in it) of clips that follow each other in their packs."""
    used, tokens, count = [0] * packs, [0] * packs, [0] * packs
    out = np.zeros((3, len(placement)), np.int64)
    for i, (pack, (frames, height, width)) in enumerate(zip(placement, grids.tolist(), strict=True)):
        count[pack] += 1
        out[:, i] = pack * slots + used[pack], count[pack], tokens[pack]
        used[pack] += frames * height * width
        tokens[pack] += height * width // group
    return out


# ----------------------------------------------------------------------------------------------------------- the pixels
def _packs(patches_PNC, plan: Plan, own: Reader, mine: list[int], mesh: Mesh, config: VisionConfig) -> VisionPack:
    """The packs of the whole batch as they are encoded, over all devices; `mine` are those of this process."""
    if not plan.packs:
        nothing = blank_pack(0, plan.slots, config.patch_dim, plan.dtype)
        return jax.tree.map(lambda a: spread(a, NamedSharding(mesh, PartitionSpec())), nothing)
    over_all, share = NamedSharding(mesh, PartitionSpec(AXES)), plan.packs // mesh.size
    if not len(patches_PNC):
        patches_PNC = np.zeros((share * len(own.devices), plan.slots, config.patch_dim), plan.dtype)
    patches_PNC = assembled(patches_PNC, own.devices, mesh.size, over_all)
    if (plan.read != plan.encoded).any():
        tables = (assembled(table, mine, mesh.size, over_all) for table in pixel_tables(plan, mine, mesh.size))
        patches_PNC = _moved(mesh, patches_PNC, *tables)
    pack = blank_pack(share * len(mine), plan.slots, 0, plan.dtype)
    for place, segment, token, grid in zip(plan.encoded, plan.segments, plan.tokens, plan.grids.tolist(), strict=True):
        index, start = divmod(place, plan.slots)
        if index // share in mine:
            index = mine.index(index // share) * share + index % share
            write_grid(pack, index, start, segment, token, grid, config.merge)
    rest = jax.tree.map(lambda a: assembled(a, mine, mesh.size, over_all), pack.replace(patches_PNC=None))
    return rest.replace(patches_PNC=patches_PNC)


def pixel_tables(plan: Plan, mine: list[int], devices: int):
    """(send_XJZU, land_ZJXU) of the devices `mine`, as those of features (dep.tables): from where read to where encoded."""
    share = plan.packs // devices * plan.slots
    sender, first = np.divmod(plan.read, share)
    receiver, place = np.divmod(plan.encoded, share)
    before, total = np.zeros(len(sender), np.int64), np.zeros(devices**2, np.int64)  # of each pair of devices
    for i, (pair, size) in enumerate(zip((sender * devices + receiver).tolist(), plan.sizes.tolist(), strict=True)):
        before[i] = total[pair]
        total[pair] += size
    _, rounds, _, width = dep.table_shape(plan.packs * plan.slots, devices, devices, total.max())
    send_XJZU = np.zeros((len(mine), rounds, devices, width), np.int32)
    nowhere = share + np.arange(devices * width, dtype=np.int32).reshape(devices, width)
    land_ZJXU = np.broadcast_to(nowhere, send_XJZU.shape).copy()
    for i in np.flatnonzero(np.isin(sender, mine) | np.isin(receiver, mine)):
        patches = np.arange(plan.sizes[i])
        turn, seat = np.divmod(before[i] + patches, width)
        if sender[i] in mine:
            send_XJZU[mine.index(sender[i]), turn, receiver[i], seat] = first[i] + patches
        if receiver[i] in mine:
            land_ZJXU[mine.index(receiver[i]), turn, sender[i], seat] = place[i] + patches
    return send_XJZU, land_ZJXU


@functools.partial(jax.jit, static_argnums=0)
def _moved(mesh: Mesh, patches_PNC, send_XJZU, land_ZJXU):
    def body(patches_PNC, send_1JZU, land_1JXU):
        rows_NC = patches_PNC.reshape(-1, patches_PNC.shape[-1])
        return dep.exchange(rows_NC, send_1JZU[0], land_1JXU[0], len(rows_NC)).reshape(patches_PNC.shape)

    every = PartitionSpec(AXES)
    moved = jax.shard_map(body, mesh=mesh, in_specs=(every,) * 3, out_specs=every, check_vma=False)
    return moved(patches_PNC, send_XJZU, land_ZJXU)


# ---------------------------------------------------------------------------------------------------------- the figures
def metrics(batch: Batch, placed: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> dict[str, float]:
    """`batch_stats` and `dep.balance_metrics` of the whole batch; `batch` is what this process has read of it."""
    if jax.process_count() == 1:
        return batch_stats(batch) | dep.balance_metrics(batch, mesh, config, vision)
    loads = {}  # of each encoder that this process has
    if vision in dep.ENCODERS and len(placed.vision.segments_PN):
        for shard in placed.vision.segments_PN.addressable_shards:
            packs = placed.vision.replace(segments_PN=np.asarray(shard.data))
            loads[shard.index[0].start or 0] = int(pack_flops(packs, config).sum())
    everyone = readers(owners_of(mesh))
    used = int((batch.vision.segments_PN > 0).sum())
    told = gathered({"stats": batch_stats(batch), "loads": list(loads.items()), "patches": used})
    stats = [told[reader.processes[0]]["stats"] for reader in everyone]
    whole = {name: sum(one[name] for one in stats) for name in stats[0]}
    whole["waste_tokens"] /= len(stats)
    slots = placed.vision.segments_PN.size
    patches = sum(told[reader.processes[0]]["patches"] for reader in everyone)
    whole["waste_patches"] = 1 - patches / slots if slots else 0.0
    loads = list(dict(pair for one in told for pair in map(tuple, one["loads"])).values())
    return whole | ({"vision_max_over_mean": max(loads) * mesh.size / sum(loads)} if any(loads) else {})
