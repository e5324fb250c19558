"""The optimizer against arithmetic by hand, and what it decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.config import PRESETS, OptimConfig, load_experiment, preset
from k25_jax.models.k25 import abstract_params
from k25_jax.train.state import abstract_state, decays, make_optimizer

CONFIG = OptimConfig(
    peak_lr=0.1, end_lr=0.02, warmup_steps=2, decay_steps=4, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.25, clip_norm=2.0
)
MATRICES = set(
    "embed head q q_a q_b kv_a k_b v_b o gate up down router kernel qkv out fc0 fc1".split()
)  # everything else is a norm, a bias or the position table


def rate_by_hand(step: int, steps: int) -> float:
    """Two steps of warm-up, then 0.1, and a cosine to 0.02 over the last four."""
    warm = min(1.0, (step + 1) / 2)
    progress = min(max((step - (steps - 4)) / 4, 0), 1)
    return warm * (0.02 + 0.08 * (1 + np.cos(np.pi * progress)) / 2)


def test_the_update_is_clipped_adamw_by_hand():
    rng, steps = np.random.default_rng(0), 8
    params = {"w": rng.normal(size=(3, 2)), "norm": rng.normal(size=3), "fc0_bias": rng.normal(size=2)}
    optimizer = make_optimizer(CONFIG, steps)
    ours = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    opt_state = optimizer.init(ours)
    mean, square = ({name: 0.0 for name in params} for _ in range(2))
    for step in range(steps):
        grads = {name: rng.normal(size=a.shape) * (5 if step % 2 else 0.1) for name, a in params.items()}
        updates, opt_state = optimizer.update(jax.tree.map(jnp.float32, grads), opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            mean[name] = 0.8 * mean[name] + 0.2 * grad
            square[name] = 0.9 * square[name] + 0.1 * grad**2
            adam = (mean[name] / (1 - 0.8 ** (step + 1))) / (np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-6)
            decay = 0.25 * params[name] if name == "w" else 0.0
            params[name] = params[name] - rate_by_hand(step, steps) * (adam + decay)
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}")


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_decay_and_nothing_else(name):
    params = abstract_params(preset(name))
    mask = decays(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for path, decay in jax.tree_util.tree_leaves_with_path(mask):
        assert decay == (path[-1].key in MATRICES), jax.tree_util.keystr(path)


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
