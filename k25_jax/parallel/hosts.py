"""One batch from those that several processes read: its rows stay, its images go where they are encoded (K2.5 §3.8).

Every process reads, decodes and packs its own share of the data. Then all learn how large each clip is and where its tokens
are, balance the clips over the devices of all, each for itself and all alike, and the pixels travel as the features will
(parallel/routes.py). `planned` is the host's work, for which a thread may take the time that the devices need for the step
before; `placed` launches programs on them, which all processes must launch in one order: call it from the main thread.

What it costs beyond one process: a gather of the hosts' figures a step, by way of process 0; pixels go over the network
twice, a third of the bytes of the features at the width of K2.5, and are thrice on a device for a moment. A process makes
the tables of its own devices alone, in time proportional to the clips of the whole batch (benchmarks/host_plan.py).
"""

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import Experiment, VisionConfig
from k25_jax.data.packing import Batch, batch_stats, row_arrays
from k25_jax.parallel import dep
from k25_jax.parallel.routes import Runs, Tables, form_of, tables
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.processes import Reader, assembled, gathered, own_reader, owners_of, readers, spread
from k25_jax.vision.patchpack import balance, blank_pack, clip_flops, write_grid


@dataclass(frozen=True)
class Planned:
    """A batch before it is on the devices: what this process has of it, on the host, and where that goes."""

    batch: Batch  # own rows, striped; own packs, their pixels as they were read; tables of own devices
    pixels: Tables | None  # tables by which pixels travel, where they do
    metrics: dict[str, float]  # of the whole batch: `batch_stats` and the balance of vision
    mesh: Mesh
    vision: str  # train.vision
    rows: tuple[int, ...]  # the blocks of rows that it has; of a pack and a table it has those of its devices
    devices: tuple[int, ...]
    read: tuple[int, ...]  # devices whose share of pixels it has read


def planned(batch: Batch, mesh: Mesh, experiment: Experiment, channel: str = "train") -> Planned:
    """Where all of the batch goes whose rows and packs the processes have read, each its own; all must call it.

    In one process the batch is whole. In several, a reader's rows become those of its blocks of rows, in their order;
    threads that plan at the same time have a `channel` each.
    """
    config, vision, owners = experiment.model.vision, experiment.train.vision, owners_of(mesh)
    everyone = readers(owners)
    own = everyone[own_reader(everyone)]
    mine = tuple(np.flatnonzero(owners == jax.process_index()).tolist())
    if jax.process_count() > 1:
        told = gathered(what_to_tell(batch, config), f"plan/{channel}")
        return planned_as_told(told, batch, everyone, own, mine, mesh, experiment)
    metrics = batch_stats(batch) | dep.balance_metrics(batch, mesh, config, vision)
    batch = _with_routes(batch, dep.clips_in(batch.media_BL), len(batch.vision.segments_PN), mine, mesh, experiment)
    return Planned(batch, None, metrics, mesh, vision, own.rows, mine, own.devices)


def planned_as_told(
    told: list[dict], batch: Batch, everyone: list[Reader], own: Reader, mine, mesh, experiment: Experiment
) -> Planned:
    """What `planned` returns for the devices `mine` of a process that reads as `own`, when it knows what all have told."""
    config, vision = experiment.model.vision, experiment.train.vision
    told = [told[reader.processes[0]] for reader in everyone]
    slots, rows = batch.vision.segments_PN.shape[1], len(batch.media_BL)
    plan = make_plan(told, everyone, mesh.size, slots, rows, config)
    metrics = plan.stats(told) | plan.balance_metrics(mesh, config, vision)
    batch, pixels = _as_encoded(batch, plan, own, mine, mesh.size, config)
    batch = _with_routes(batch, plan.clips(config.group), plan.packs, mine, mesh, experiment)
    return Planned(batch, pixels, metrics, mesh, vision, own.rows, mine, own.devices)


def _with_routes(batch: Batch, clips: dep.Clips, packs: int, mine, mesh, experiment: Experiment) -> Batch:
    """The batch striped, with the tables of the devices `mine` where features travel."""
    batch = dep.striped(batch, mesh.shape["context"])
    if not dep.travels(packs, mesh, experiment.train.vision):
        return batch
    return batch.replace(routes=dep.routes_of(clips, dep.exchange_of(experiment, mesh), mine))


