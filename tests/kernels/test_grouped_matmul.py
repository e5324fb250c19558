"""The experts' feed-forward and its products against the dense definition, forwards and backwards."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import runs
from k25_jax.kernels import grouped_matmul as kernel

megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")  # a function has the same name
D, F = 24, 10


def draw(rows, sizes, seed=0):
    """(rows [N,D], the three stacks of matrices, sizes)."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, D), (len(sizes), D, F), (len(sizes), D, F), (len(sizes), F, D))
    x, *weights = (jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, weights, jnp.asarray(sizes, jnp.int32)


CASES = {
    "even": (64, [16, 16, 16, 16]),
    "empty experts": (50, [0, 30, 0, 0, 20, 0]),
    "one expert has all": (300, [0, 300, 0]),
    "several large blocks": (700, [129, 128, 127, 1, 315]),
    "fewer rows than a block": (3, [1, 0, 2]),
    "padding behind the last group": (200, [70, 0, 60]),
    "nothing but padding": (20, [0, 0]),
}


@pytest.mark.parametrize("implementation", ["blocked", "ragged", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_equals_an_explicit_loop(case, implementation):
    rows, sizes = CASES[case]
    x, weights, sizes_E = draw(rows, sizes)
    got = np.asarray(kernel.expert_swiglu(x, *weights, sizes_E, implementation))
    x, (gate, up, down) = np.asarray(x), (np.asarray(w) for w in weights)
    start = 0
    for e, size in enumerate(sizes):
        mine = x[start : start + size]
        hidden = mine @ gate[e]
        want = (hidden / (1 + np.exp(-hidden)) * (mine @ up[e])) @ down[e]
        np.testing.assert_allclose(got[start : start + size], want, rtol=1e-4, atol=1e-5)
        start += size


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_the_reference(case):
    """Also those of the weights when rows of padding, which have gradients here, stand behind the last group."""
    rows, sizes = CASES[case]
    x, weights, sizes_E = draw(rows, sizes, seed=1)
    used = sum(sizes)

    def loss(implementation):
        def total(x, weights):
            out = kernel.expert_swiglu(x, *weights, sizes_E, implementation)
            return jnp.sum(jnp.sin(out[:used])) + jnp.sum(0 * out[used:])

        return jax.grad(total, (0, 1))(x, weights)

    for got, want in zip(jax.tree.leaves(loss("blocked")), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_padding_rows_come_out_zero_and_have_no_gradient():
    x, weights, sizes_E = draw(200, [70, 0, 60])
    out, pull = jax.vjp(lambda x, weights: kernel.blocked_swiglu(x, *weights, sizes_E), x, weights)
    assert not np.asarray(out)[130:].any()
    dx, dweights = pull(jnp.ones_like(out))
    assert np.asarray(dx)[:130].all() and not np.asarray(dx)[130:].any()
    _, expected = pull(jnp.ones_like(out).at[130:].set(0))
    for got, want in zip(dweights, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_gradient_by_finite_differences():
    x, weights, sizes_E = draw(12, [5, 0, 7], seed=3)
    check_grads(lambda x, *w: kernel.blocked_swiglu(x, *w, sizes_E), (x, *weights), order=1, modes=["rev"], rtol=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_kernel_interpreted_gives_the_same_and_the_same_gradients(case, monkeypatch):
    """Whatever the number of rows: its own tiles are of 128."""
    for name in ("gmm", "tgmm"):
        monkeypatch.setattr(megablox, name, functools.partial(getattr(megablox, name), interpret=True))
    rows, sizes = CASES[case]
    x, (w, _, _), sizes_E = draw(rows, sizes, seed=2)
    used = sum(sizes)

    def loss(x, w, implementation):
        return jnp.sum(jnp.sin(kernel.grouped_matmul(x, w, sizes_E, implementation)[:used]))

    got = kernel.grouped_matmul(x, w, sizes_E, "megablox")
    assert got.shape == (rows, F)
    np.testing.assert_allclose(got[:used], kernel.reference_grouped_matmul(x, w, sizes_E)[:used], rtol=1e-4, atol=1e-4)
    (dx, dw), (want_dx, want_dw) = (jax.grad(loss, (0, 1))(x, w, name) for name in ("megablox", "reference"))
    np.testing.assert_allclose(dx[:used], want_dx[:used], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-3, atol=1e-3)


def test_tiles_of_the_tpu_kernel_divide_and_are_as_large_as_allowed():
    for size, most, want in (
        (7168, 1024, 1024),
        (2048, 300, 256),
        (1408, 1024, 128),
        (1408, 2048, 1408),
        (10, 1024, 128),
    ):
        assert kernel._largest_tile(size, most) == want


def test_a_row_keeps_its_bits_wherever_it_stands():
    """Packed documents must not leak: how many rows its expert has changes nothing of a row's result, bit for bit."""
    x, weights, _ = draw(700, [0, 0], seed=3)
    run = jax.jit(kernel.blocked_swiglu, compiler_options=runs.OPTIMISED)
    expected = np.asarray(run(x, *weights, jnp.asarray([0, 700])))
    for first in (1, 31, 64, 127, 200, 650):
        np.testing.assert_array_equal(run(x, *weights, jnp.asarray([first, 700 - first]))[first:], expected[first:])


def test_blocks_come_in_sizes_that_depend_on_shapes_alone():
    sizes = {rows: kernel._block_sizes(rows, 1) for rows in (1, 4, 63, 64, 255, 256, 100000)}
    assert list(sizes.values()) == [[1], [4], [8], [64], [64], [256, 64], [256, 64]]
    assert kernel._block_sizes(127, 8) == [8] and kernel._block_sizes(128, 8) == [
        64
    ]  # few rows an expert, small blocks


def test_an_unknown_implementation_is_named():
    x, weights, sizes_E = draw(4, [4])
    with pytest.raises(ValueError, match="blokced"):
        kernel.expert_swiglu(x, *weights, sizes_E, "blokced")


def test_permute_rows_and_its_gradient():
    rng = np.random.default_rng(0)
    x, order = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32), jnp.asarray(rng.permutation(20))
    inverse, weight = jnp.argsort(order), jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    np.testing.assert_array_equal(kernel.permute_rows(x, order, inverse), x[order])
    got = jax.grad(lambda x: (kernel.permute_rows(x, order, inverse) * weight).sum())(x)
    np.testing.assert_array_equal(got, jax.grad(lambda x: (x[order] * weight).sum())(x))


def test_copy_rows_and_its_gradient():
    """Copies of padding are zero and give no gradient, even where one is not a number."""
    rng = np.random.default_rng(1)
    x, order = jnp.asarray(rng.standard_normal((10, 3)), jnp.float32), jnp.asarray(rng.permutation(20))
    used, weight = 14, rng.standard_normal((20, 3)).astype(np.float32)
    want = np.where(np.arange(20)[:, None] < used, np.asarray(x)[np.asarray(order) // 2], 0)
    out, pull = jax.vjp(lambda x: kernel.copy_rows(2, x, order, jnp.argsort(order), used), x)
    np.testing.assert_array_equal(out, want)
    weight[used:] = np.nan
    expected = np.zeros((10, 3), np.float32)
    np.add.at(expected, np.asarray(order)[:used] // 2, weight[:used])
    np.testing.assert_allclose(pull(jnp.asarray(weight))[0], expected, rtol=1e-6)
