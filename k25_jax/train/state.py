"""The training state, on one device or on a mesh."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import Experiment
from k25_jax.models.k25 import init_params, logical_axes
from k25_jax.optim.muonclip import OptimState, muonclip
from k25_jax.parallel import pipeline
from k25_jax.sharding.rules import MEANS, RULES, shardings
from k25_jax.train.trainable import split

HOST = "pinned_host"  # what JAX calls the part of a host's memory that a device reads and writes by itself


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; a checkpoint holds all of it. `opt_state` knows only what is trained."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array  # uint32 key data of the run's random stream


def init_state(experiment: Experiment, mesh: Mesh | None = None) -> TrainState:
    """A fresh state, initialised where it will live on `mesh` (else on one device); its seed is train.seed."""
    if mesh is None:
        return jax.jit(functools.partial(_fresh, experiment))()
    init = lambda: _reordered(_fresh(experiment), experiment, mesh)  # noqa: E731
    return jax.jit(init, out_shardings=state_shardings(experiment, mesh))()


def abstract_state(experiment: Experiment, mesh: Mesh | None = None) -> TrainState:
    """The state as shapes, dtypes and, on a mesh, shardings, to restore into."""
    state = jax.eval_shape(functools.partial(_fresh, experiment))
    if mesh is None:
        return state
    place = lambda a, layout: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout)  # noqa: E731
    return jax.tree.map(place, state, state_shardings(experiment, mesh))


def state_shardings(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The layout of a state: the optimizer's means lie where their parameters lie, or shared out where these are copies.

    With optim.offload the means lie in the memory of each device's host (K2.5 §3.8).
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(functools.partial(_fresh, experiment))
    axes = logical_axes(experiment.model)
    params, means = (shardings(axes, state.params, mesh, rules) for rules in (RULES, MEANS))
    means, _ = split(means, experiment.train.trainable)
    kind = HOST if experiment.optim.offload else None
    place = lambda layout, a: layout.with_memory_kind(kind) if a.ndim else everywhere  # noqa: E731
    mu, nu = (jax.tree.map(place, means, shapes) for shapes in (state.opt_state.mu, state.opt_state.nu))
    return TrainState(everywhere, params, OptimState(everywhere, mu, nu), everywhere)


def in_stages(state: TrainState, experiment: Experiment, mesh: Mesh) -> TrainState:
    """A state as files have it, its stacks in the order of the layers, as the run has it (parallel/pipeline.py).

    Its arrays are taken over: use the returned ones.
    """
    if _as_files_have_it(experiment):
        return state
    move = lambda state: _reordered(state, experiment, mesh)  # noqa: E731
    return jax.jit(move, donate_argnums=0, out_shardings=state_shardings(experiment, mesh))(state)


def in_layers(state: TrainState, experiment: Experiment, mesh: Mesh) -> TrainState:
    """A run's state as files have it: `in_stages` the other way round, with arrays of its own where they differ."""
    if _as_files_have_it(experiment):
        return state
    move = lambda state: _reordered(state, experiment, mesh, back=True)  # noqa: E731
    return jax.jit(move, out_shardings=state_shardings(experiment, mesh))(state)


def _as_files_have_it(experiment: Experiment) -> bool:
    return experiment.mesh.repeats == 1 or experiment.mesh.pipe == 1


def _reordered(state: TrainState, experiment: Experiment, mesh: Mesh, back: bool = False) -> TrainState:
    axes = {"moe": logical_axes(experiment.model).get("moe", {})}

    def moved(tree, axes):
        """Of a tree like that of the parameters, or of a part of it, what is stacked."""
        if isinstance(tree, dict):
            return {name: moved(inner, axes[name]) if name in axes else inner for name, inner in tree.items()}
        tree = jax.device_put(tree, jax.memory.Space.Device)  # from the host's memory, where some may lie
        return pipeline.in_stages(tree, axes, mesh, experiment.mesh.repeats, back) if tree.ndim else tree

    opt_state = state.opt_state._replace(mu=moved(state.opt_state.mu, axes), nu=moved(state.opt_state.nu, axes))
    return state.replace(params=moved(state.params, axes), opt_state=opt_state)


def _fresh(experiment: Experiment) -> TrainState:
    params_key, run_key = jax.random.split(jax.random.key(experiment.train.seed))
    params = init_params(experiment.model, params_key)
    trained, _ = split(params, experiment.train.trainable)
    opt_state = muonclip(experiment.optim, experiment.train.steps).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(run_key))
