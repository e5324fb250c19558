"""Decoupled encoder process: vision is balanced over all devices, whatever the backbone does with them (K2.5 §3.8).

Phase 1: every device encodes its own packs under one checkpoint a pack, so nothing of the encoder is held while the
backbone runs, and sends the features on, so that each device keeps as many. Phase 2: the backbone takes the batch in parts
(train/accumulate.py) and each part collects the features of its tokens, by tables that the host builds (parallel/routes.py).
Phase 3: when all parts have sent back the gradients of their features, these go back to the encoders; each device encodes
its packs again, and the gradients of the replicated weights are added up. All three are plain autodiff; the exchange is its
own transpose with its tables the other way round.

What is exchanged is fixed by shapes, for the worst batch: rows of images from end to end. For 16384 rows in 16 parts on
256 chips this is 12 GB a chip and step, of which a batch with a tenth of vision needs 3; such a step takes three minutes. A
loop as long as the batch needs would save some tenths of a second of them, but have a gradient of its own, and preflight
could not know what it exchanges. Where batches are known, `train.vision_rounds` makes it less.

Arms for comparison (`train.vision`): "stage0" encodes on the first stage of the pipeline only; "plain" leaves it to the
compiler: every device encodes every pack, and `train.remat` says what is held.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import Experiment, K25Config, VisionConfig
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import vision_features
from k25_jax.parallel.routes import Form, RouteError, Runs, Tables, form_of, tables
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES, batch_shardings
from k25_jax.vision.patchpack import pack_flops

SMALL = 2**17  # numbers of a leaf
ENCODERS = {"dep": AXES, "stage0": AXES[1:]}  # the axes that the packs are split over


class Clips(NamedTuple):
    """Tokens of images that follow each other in a row, as their features do: an array entry for each such run."""

    row: np.ndarray
    column: np.ndarray  # of the first token
    count: np.ndarray
    feature: np.ndarray  # number of the first feature, among those of all packs


# ------------------------------------------------------------------------------------------------------------- the layout
def encoders(mesh: Mesh, vision: str = "dep") -> int:
    """The number of devices that the packs are split over."""
    return int(np.prod([mesh.shape[axis] for axis in ENCODERS.get(vision, ())], dtype=int))


def travels(packs: int, mesh: Mesh, vision: str) -> bool:
    """Whether features are encoded on other devices than those of their tokens."""
    return mesh.size > 1 and packs > 0 and vision in ENCODERS


def layout(batch: Batch, mesh: Mesh, vision: str):
    """NamedShardings of a batch with its tables, if it has any."""
    out = batch_shardings(batch, mesh)
    if batch.routes is None:
        return out
    packs, first, second = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((ENCODERS[vision],), (AXES,), (None, AXES))
    )
    return out.replace(vision=jax.tree.map(lambda _: packs, batch.vision), routes=Tables(first, second, second))


def striped(batch: Batch, shares: int) -> Batch:
    """Rows in which places 0, n, 2 n, ... come first, then 1, n + 1, ...; n shares."""
    reorder = lambda a: rearrange(a, "b (l n) -> b (n l)", n=shares)  # noqa: E731
    return jax.tree.map(reorder, batch.replace(vision=None)).replace(vision=batch.vision)


# -------------------------------------------------------------------------------------------------------------- the tables
class Exchange(NamedTuple):
    """What is exchanged in a step, known before any batch is."""

    shape: dict[str, int]  # of the mesh
    vision: str  # dep | stage0
    rows: int
    length: int
    sent: int  # features of a device that encodes
    tokens: int  # places of a device in a part
    form: Form


def exchange_of(experiment: Experiment, mesh: Mesh) -> Exchange | None:
    """The exchange of the run's batches on `mesh`, by the config alone; None where features need not travel."""
    data, train = experiment.data, experiment.train
    if not travels(data.packs, mesh, train.vision):
        return None
    features = data.packs * data.pack_patches // experiment.model.vision.group
    sent, parts = features // encoders(mesh, train.vision), train.accumulate
    tokens = data.batch_size * data.seq_len // mesh.size // parts
    form = form_of(mesh.size, sent, min(tokens, features), parts, train.vision_rounds)
    return Exchange(dict(mesh.shape), train.vision, data.batch_size, data.seq_len, sent, tokens, form)


