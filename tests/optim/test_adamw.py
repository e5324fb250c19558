"""The optimizer against arithmetic by hand and against optax, what it decays, and what a bad step changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k25_jax.config import PRESETS, OptimConfig, preset
from k25_jax.models.k25 import abstract_params
from k25_jax.optim.adamw import adamw, decays
from k25_jax.optim.schedules import warmup_stable_decay

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
    optimizer = adamw(CONFIG, steps)
    ours = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    opt_state = optimizer.init(ours)
    mean, square = ({name: 0.0 for name in params} for _ in range(2))
    for step in range(steps):
        grads = {name: rng.normal(size=a.shape) * (5 if step % 2 else 0.1) for name, a in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        grads_32 = jax.tree.map(jnp.float32, grads)
        updates, opt_state = optimizer.update(grads_32, opt_state, ours, grad_norm=jnp.float32(norm), finite=True)
        ours = jax.tree.map(jnp.add, ours, updates)
        for name, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            mean[name] = 0.8 * mean[name] + 0.2 * grad
            square[name] = 0.9 * square[name] + 0.1 * grad**2
            adam = (mean[name] / (1 - 0.8 ** (step + 1))) / (np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-6)
            decay = 0.25 * params[name] if name == "w" else 0.0
            params[name] = params[name] - rate_by_hand(step, steps) * (adam + decay)
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}")


def test_equals_optax():
    rng, steps = np.random.default_rng(1), 12
    params = {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "scale": jnp.ones(4)}
    ours, optimizer = params, adamw(CONFIG, steps)
    rate = warmup_stable_decay(CONFIG, steps)
    peer = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(rate, CONFIG.b1, CONFIG.b2, CONFIG.eps, weight_decay=CONFIG.weight_decay, mask=decays),
    )
    state, peer_state = optimizer.init(params), peer.init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), params)
        updates, state = optimizer.update(grads, state, ours, grad_norm=optax.tree.norm(grads), finite=True)
        ours = optax.apply_updates(ours, updates)
        updates, peer_state = peer.update(grads, peer_state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_no_bit():
    params = {"w": jnp.asarray([[0.0, -0.0, 1.5, -2.0]])}
    optimizer = adamw(CONFIG, 8)
    grads = {"w": jnp.asarray([[jnp.nan, 1.0, jnp.inf, 0.0]])}
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(grads, state, params, grad_norm=jnp.nan, finite=False)
    assert np.asarray(optax.apply_updates(params, updates)["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_decay_and_nothing_else(name):
    params = abstract_params(preset(name))
    mask = decays(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for path, decay in jax.tree_util.tree_leaves_with_path(mask):
        assert decay == (path[-1].key in MATRICES), jax.tree_util.keystr(path)
