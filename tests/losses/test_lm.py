"""Cross-entropy against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from k25_jax.losses.lm import cross_entropy


def test_equals_torch_with_weights():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 5, 7)).astype(np.float32) * 4, rng.integers(0, 7, (2, 5))
    weights = rng.choice([0.0, 0.5, 1.0], (2, 5)).astype(np.float32)
    loss, metrics = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    each = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 7), torch.tensor(targets).reshape(-1), reduction="none"
    ).numpy()
    np.testing.assert_allclose(loss, (each * weights.reshape(-1)).sum() / weights.sum(), rtol=1e-6)
    right = (logits.argmax(-1) == targets)[weights > 0].mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert float(metrics["target_weight"]) == weights.sum()


def test_places_without_weight_never_count_whatever_they_hold():
    logits = jnp.zeros((1, 3, 4)).at[0, 1].set(jnp.inf)
    weights = jnp.asarray([[1.0, 0.0, 1.0]])
    loss, _ = cross_entropy(logits, jnp.zeros((1, 3), jnp.int32), weights)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    logits = jnp.ones((1, 3, 4))
    nothing = jnp.zeros((1, 3))
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.zeros((1, 3), jnp.int32), nothing)[0])(logits)
    assert value == 0.0 and not np.asarray(grad).any()
