"""SigLIP's loss and the pooling before it against a few lines of numpy."""

import jax
import numpy as np

from k25_jax.losses.siglip import DOCUMENTS, counts, pooled, siglip


def by_loops(images_SD, texts_SD, scale=10.0, bias=-10.0) -> float:
    """Of one row in which all are present: the sum over pairs of -log sigmoid(z (scale cos + bias))."""
    total = 0.0
    for i, image in enumerate(images_SD):
        for j, text in enumerate(texts_SD):
            cos = image @ text / np.sqrt(image @ image) / np.sqrt(text @ text)
            z = 1.0 if i == j else -1.0
            total += np.log1p(np.exp(-z * (scale * cos + bias)))
    return total


def test_pairs_of_each_row_without_those_that_are_not_there():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    texts += images
    present = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    expected = sum(by_loops(images[b][present[b]], texts[b][present[b]]) for b in range(3)) / present.sum()
    np.testing.assert_allclose(jax.jit(siglip)(images, texts, present), expected, rtol=1e-5)
    assert siglip(images, images, present) < siglip(images, texts, present) < siglip(images, -images, present)
    gradient = jax.grad(lambda a: siglip(a, texts, present))(images)
    assert np.isfinite(gradient).all() and not gradient[~present].any() and gradient[present].any()
    shares = [siglip(images[b : b + 1], texts[b : b + 1], present[b : b + 1], present.sum()) for b in range(3)]
    np.testing.assert_allclose(sum(shares), expected, rtol=1e-5)
    nothing = jax.value_and_grad(siglip)(np.zeros_like(images), np.zeros_like(texts), np.zeros_like(present))
    assert nothing[0] == 0 and not nothing[1].any()


def test_means_over_the_chosen_places_of_each_document():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 90, 3)).astype(np.float32)
    segments = np.array([np.repeat([1, 2, 3, 0], [40, 30, 5, 15]), np.arange(1, 91)])
    chosen = rng.random((2, 90)) < 0.4
    chosen[0, 70:75] = False
    means, numbers = pooled(x, chosen, segments), counts(chosen, segments)
    assert means.shape == (2, DOCUMENTS, 3)
    for b in range(2):
        for s in range(DOCUMENTS):
            here = x[b][chosen[b] & (segments[b] == s + 1)]
            assert numbers[b, s] == len(here)
            np.testing.assert_allclose(means[b, s], here.mean(axis=0) if len(here) else np.zeros(3), atol=1e-6)
