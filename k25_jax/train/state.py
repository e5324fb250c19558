"""The training state."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from k25_jax.config import Experiment
from k25_jax.models.k25 import init_params
from k25_jax.optim.muonclip import muonclip


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; a checkpoint holds all of it."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array  # uint32 key data of the run's random stream


def init_state(experiment: Experiment) -> TrainState:
    """A fresh state; its seed is train.seed."""
    params_key, run_key = jax.random.split(jax.random.key(experiment.train.seed))
    params = jax.jit(lambda key: init_params(experiment.model, key))(params_key)
    opt_state = jax.jit(muonclip(experiment.optim, experiment.train.steps).init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(run_key))


def abstract_state(experiment: Experiment) -> TrainState:
    """The state as shapes and dtypes, to restore into."""
    return jax.eval_shape(lambda: init_state(experiment))
