"""Pipeline parallelism with virtual stages: the MoE stack over the `pipe` axis of the mesh (K2.5 §3.8).

With S stages and R repeats the Y layers are S * R blocks of consecutive layers; stage s runs blocks s, S + s, ..., so that
a microbatch goes round the ring of stages R times. M microbatches, a multiple of S, pass in groups of S: a group goes
through all its rounds before the next one enters. All stages work on M * R of M * R + S - 1 ticks.

While a run trains, its stacks lie in the order of the stages: those of stage 0 first, block after block. So a stage has
what it runs, and no weight moves. Files keep the order of the layers (`in_stages`, `in_layers`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec

from k25_jax.config import TextConfig
from k25_jax.models.decoder import block
from k25_jax.models.rope import rope_tables
from k25_jax.sharding.rules import spec

ROWS = ("fsdp", "expert")  # the axes of the mesh that share out the rows of a microbatch


def bubble(stages: int, repeats: int, microbatches: int) -> float:
    """The fraction of its time that a stage waits for others to begin or to end."""
    return (stages - 1) / (microbatches * repeats + stages - 1)


@jax.named_scope("pipeline")
def pipelined(
    stack, x_BLD, segments_BL, positions_BL, config: TextConfig, remat: str, *, repeats: int, microbatches: int, trained
):
    """`scan_layers` of the MoE stack as a pipeline, for a mesh (jax.set_mesh) with `pipe` > 1; and `trained`, as it is.

    Y must be a multiple of pipe * repeats, `microbatches` of pipe, and B of fsdp * expert * microbatches. The stack comes
    in the order of the stages; rows are shared out over (fsdp, expert, pipe). Of the stack the leaves `trained` alone are
    differentiated, and only through what is returned of them: the backward pass begins with its gradient and adds in
    place to it, layer by layer, so that a gradient is held once (train/accumulate.py). What a layer read is kept, and the
    layer computed again, whatever `remat` says. Beside that a stage holds its share of the batch twice, coming and going,
    and three microbatches.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    stages = sizes["pipe"]
    form = dict(f=sizes["fsdp"] * sizes["expert"], s=stages, j=microbatches // stages)
    split = lambda a: rearrange(a, "(f s j b) ... -> s j (f b) ...", **form)  # noqa: E731
    place = lambda a, first: jax.lax.with_sharding_constraint(a, PartitionSpec(first, None, ROWS, "context"))  # noqa: E731

    def on_one_stage(stack, trained, x_1JBLD, segments_SJBL, positions_SJBL):
        run = functools.partial(_run, config, jax.tree.leaves(stack)[0].shape[0] // repeats, stack)
        y_JBLD, stats, trained = _ticks(run, trained, x_1JBLD[0], segments_SJBL, positions_SJBL, stages, repeats)
        return y_JBLD[None], stats, trained

    own, everywhere = PartitionSpec("pipe"), PartitionSpec()
    inputs = place(split(x_BLD), "pipe"), place(split(segments_BL), None), place(split(positions_BL), None)
    y_SJBLD, stats, trained = jax.shard_map(
        on_one_stage,
        in_specs=(own, own, own, everywhere, everywhere),
        out_specs=(own, own, own),
        axis_names={"pipe"},
        check_vma=False,
    )(jax.lax.stop_gradient(stack), trained, *inputs)
    y_BLD = rearrange(place(y_SJBLD, "pipe"), "s j (f b) ... -> (f s j b) ...", **form)
    y_BLD = jax.lax.with_sharding_constraint(y_BLD, PartitionSpec((*ROWS, "pipe"), "context"))
    return y_BLD, stats, trained


# ----------------------------------------------------------------------------------------------- one block of one stage
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(config: TextConfig, size: int, stack, trained, repeat, x_BLD, segments_BL, positions_BL):
    """The block of this repeat, `size` layers of the stage's stack: (x_BLD, what was observed, `trained` as it is).

    Gradients of the weights are added to that of the returned `trained`; the stack has none of its own.
    """
    return _run_forward(config, size, stack, trained, repeat, x_BLD, segments_BL, positions_BL)[0]


def _layer(config: TextConfig, rope, segments_BL, weights, x_BLD):
    x_BLD, observed, _ = block(weights, x_BLD, rope, segments_BL, config)
    return x_BLD, observed


def _run_forward(config, size, stack, trained, repeat, x_BLD, segments_BL, positions_BL):
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_BL)

    def step(x_BLD, i):
        y_BLD, observed = _layer(config, rope, segments_BL, _at(stack, repeat * size + i), x_BLD)
        return y_BLD, (observed, x_BLD)

    y_BLD, (seen, x_YBLD) = jax.lax.scan(step, x_BLD, jnp.arange(size))
    # The names of what is trained come with the gradients; the arrays need not be kept.
    return (y_BLD, seen, trained), (stack, repeat, x_YBLD, segments_BL, positions_BL)


def _run_backward(config, size, saved, gradients):
    stack, repeat, x_YBLD, segments_BL, positions_BL = saved
    dy_BLD, _, dtrained = gradients
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_BL)

    def step(carry, item):
        dx_BLD, dtrained = carry
        i, x_BLD = item
        number = repeat * size + i
        weights = _at(stack, number)
        function = lambda some, x_BLD: _layer(config, rope, segments_BL, _merged(weights, some), x_BLD)  # noqa: E731
        _, pull, _ = jax.vjp(function, _part(weights, dtrained), x_BLD, has_aux=True)
        dweights, dx_BLD = pull(dx_BLD)
        return (dx_BLD, jax.tree.map(functools.partial(_add_at, number), dtrained, dweights)), None

    carry, _ = jax.lax.scan(step, (dy_BLD, dtrained), (jnp.arange(size), x_YBLD), reverse=True)
    dx_BLD, dtrained = carry
    return None, dtrained, None, dx_BLD, None, None


