"""Pipeline parallelism with virtual stages: the MoE stack over the `pipe` axis of the mesh (K2.5 §3.8).

With S stages and R repeats the Y layers are S * R blocks of consecutive layers; stage s runs blocks s, S + s, ..., so that
a microbatch goes round the ring of stages R times. M microbatches, a multiple of S, pass in groups of S: a group goes
through all its rounds before the next one enters. All stages work on M * R of M * R + S - 1 ticks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec

from k25_jax.config import TextConfig
from k25_jax.models.decoder import moe_axes, scan_layers
from k25_jax.models.k25 import cast
from k25_jax.models.layers import rematerialised
from k25_jax.models.masters import Master
from k25_jax.sharding.rules import spec

ROWS = ("fsdp", "expert")  # the axes of the mesh that share out the rows of a microbatch


def bubble(stages: int, repeats: int, microbatches: int) -> float:
    """The fraction of its time that a stage waits for others to begin or to end."""
    return (stages - 1) / (microbatches * repeats + stages - 1)


def pipelined(
    stack, x_BLD, segments_BL, positions_BL, config: TextConfig, remat: str, *, repeats: int, microbatches: int
):
    """`scan_layers` of the MoE stack as a pipeline, for a mesh (jax.set_mesh) with `pipe` > 1; the same results.

    Y must be a multiple of pipe * repeats, `microbatches` of pipe, and B of fsdp * expert * microbatches. Parameters come
    and gradients go in natural order, each stage with a contiguous share; rows are shared out over (fsdp, expert, pipe).
    Beside what `remat` keeps, a stage holds its share of the batch twice, coming and going, and three microbatches.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    stages = sizes["pipe"]
    form = dict(f=sizes["fsdp"] * sizes["expert"], s=stages, j=microbatches // stages)
    split = lambda a: rearrange(a, "(f s j b) ... -> s j (f b) ...", **form)  # noqa: E731
    place = lambda a, first: jax.lax.with_sharding_constraint(a, PartitionSpec(first, None, ROWS, "context"))  # noqa: E731

    def on_one_stage(blocks, x_1JBLD, segments_SJBL, positions_SJBL):
        run = _block_runner(blocks, config, remat)
        y_JBLD, stats = _ticks(run, x_1JBLD[0], segments_SJBL, positions_SJBL, stages, repeats)
        return y_JBLD[None], jax.tree.map(lambda a: a[:, None], stats)

    own, everywhere, second = PartitionSpec("pipe"), PartitionSpec(), PartitionSpec(None, "pipe")
    inputs = place(split(x_BLD), "pipe"), place(split(segments_BL), None), place(split(positions_BL), None)
    y_SJBLD, stats = jax.shard_map(
        on_one_stage,
        in_specs=(second, own, everywhere, everywhere),
        out_specs=(own, second),
        axis_names={"pipe"},
        check_vma=False,
    )(own_blocks(stack, config, repeats, x_BLD.dtype), *inputs)
    y_BLD = rearrange(place(y_SJBLD, "pipe"), "s j (f b) ... -> (f s j b) ...", **form)
    y_BLD = jax.lax.with_sharding_constraint(y_BLD, PartitionSpec((*ROWS, "pipe"), "context"))
    return y_BLD, jax.tree.map(lambda a: rearrange(a, "r s y ... -> (r s y) ..."), stats)


def _block_runner(blocks, config: TextConfig, remat: str):
    """run(repeat, x_BLD, segments_BL, positions_BL): the stage's block of that repeat, as `scan_layers`.

    The backward pass takes a block's weights anew, unless `remat` is "none": kept, they fill the memory once a tick.
    """

    def run(repeat, x_BLD, segments_BL, positions_BL):
        block = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, repeat, keepdims=False), blocks)
        return scan_layers(block, x_BLD, segments_BL, positions_BL, config, remat)

    return rematerialised(run, remat, names=("layer",))


