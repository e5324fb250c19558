"""AdamW with clipping by global norm, as one pass a state: each array is read once and written in place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from k25_jax.config import OptimConfig
from k25_jax.optim.schedules import warmup_stable_decay


class AdamWState(NamedTuple):
    """Steps taken, and the running means of gradients and of their squares."""

    count: jax.Array
    mu: dict
    nu: dict


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of `steps` steps; only matrices decay.

    `update` takes the norm of the gradients, which the caller logs anyway, and `finite`: where that is false the
    updates are zero and the state stays as it was, whatever the gradients hold.
    """
    rate = warmup_stable_decay(config, steps)

    def init(params):
        return AdamWState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(grads, state, params, *, grad_norm, finite):
        clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-30))
        count = jnp.where(finite, state.count + 1, state.count)

        def mean(old, new, decay):
            return jnp.where(finite, decay * old + (1 - decay) * new, old)

        mu = jax.tree.map(lambda m, g: mean(m, g * clip, config.b1), state.mu, grads)
        nu = jax.tree.map(lambda v, g: mean(v, jnp.square(g * clip), config.b2), state.nu, grads)
        mu, nu = jax.lax.optimization_barrier((mu, nu))  # or else XLA computes them twice, from copies of the old ones
        steps_taken = jnp.maximum(count, 1)
        mu_scale, nu_scale = 1 / (1 - config.b1**steps_taken), 1 / (1 - config.b2**steps_taken)
        step_size = -rate(state.count)

        def one(param, m, v, decay):
            direction = m * mu_scale / (jnp.sqrt(v * nu_scale) + config.eps)
            return jnp.where(finite, step_size * (direction + decay * param), -0.0)  # x + -0.0 is x, bit for bit

        decay = jax.tree.map(lambda decayed: config.weight_decay if decayed else 0.0, decays(params))
        return jax.tree.map(one, params, mu, nu, decay), AdamWState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def decays(params):
    """True for matrices; norms, biases and the position table are not pulled to zero."""

    def is_matrix(path, _):
        name = path[-1].key
        return not ("norm" in name or "bias" in name or name in ("scale", "pos_table"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
