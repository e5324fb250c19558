"""The training state and the optimizer that advances it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from k25_jax.config import Experiment, OptimConfig
from k25_jax.models.k25 import init_params
from k25_jax.optim.schedules import warmup_stable_decay


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; a checkpoint holds all of it."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array  # uint32 key data of the run's random stream


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            warmup_stable_decay(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(params):
    """True for matrices; norms, biases and the position table are not pulled to zero."""

    def is_matrix(path, _):
        name = path[-1].key
        return not ("norm" in name or "bias" in name or name in ("scale", "pos_table"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def init_state(experiment: Experiment) -> TrainState:
    """A fresh state; its seed is train.seed."""
    params_key, run_key = jax.random.split(jax.random.key(experiment.train.seed))
    params = jax.jit(lambda key: init_params(experiment.model, key))(params_key)
    opt_state = jax.jit(make_optimizer(experiment.optim, experiment.train.steps).init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(run_key))


def abstract_state(experiment: Experiment) -> TrainState:
    """The state as shapes and dtypes, to restore into."""
    return jax.eval_shape(lambda: init_state(experiment))