def abstract_routes(exchange: Exchange) -> Tables:
    """Tables as shapes."""
    form = exchange.form
    spread = form.devices, form.spreads, form.devices, form.spread
    second = form.parts, form.devices, form.rounds, form.devices, form.width
    return Tables(*(jax.ShapeDtypeStruct(shape, np.int32) for shape in (spread, second, second)))


def routes_of(clips: Clips, exchange: Exchange, here) -> Tables:
    """The tables of the devices `here`, as places in mesh.devices flattened; raises RouteError where rounds are too few."""
    try:
        return tables(_runs(clips, exchange), exchange.form, here, exchange.sent, exchange.tokens)
    except RouteError as error:
        raise RouteError(f"{error}; set train.vision_rounds to that, or to 0 for as many as any batch needs") from error


def clips_in(media_BL: np.ndarray) -> Clips:
    """The clips of a whole batch; neighbours whose features follow each other too are taken for one."""
    row, column = np.nonzero(media_BL >= 0)
    feature = media_BL[row, column].astype(np.int64)
    follows = (np.diff(row) == 0) & (np.diff(column) == 1) & (np.diff(feature) == 1)
    first = np.flatnonzero(np.concatenate([np.ones(min(len(row), 1), bool), ~follows]))
    return Clips(row[first], column[first], np.diff(first, append=len(row)), feature[first])