def _ticks(run, x_JBLD, segments_SJBL, positions_SJBL, stages: int, repeats: int):
    """On one stage, manual over pipe: its rows of each group in, the same rows out, and its layers' statistics [R,Y,...].

    Inputs move down the ring to stage 0, one stage a tick, as do outputs from the last stage to where their inputs came
    from; between, a microbatch moves up the ring from stage to stage.
    """
    stage, groups = jax.lax.axis_index("pipe"), x_JBLD.shape[0]
    up = [(s, (s + 1) % stages) for s in range(stages)]
    down = [(there, here) for here, there in up]
    length, last = stages * repeats, groups * stages * repeats - 1

    def tick(carry, t):
        arrived, entering, leaving, y_JBLD, stats = carry
        entering = jax.lax.select(t % length == 0, x_JBLD[jnp.minimum(t // length, groups - 1)], entering)
        item = t - stage  # the stage's work, in its order: groups, in them repeats, in them microbatches
        active = (item >= 0) & (item <= last)
        group, within = jnp.divmod(jnp.clip(item, 0, last), length)
        repeat, member = jnp.divmod(within, stages)
        x_BLD = jax.lax.select((stage == 0) & (repeat == 0), entering, arrived)
        x_BLD = jax.lax.select(active, x_BLD, jnp.zeros_like(x_BLD))
        segments_BL = jnp.where(active, segments_SJBL[member, group], 0)  # all padding: no expert has work
        x_BLD, seen = run(repeat, x_BLD, segments_BL, positions_SJBL[member, group])
        stats = _observe(stats, seen, repeat)
        leaving = jax.lax.select((stage == stages - 1) & (repeat == repeats - 1), x_BLD, leaving)
        finished = jnp.maximum(t - (stages - 1), 0) // length  # its group's last tick writes all rows in their places
        y_JBLD = jax.lax.dynamic_update_index_in_dim(y_JBLD, leaving, finished, 0)
        moved = jax.lax.ppermute(x_BLD, "pipe", up), *jax.lax.ppermute((entering, leaving), "pipe", down)
        return (*moved, y_JBLD, stats), None

    nothing = jnp.zeros_like(x_JBLD[0])
    observed = jax.eval_shape(run, 0, nothing, segments_SJBL[0, 0], positions_SJBL[0, 0])[1]
    stats = tuple(
        jnp.full((repeats, *a.shape), start, a.dtype) for a, start in zip(observed, (0, -jnp.inf), strict=True)
    )
    start = nothing, nothing, nothing, jnp.zeros_like(x_JBLD), stats
    *_, y_JBLD, stats = jax.lax.scan(tick, start, jnp.arange(last + stages))[0]
    return y_JBLD, stats


def _observe(stats, seen, repeat):
    """Loads add up over microbatches, of the largest logits the largest stays."""
    load_RYE, max_logit_RYH = stats
    load_YE, max_logit_YH = jax.lax.stop_gradient(seen)
    return load_RYE.at[repeat].add(load_YE), max_logit_RYH.at[repeat].max(max_logit_YH)


# ------------------------------------------------------------------------------------------------------ virtual stages
def own_blocks(stack, config: TextConfig, repeats: int, dtype):
    """The stack [Y, ...], natural order over pipe, as [R, Y/R, ...]: of each row a stage holds the block it runs.

    One all_to_all over pipe, with room for ceil(R / S) blocks between each two stages; one repeat moves nothing. It is
    manual over all axes: where only pipe is, the compiler first gathers what the other axes split. Weights move, and are
    held, in `dtype`, their gradients in float32: the masters that move as well are never read, so that they do not.
    """
    if repeats == 1:
        return jax.tree.map(lambda a: a[None], stack)
    mesh = jax.sharding.get_abstract_mesh()
    sent_SSC, kept_SR = exchange_tables(mesh.shape["pipe"], repeats)

    def exchange(a):
        stage = jax.lax.axis_index("pipe")
        blocks = a.reshape(repeats, -1, *a.shape[1:])[jnp.asarray(sent_SSC)[stage].reshape(-1)]
        received = jax.lax.all_to_all(blocks, "pipe", split_axis=0, concat_axis=0, tiled=True)
        return received[jnp.asarray(kept_SR)[stage]]

    def one(axes, a):
        layout = spec(axes, a.shape, mesh)
        after = PartitionSpec(None, *layout)
        return jax.shard_map(exchange, in_specs=layout, out_specs=after, check_vma=False)(a)

    def beside(axes, a, narrow):
        return one(axes, a) if a.dtype == narrow.dtype else Master(one(axes, a), one(axes, narrow))

    is_axes = lambda a: isinstance(a, PartitionSpec)  # noqa: E731
    return jax.tree.map(beside, moe_axes(config), stack, cast(stack, dtype), is_leaf=is_axes)


def exchange_tables(stages: int, repeats: int):
    """(sent_SSC, kept_SR): which of its R blocks a stage sends to each stage, and where among those received its own lie.

    Stage s holds blocks s * R up to (s + 1) * R and runs blocks r * S + s. Room that is left over sends block 0.
    """
    capacity = -(-repeats // stages)
    sent_SSC, kept_SR = np.zeros((stages, stages, capacity), np.int32), np.zeros((stages, repeats), np.int32)
    used_SS = np.zeros((stages, stages), np.int32)
    for block in range(stages * repeats):
        (source, index), (repeat, target) = divmod(block, repeats), divmod(block, stages)
        sent_SSC[source, target, used_SS[source, target]] = index
        kept_SR[target, repeat] = source * capacity + used_SS[source, target]
        used_SS[source, target] += 1
    return sent_SSC, kept_SR
