"""The grouped matmul's forms against the dense definition, forwards and backwards."""

import functools

import jax
import jax.experimental.pallas.ops.tpu.megablox as megablox
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from k25_jax.kernels import grouped_matmul as kernel


def draw(rows, experts, d, f, sizes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)).astype(np.float32)
    w = rng.standard_normal((experts, d, f)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)


CASES = {
    "even": (64, [16, 16, 16, 16]),
    "empty experts": (50, [0, 30, 0, 0, 20, 0]),
    "one expert has all": (300, [0, 300, 0]),
    "several large blocks": (700, [129, 128, 127, 1, 315]),
    "fewer rows than a block": (3, [1, 0, 2]),
    "padding behind the last group": (200, [70, 0, 60]),
    "nothing but padding": (20, [0, 0]),
}


@pytest.mark.parametrize("implementation", ["blocked", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_equals_an_explicit_loop(case, implementation):
    rows, sizes = CASES[case]
    x, w, sizes_E = draw(rows, len(sizes), 24, 10, sizes)
    got = np.asarray(kernel.grouped_matmul(x, w, sizes_E, implementation))
    start = 0
    for expert, size in enumerate(sizes):
        want = np.asarray(x)[start : start + size] @ np.asarray(w)[expert]
        np.testing.assert_allclose(got[start : start + size], want, rtol=1e-5, atol=1e-5)
        start += size


@pytest.mark.parametrize("case", [name for name, (rows, sizes) in CASES.items() if rows == sum(sizes)])
def test_gradients_equal_those_of_the_reference(case):
    rows, sizes = CASES[case]
    x, w, sizes_E = draw(rows, len(sizes), 24, 10, sizes, seed=1)

    def loss(x, w, implementation):
        return jnp.sum(jnp.sin(kernel.grouped_matmul(x, w, sizes_E, implementation)))

    for got, want in zip(
        jax.grad(loss, (0, 1))(x, w, "blocked"), jax.grad(loss, (0, 1))(x, w, "reference"), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_padding_rows_have_no_gradient_in_the_weights():
    x, w, sizes_E = draw(200, 3, 8, 4, [70, 0, 60])
    _, pull = jax.vjp(lambda w: kernel.blocked_grouped_matmul(x, w, sizes_E)[:130], w)
    (got,) = pull(jnp.ones((130, 4)))
    want = np.zeros((3, 8, 4), np.float32)
    for expert, (start, stop) in {0: (0, 70), 2: (70, 130)}.items():
        want[expert] = np.asarray(x)[start:stop].T @ np.ones((stop - start, 4), np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_by_finite_differences():
    x, w, sizes_E = draw(12, 3, 4, 3, [5, 0, 7])
    function = functools.partial(kernel.blocked_grouped_matmul, sizes_E=sizes_E)
    check_grads(function, (x, w), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_kernel_interpreted_gives_the_same_and_the_same_gradients(case, monkeypatch):
    """Whatever the number of rows: its own tiles are of 128."""
    monkeypatch.setattr(megablox, "gmm", functools.partial(megablox.gmm, interpret=True))
    rows, sizes = CASES[case]
    x, w, sizes_E = draw(rows, len(sizes), 24, 10, sizes, seed=2)
    used = sum(sizes)

    def loss(x, w, implementation):
        return jnp.sum(jnp.sin(kernel.grouped_matmul(x, w, sizes_E, implementation)[:used]))

    got = kernel.grouped_matmul(x, w, sizes_E, "megablox")
    assert got.shape == (rows, 10)
    np.testing.assert_allclose(got[:used], kernel.reference_grouped_matmul(x, w, sizes_E)[:used], rtol=1e-4, atol=1e-4)
    (dx, dw), (want_dx, want_dw) = (jax.grad(loss, (0, 1))(x, w, name) for name in ("megablox", "reference"))
    np.testing.assert_allclose(dx[:used], want_dx[:used], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-3, atol=1e-3)


def test_a_row_keeps_its_bits_wherever_it_stands():
    """Packed documents must not leak: how many rows its expert has changes nothing of a row's product, bit for bit."""
    x, w, _ = draw(700, 2, 66, 32, [], seed=3)
    run = jax.jit(kernel.blocked_grouped_matmul)
    expected = np.asarray(run(x, w, jnp.asarray([0, 700])))
    for first in (1, 31, 64, 127, 200, 650):
        np.testing.assert_array_equal(run(x, w, jnp.asarray([first, 700 - first]))[first:], expected[first:])


def test_an_unknown_implementation_is_named():
    x, w, sizes_E = draw(4, 1, 2, 2, [4])
    with pytest.raises(ValueError, match="blokced"):
        kernel.grouped_matmul(x, w, sizes_E, "blokced")


def test_permute_rows_and_its_gradient():
    rng = np.random.default_rng(0)
    x, order = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32), jnp.asarray(rng.permutation(20))
    inverse, weight = jnp.argsort(order), jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    np.testing.assert_array_equal(kernel.permute_rows(x, order, inverse), x[order])
    got = jax.grad(lambda x: (kernel.permute_rows(x, order, inverse) * weight).sum())(x)
    np.testing.assert_array_equal(got, jax.grad(lambda x: (x[order] * weight).sum())(x))