def place(batch: Batch, mesh: Mesh, experiment: Experiment) -> Batch:
    """A batch planned and placed at once."""
    return placed(planned(batch, mesh, experiment))


def placed(plan: Planned) -> Batch:
    """The batch on the devices of all processes; all must call it, in one order with whatever else they launch."""
    batch, mesh = plan.batch, plan.mesh
    if jax.process_count() == 1:
        return jax.device_put(batch, dep.layout(batch, mesh, plan.vision))
    blocks = sum(len(reader.rows) for reader in readers(owners_of(mesh)))
    rows, length = batch.media_BL.shape
    whole, own = jax.ShapeDtypeStruct((rows // len(plan.rows) * blocks, length), np.int32), row_arrays(batch)
    layout = dep.layout(batch.replace(**dict.fromkeys(own, whole)), mesh, plan.vision)
    rows = {name: assembled(a_BL, plan.rows, blocks, getattr(layout, name)) for name, a_BL in own.items()}
    return batch.replace(
        **rows,
        vision=_packs(plan, layout.vision),
        routes=batch.routes and Tables(
            *(assembled(a, plan.devices, mesh.size, where, axis) for a, where, axis in
              zip(batch.routes, layout.routes, (0, 1, 1), strict=True))
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """Where each clip of the whole batch was read, is encoded, and has its tokens; every process makes the same.

    A place is the number of a clip's first patch slot among the slots of all packs.
    """

    packs: int
    slots: int  # of a pack
    dtype: str  # of the pixels
    grids: np.ndarray  # [clips, 3]: frames, rows, columns of patches
    homes: np.ndarray  # [clips, 2]: row and column of the first token
    read: np.ndarray  # [clips]: place in the packs as their readers filled them
    encoded: np.ndarray  # [clips]: place in the packs as they are encoded
    segments: np.ndarray  # [clips]: number in that pack
    tokens: np.ndarray  # [clips]: first token in that pack

    @property
    def sizes(self) -> np.ndarray:
        """Patches of each clip."""
        return self.grids.prod(axis=1)

    def clips(self, group: int) -> dep.Clips:
        """The clips as their tokens lie in the rows of the whole batch."""
        first = self.encoded // max(self.slots, 1) * (self.slots // group) + self.tokens
        return dep.Clips(self.homes[:, 0], self.homes[:, 1], self.grids[:, 1:].prod(axis=1) // group, first)

    def stats(self, told: list[dict]) -> dict[str, float]:
        """`batch_stats` of the whole batch, from those that each has told."""
        whole = {name: sum(one["stats"][name] for one in told) for name in told[0]["stats"]}
        whole["waste_tokens"] /= len(told)
        whole["waste_patches"] = 1 - float(self.sizes.sum()) / (self.packs * self.slots) if self.packs else 0.0
        return whole

    def balance_metrics(self, mesh: Mesh, config: VisionConfig, vision: str) -> dict[str, float]:
        """`dep.balance_metrics` of the whole batch."""
        if vision not in dep.ENCODERS or not len(self.sizes):
            return {}
        shares = dep.encoders(mesh, vision)
        device = self.encoded // (self.packs // shares * self.slots)
        loads = np.bincount(device, clip_flops(self.sizes, config).astype(float), minlength=shares)
        return {"vision_max_over_mean": float(loads.max() * mesh.size / loads.sum())}


def what_to_tell(batch: Batch, config: VisionConfig) -> dict:
    """What the others need to know of the share that this process has read, as JSON."""
    return {
        "clips": _clips(batch, config).tolist(),
        "packs": len(batch.vision.patches_PNC),
        "dtype": str(batch.vision.patches_PNC.dtype),
        "stats": batch_stats(batch),
    }


def make_plan(
    told: list[dict], everyone: list[Reader], devices: int, slots: int, rows: int, config: VisionConfig
) -> Plan:
    """The clips of all, balanced over the packs of all devices; each has told of packs of `slots`, and of `rows`."""
    most = max(told, key=lambda one: one["packs"])
    packs = most["packs"] * len(everyone)
    share = packs // devices * slots  # of a device
    clips = np.concatenate(
        [_numbered(one["clips"], reader, share, rows) for one, reader in zip(told, everyone, strict=True)]
    )
    read, grids, homes = clips[:, 0], clips[:, 1:4], clips[:, 4:]
    sizes = grids.prod(axis=1).tolist()
    placement = balance(sizes, packs, slots, config, (read // slots).tolist()) if packs else []
    return Plan(
        packs, slots, most["dtype"], grids, homes, read, *_lay_out(placement, grids, packs, slots, config.group)
    )


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
def _as_encoded(batch: Batch, plan: Plan, own: Reader, mine, devices: int, config: VisionConfig):
    """(the batch with media_BL and packs of its devices as the plan has them, tables by which the pixels travel)."""
    share = plan.packs // devices
    pack = blank_pack(share * len(mine), plan.slots, 0, plan.dtype)
    device = plan.encoded // max(share * plan.slots, 1)
    here = {number: place for place, number in enumerate(mine)}
    for i in np.flatnonzero(np.isin(device, mine)).tolist():
        index, start = divmod(int(plan.encoded[i]), plan.slots)
        index = here[index // share] * share + index % share
        write_grid(pack, index, start, plan.segments[i], plan.tokens[i], plan.grids[i].tolist(), config.merge)
    patches_PNC = batch.vision.patches_PNC
    if not len(patches_PNC):
        patches_PNC = np.zeros((share * len(own.devices), plan.slots, config.patch_dim), plan.dtype)
    batch = batch.replace(vision=pack.replace(patches_PNC=patches_PNC), media_BL=_media(batch, plan, own, config))
    moves = (plan.read != plan.encoded).any()
    return batch, pixel_tables(plan, mine, devices) if moves else None


def _media(batch: Batch, plan: Plan, own: Reader, config: VisionConfig) -> np.ndarray:
    """media_BL of the own rows; those of a reader are its blocks of rows, in their order."""
    media_BL, clips = np.full_like(batch.media_BL, -1), plan.clips(config.group)
    high = len(media_BL) // len(own.rows)
    for i in np.flatnonzero(np.isin(clips.row // high, own.rows)).tolist():
        block, row = divmod(int(clips.row[i]), high)
        column, count, first = (int(a[i]) for a in clips[1:])
        media_BL[own.rows.index(block) * high + row, column : column + count] = np.arange(first, first + count)
    return media_BL


def pixel_tables(plan: Plan, mine, devices: int) -> Tables:
    """The tables of the devices `mine`, of one part: from where pixels were read to where they are encoded."""
    share = plan.packs // devices * plan.slots
    sender, first = np.divmod(plan.read, share)
    receiver, place = np.divmod(plan.encoded, share)
    runs = Runs(sender, np.zeros_like(sender), receiver, plan.sizes, first, place)
    found = tables(runs, form_of(devices, share, share), mine, share, share)
    return found._replace(pick_AXJZU=found.pick_AXJZU[0], land_AXJZU=found.land_AXJZU[0])


def _packs(plan: Planned, layout):
    """The packs of the whole batch as they are encoded, over all devices."""
    packs, mesh = plan.batch.vision, plan.mesh
    if not len(packs.segments_PN):
        return jax.tree.map(spread, packs, layout)
    over_all = NamedSharding(mesh, PartitionSpec(AXES))
    patches_PNC = assembled(packs.patches_PNC, plan.read, mesh.size, over_all)
    if plan.pixels:
        tables = (assembled(table, plan.devices, mesh.size, over_all) for table in plan.pixels)
        patches_PNC = _moved(mesh, patches_PNC, *tables)
    rest = jax.tree.map(lambda a: assembled(a, plan.devices, mesh.size, over_all), packs.replace(patches_PNC=None))
    return jax.device_put(rest.replace(patches_PNC=patches_PNC), layout)


@functools.partial(jax.jit, static_argnums=0)
def _moved(mesh: Mesh, patches_PNC, spread_XJZU, pick_XJZU, land_XJZU):
    def body(patches_PNC, spread_1JZU, pick_1JZU, land_1JZU):
        rows_NC = patches_PNC.reshape(-1, patches_PNC.shape[-1])
        kept_NC = dep.spread(rows_NC, spread_1JZU[0])
        return dep.moved(kept_NC, pick_1JZU[0], land_1JZU[0], len(rows_NC)).reshape(patches_PNC.shape)

    every = PartitionSpec(AXES)
    moved = jax.shard_map(body, mesh=mesh, in_specs=(every,) * 4, out_specs=every, check_vma=False)
    return moved(patches_PNC, spread_XJZU, pick_XJZU, land_XJZU)
