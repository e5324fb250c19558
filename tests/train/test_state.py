"""The training state as shapes."""

import jax
import jax.numpy as jnp

from k25_jax.config import load_experiment
from k25_jax.models.k25 import abstract_params
from k25_jax.train.state import abstract_state


def test_the_abstract_state_is_that_of_a_checkpoint(finished):
    """Shapes and types of parameters, two moments each, a step and a key."""
    experiment = load_experiment(str(finished.file))
    state = abstract_state(experiment)
    params = abstract_params(experiment.model)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state.params) == shapes
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert len(moments) == 2 * len([a for a in jax.tree.leaves(params) if a.ndim])
    assert state.step.dtype == jnp.int32 and state.key.dtype == jnp.uint32