_run.defvjp(_run_forward, _run_backward)


def _at(stack, number):
    """One layer. The barrier keeps the compiler from casting the whole stack before the loop, and holding that as well."""
    layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), stack)
    return jax.lax.optimization_barrier(layer)


def _add_at(number, sum_Y, a):
    here = jax.lax.dynamic_index_in_dim(sum_Y, number, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(sum_Y, here + a.astype(sum_Y.dtype), number, 0)


def _part(tree, like):
    """Of a tree of dictionaries what `like` has too."""
    return {name: _part(tree[name], inner) for name, inner in like.items()} if isinstance(like, dict) else tree


def _merged(tree, some):
    """The tree with `some` of its leaves in their places."""
    if not isinstance(tree, dict):
        return some
    return {name: _merged(inner, some[name]) if name in some else inner for name, inner in tree.items()}


# ------------------------------------------------------------------------------------------------------------ the ticks
def _ticks(run, trained, x_JBLD, segments_SJBL, positions_SJBL, stages: int, repeats: int):
    """On one stage, manual over pipe: its rows of each group in, the same rows out, its layers' statistics, `trained`.

    Inputs move down the ring to stage 0, one stage a tick, as do outputs from the last stage to where their inputs came
    from; between, a microbatch moves up the ring from stage to stage.
    """
    stage, groups = jax.lax.axis_index("pipe"), x_JBLD.shape[0]
    up = [(s, (s + 1) % stages) for s in range(stages)]
    down = [(there, here) for here, there in up]
    length, last = stages * repeats, groups * stages * repeats - 1

    def tick(carry, t):
        arrived, entering, leaving, y_JBLD, stats, trained = carry
        entering = jax.lax.select(t % length == 0, x_JBLD[jnp.minimum(t // length, groups - 1)], entering)
        item = t - stage  # the stage's work, in its order: groups, in them repeats, in them microbatches
        active = (item >= 0) & (item <= last)
        group, within = jnp.divmod(jnp.clip(item, 0, last), length)
        repeat, member = jnp.divmod(within, stages)
        x_BLD = jax.lax.select((stage == 0) & (repeat == 0), entering, arrived)
        x_BLD = jax.lax.select(active, x_BLD, jnp.zeros_like(x_BLD))
        segments_BL = jnp.where(active, segments_SJBL[member, group], 0)  # all padding: no expert has work
        x_BLD, seen, trained = run(trained, repeat, x_BLD, segments_BL, positions_SJBL[member, group])
        stats = _observe(stats, seen, repeat)
        leaving = jax.lax.select((stage == stages - 1) & (repeat == repeats - 1), x_BLD, leaving)
        finished = jnp.maximum(t - (stages - 1), 0) // length  # its group's last tick writes all rows in their places
        y_JBLD = jax.lax.dynamic_update_index_in_dim(y_JBLD, leaving, finished, 0)
        moved = jax.lax.ppermute(x_BLD, "pipe", up), *jax.lax.ppermute((entering, leaving), "pipe", down)
        return (*moved, y_JBLD, stats, trained), None

    nothing = jnp.zeros_like(x_JBLD[0])
    observed = jax.eval_shape(run, trained, 0, nothing, segments_SJBL[0, 0], positions_SJBL[0, 0])[1]
    stats = tuple(
        jnp.full((repeats, *a.shape), start, a.dtype) for a, start in zip(observed, (0, -jnp.inf), strict=True)
    )
    start = nothing, nothing, nothing, jnp.zeros_like(x_JBLD), stats, trained
    *_, y_JBLD, stats, trained = jax.lax.scan(tick, start, jnp.arange(last + stages))[0]
    return y_JBLD, jax.tree.map(lambda a: rearrange(a, "r y ... -> (r y) ..."), stats), trained


def _observe(stats, seen, repeat):
    """Loads add up over microbatches, of the largest logits the largest stays."""
    load_RYE, max_logit_RYH = stats
    load_YE, max_logit_YH = jax.lax.stop_gradient(seen)
    return load_RYE.at[repeat].add(load_YE), max_logit_RYH.at[repeat].max(max_logit_YH)


# ------------------------------------------------------------------------------------------------ the order of the stages
def in_stages(tree, axes, mesh, repeats: int, back: bool = False):
    """Stacks in the order of the layers as stacks in the order of the stages; or `back`. `axes` are their logical axes.

    One all-to-all over pipe a leaf, with room for ceil(R / S) blocks between each two stages; one repeat moves nothing.
    It is manual over all axes: where only pipe is, the compiler first gathers what the other axes split.
    """
    stages = mesh.shape["pipe"]
    if repeats == 1 or stages == 1:
        return tree
    sent_SSC, kept_SR = exchange_tables(stages, repeats, back)

    def exchange(a):
        stage = jax.lax.axis_index("pipe")
        blocks = a.reshape(repeats, -1, *a.shape[1:])[jnp.asarray(sent_SSC)[stage].reshape(-1)]
        received = jax.lax.all_to_all(blocks, "pipe", split_axis=0, concat_axis=0, tiled=True)
        return received[jnp.asarray(kept_SR)[stage]].reshape(a.shape)

    def one(axes, a):
        layout = spec(axes, a.shape, mesh)
        return jax.shard_map(exchange, mesh=mesh, in_specs=layout, out_specs=layout, check_vma=False)(a)

    return jax.tree.map(one, axes, tree, is_leaf=lambda a: isinstance(a, PartitionSpec))


def layers_of(layers: int, stages: int, repeats: int) -> np.ndarray:
    """The layer at each place of a stack that lies in the order of the stages."""
    return rearrange(np.arange(layers), "(r s y) -> (s r y)", r=repeats, s=stages)


def exchange_tables(stages: int, repeats: int, back: bool = False):
    """(sent_SSC, kept_SR): which of its R blocks a stage sends to each stage, and where among those received its own lie.

    In the order of the layers stage s holds blocks s * R up to (s + 1) * R, in that of the stages blocks r * S + s; `back`
    goes from the second to the first. Room that is left over sends block 0.
    """
    capacity = -(-repeats // stages)
    sent_SSC, kept_SR = np.zeros((stages, stages, capacity), np.int32), np.zeros((stages, repeats), np.int32)
    used_SS = np.zeros((stages, stages), np.int32)
    for number in range(stages * repeats):
        (source, index), (repeat, target) = divmod(number, repeats), divmod(number, stages)
        if back:
            source, index, target, repeat = target, repeat, source, index
        sent_SSC[source, target, used_SS[source, target]] = index
        kept_SR[target, repeat] = source * capacity + used_SS[source, target]
        used_SS[source, target] += 1
    return sent_SSC, kept_SR
