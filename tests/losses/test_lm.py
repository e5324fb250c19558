"""Cross-entropy against PyTorch's, in one chunk and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from k25_jax.losses.lm import cross_entropy, vocabulary_scores

CHUNKS = [100, 7, 3, 2]  # of 7 words: one, exactly one, and some that end in the middle of a chunk


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_torch_with_weights(chunk):
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((2, 5, 3)).astype(np.float32) * 3, rng.standard_normal((3, 7)).astype(np.float32)
    targets, weights = rng.integers(0, 7, (2, 5)), rng.choice([0.0, 0.5, 1.0], (2, 5)).astype(np.float32)
    loss_of = lambda x, head: cross_entropy(x, head, jnp.asarray(targets), jnp.asarray(weights), chunk=chunk)  # noqa: E731
    (loss, metrics), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(x, head)
    x_torch, head_torch = torch.tensor(x, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = x_torch @ head_torch
    each = torch.nn.functional.cross_entropy(logits.reshape(-1, 7), torch.tensor(targets).reshape(-1), reduction="none")
    want = (each * torch.tensor(weights).reshape(-1)).sum() / weights.sum()
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-6)
    for ours, theirs in zip(grads, (x_torch.grad, head_torch.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    right = (logits.detach().numpy().argmax(-1) == targets)[weights > 0].mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert float(metrics["target_weight"]) == weights.sum()


def test_chunks_hold_no_array_of_all_scores():
    x, head, targets = jnp.zeros((2, 5, 3)), jnp.zeros((3, 64)), jnp.zeros((2, 5), jnp.int32)
    grad = jax.grad(lambda x, head: cross_entropy(x, head, targets, jnp.ones((2, 5)), chunk=16)[0], argnums=(0, 1))
    assert "[2,5,16]" in str(jax.make_jaxpr(grad)(x, head)) and "[2,5,64]" not in str(jax.make_jaxpr(grad)(x, head))
    assert "[4,2,5,16]" not in str(jax.make_jaxpr(grad)(x, head))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_places_without_weight_never_count_whatever_they_hold(chunk):
    x = jnp.zeros((1, 3, 2)).at[0, 1].set(jnp.inf)
    loss, _ = cross_entropy(
        x, jnp.ones((2, 7)), jnp.zeros((1, 3), jnp.int32), jnp.asarray([[1.0, 0.0, 1.0]]), chunk=chunk
    )
    np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    loss_of = lambda x: cross_entropy(x, jnp.ones((2, 4)), jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3)))[0]  # noqa: E731
    value, grad = jax.value_and_grad(loss_of)(jnp.ones((1, 3, 2)))
    assert value == 0.0 and not np.asarray(grad).any()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_entropy_is_that_of_the_distribution_and_changes_nothing_else(chunk):
    """Scores of hundreds too, and words of which one alone is likely."""
    rng = np.random.default_rng(1)
    x, head = rng.standard_normal((2, 5, 3)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32)
    x[0] *= 300
    targets = jnp.asarray(rng.integers(0, 7, (2, 5)))
    scores = x.astype(np.float64) @ head
    likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
    likely /= likely.sum(axis=-1, keepdims=True)
    want = -(likely * np.log(np.maximum(likely, 1e-300))).sum(axis=-1)
    *others, entropy = vocabulary_scores(x, head, targets, chunk, entropy=True)
    np.testing.assert_allclose(entropy, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(others, vocabulary_scores(x, head, targets, chunk), strict=True):
        np.testing.assert_array_equal(one, other)
    sums = lambda x, entropy: sum(a.sum() for a in vocabulary_scores(x, head, targets, chunk, entropy)[:2])  # noqa: E731
    np.testing.assert_array_equal(*(jax.grad(sums)(x, entropy) for entropy in (True, False)))
    alone = jax.grad(lambda x: vocabulary_scores(x, head, targets, chunk, entropy=True)[3].sum())(x)
    assert not np.asarray(alone).any()