def _runs(clips: Clips, exchange: Exchange) -> Runs:
    """The clips cut where the sender, or by stripes the receiver changes."""
    shape, parts = exchange.shape, exchange.form.parts
    number = np.arange(exchange.form.devices).reshape([shape[axis] for axis in AXES])
    axes = [AXES.index(axis) for axis in (*RULES["batch"], RULES["length"])]
    stripes = shape[RULES["length"]]
    homes = number.transpose(axes).reshape(-1, stripes)  # of each block of rows, and of the stripes in it
    senders = (number if exchange.vision == "dep" else number[0]).reshape(-1)  # of each block of packs

    row, column, count, feature = _cut(clips, exchange.sent)
    stripe = np.repeat(np.arange(stripes), len(row))
    row, column, count, feature = (np.tile(a, stripes) for a in (row, column, count, feature))
    skipped = (stripe - column) % stripes  # tokens before the first one of this stripe
    some = skipped < count
    stripe, skipped, row, column, count, feature = (a[some] for a in (stripe, skipped, row, column, count, feature))
    block, row = np.divmod(row, exchange.rows // len(homes))
    part, row = np.divmod(row, exchange.rows // len(homes) // parts)
    landing = row * (exchange.length // stripes) + (column + skipped) // stripes
    sender, first = np.divmod(feature + skipped, exchange.sent)
    sizes = -(-(count - skipped) // stripes)
    return Runs(senders[sender], part, homes[block, stripe], sizes, first, landing, stripes)


def _cut(clips: Clips, sent: int) -> Clips:
    """Clips of which none has features of two senders."""
    first, last = clips.feature // sent, (clips.feature + clips.count - 1) // sent
    which = np.repeat(np.arange(len(first)), last - first + 1)
    turn = np.arange(len(which)) - np.searchsorted(which, which)
    row, column, count, feature = (a[which] for a in clips)
    begin = np.maximum(feature, (first[which] + turn) * sent)
    end = np.minimum(feature + count, (first[which] + turn + 1) * sent)
    return Clips(row, column + begin - feature, end - begin, begin)


# ---------------------------------------------------------------------------------------------------------- on the devices
@jax.named_scope("dep.encode")
def features(params, batch: Batch, config: K25Config, dtype=jnp.float32, vision="dep", remat="full"):
    """The features of the batch where they are kept for its parts: [devices * kept, D], split over all axes (K2.5 §3.8).

    `batch` has `routes`; call it under jax.set_mesh of its mesh. `remat` is that of `vision_features`.
    """

    def body(large, small, packs, spread_1JZU):
        weights = joined(large, small)
        encode = functools.partial(vision_features, weights, packs, config, remat, dtype)
        return spread(_on_first_stage(encode) if vision == "stage0" else encode(), spread_1JZU[0])

    large, small, joined = small_together({"vision": params["vision"], "projector": params["projector"]})
    every, packs = (PartitionSpec(axes) for axes in (AXES, ENCODERS[vision]))
    specs = PartitionSpec(), PartitionSpec(), packs, every
    return jax.shard_map(body, in_specs=specs, out_specs=every, check_vma=False)(
        large, small, batch.vision, batch.routes.spread_XJZU
    )


@jax.named_scope("dep.exchange")
def at_tokens(features_ID, routes: Tables, media_BL):
    """The feature of every token of a part that has one, else 0: [B,L,D], its rows laid out as those of the batch.

    `features_ID` are those of `features`; `routes` are the tables of this part.
    """

    def body(features_ID, pick_1JZU, land_1JZU, media_BL):
        x_TD = moved(features_ID, pick_1JZU[0], land_1JZU[0], media_BL.size)
        return x_TD.reshape(*media_BL.shape, -1)

    rows, every = PartitionSpec(RULES["batch"], RULES["length"]), PartitionSpec(AXES)
    return jax.shard_map(body, in_specs=(every, every, every, rows), out_specs=rows, check_vma=False)(
        features_ID, routes.pick_AXJZU, routes.land_AXJZU, media_BL
    )


def spread(items_ID, spread_JZU):
    """One device's items to the devices that keep them for a while; what it keeps itself. Inside shard_map."""
    places = spread_JZU.size
    return moved(items_ID, spread_JZU, jnp.arange(places).reshape(spread_JZU.shape), places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def moved(items_ID, pick_JZU, land_JXU, places: int):
    """Send items by their numbers to each device, in rounds; lay what comes from each in its place: [places, D].

    A number that is too large stands for nothing, 0. Places where nothing comes are 0. Inside shard_map over all axes.
    Rounds follow each other in a loop, so that each takes the memory of the one before.
    """

    def one_round(out_TD, tables):
        pick_ZU, land_XU = tables
        sent_ZUD = items_ID.at[pick_ZU].get(mode="fill", fill_value=0)
        received_XUD = jax.lax.all_to_all(sent_ZUD, AXES, split_axis=0, concat_axis=0, tiled=True)
        return out_TD.at[land_XU].add(received_XUD, mode="drop", unique_indices=True), None

    out_TD = jnp.zeros((places, items_ID.shape[-1]), items_ID.dtype)
    return jax.lax.scan(one_round, out_TD, (pick_JZU, land_JXU))[0]


def _moved_forward(items_ID, pick_JZU, land_JXU, places):
    nothing = jnp.zeros((len(items_ID), 0))  # says how many there were
    return moved(items_ID, pick_JZU, land_JXU, places), (nothing, pick_JZU, land_JXU)


def _moved_backward(places, saved, dout_TD):
    """Each gradient goes back the way its item came; no place has two, so none are added up."""
    nothing, pick_JZU, land_JXU = saved
    return moved(dout_TD, land_JXU, pick_JZU, len(nothing)), None, None


moved.defvjp(_moved_forward, _moved_backward)


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


def _on_first_stage(compute):
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))  # noqa: E731
    return jax.lax.cond(jax.lax.axis_index("pipe") == 0, compute, nothing)


def balance_metrics(batch: Batch, mesh: Mesh, config: VisionConfig, vision: str = "dep") -> dict[str, float]:
    """FLOPs of the device with the most vision over the mean of all devices; nothing for text or one device."""
    if vision not in ENCODERS or mesh.size == 1 or not len(batch.vision.patches_PNC):
        return {}
    loads = pack_flops(batch.vision, config).reshape(encoders(mesh, vision), -1).sum(axis=1)
    return {"vision_max_over_mean": float(loads.max() * mesh.size / loads.sum())}
