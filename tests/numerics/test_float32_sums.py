"""Sums of many terms in the bfloat16 path: each is what float32 gives, however many terms there are.

Terms are alike, so that a sum in bfloat16 would stop growing at 256 of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.config import preset
from k25_jax.kernels.grouped_matmul import expert_swiglu
from k25_jax.losses.lm import cross_entropy
from k25_jax.models.dispatch import in_rounds
from k25_jax.models.experts import _chunks, _local
from k25_jax.models.k25 import embed
from k25_jax.models.layers import layer_norm, rms_norm
from k25_jax.models.masters import biased, product

MANY = 50_000
HALF_A_STEP = 2.0**-8  # of bfloat16, relative: the most that rounding a result once costs


def alike(*shape, seed=0, dtype=jnp.bfloat16):
    """Numbers between 0.75 and 1.25."""
    return jnp.asarray(np.random.default_rng(seed).uniform(0.75, 1.25, shape), dtype)


def exactly(a) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32), np.float64)


def error(got, want) -> float:
    return float(np.linalg.norm(exactly(got) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("equation", ["nw,wthk->tnhk", "bld,dhk->blhk", "blhk,hkd->bld", "bld,df->blf"])
def test_products_with_heads_have_their_gradients_on_this_platform_too(equation):
    """XLA's CPU library has no bfloat16 product with a float32 result for all of them."""
    of_x, of_w = equation.partition("->")[0].split(",")
    sizes = dict(zip("nwthkbldf", (12, 16, 3, 2, 8, 2, 6, 24, 32), strict=True))
    x, w = alike(*(sizes[c] for c in of_x)), alike(*(sizes[c] for c in of_w), dtype=jnp.float32)
    loss = lambda x, w: product(equation, x, w).astype(jnp.float32).sum()  # noqa: E731
    _, got = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    want = jax.grad(lambda w: jnp.einsum(equation, x.astype(jnp.float32), w).sum())(w)
    assert got.dtype == jnp.float32 and error(got, exactly(want)) < 1e-6


def test_an_embedding_row_of_fifty_thousand_tokens_has_its_whole_gradient():
    config, dout = preset("tiny"), alike(1, MANY + 100, 8)
    table, tokens = alike(300, 8, dtype=jnp.float32), np.full((1, MANY + 100), 7, np.int32)
    tokens[0, :100] = np.arange(100) + 20
    _, pull = jax.vjp(lambda table: embed({"embed": table}, tokens, config, jnp.bfloat16), table)
    (grad,) = jax.jit(pull)(dout)
    want = np.zeros((300, 8))
    np.add.at(want, tokens[0], exactly(dout)[0])
    assert grad.dtype == jnp.float32 and want[7].min() > 0.9 * MANY
    np.testing.assert_allclose(grad, want, rtol=1e-3)


def test_weights_biases_and_norms_have_the_gradients_of_all_tokens():
    x, dy = alike(MANY, 4), alike(MANY, 4, seed=1)
    vector = jnp.ones(4)

    def gradient(function, w):
        run = lambda w, x, dy: jax.vjp(lambda w: function(x, w), w)[1](dy)[0]  # noqa: E731
        return jax.jit(run, compiler_options={"xla_allow_excess_precision": False})(w, x, dy)

    np.testing.assert_allclose(gradient(biased, vector), exactly(dy).sum(axis=0), rtol=1e-4)
    got = gradient(lambda x, w: product("nd,df->nf", x, w), jnp.ones((4, 4)))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exactly(x).T @ exactly(dy), rtol=1e-4)
    unit = exactly(x) / np.sqrt((exactly(x) ** 2).mean(axis=-1, keepdims=True))
    of_norm = gradient(lambda x, scale: rms_norm(x, scale, 0.0), vector)
    np.testing.assert_allclose(of_norm, (unit * exactly(dy)).sum(axis=0), rtol=1e-4)
    of_bias = gradient(lambda x, bias: layer_norm(x, {"scale": vector, "bias": bias}, 1e-6), vector)
    np.testing.assert_allclose(of_bias, exactly(dy).sum(axis=0), rtol=1e-4)


def test_products_round_their_result_once():
    x, w = alike(5, 3, 4), alike(4, 6, seed=1, dtype=jnp.float32)
    want, pull = jax.vjp(lambda x: x @ w.astype(jnp.bfloat16), x)
    got, ours = jax.vjp(lambda x: product("...d,df->...f", x, w), x)
    dy = alike(5, 3, 6, seed=2)
    for a, b in ((got, want), (ours(dy)[0], pull(dy)[0])):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(exactly(a), exactly(b), rtol=2 * HALF_A_STEP)


def experts(count=1, width=8, dtype=jnp.bfloat16):
    return {
        name: alike(count, width, width, seed=i, dtype=dtype) / width for i, name in enumerate(("gate", "up", "down"))
    }


def test_an_expert_with_many_copies_has_the_gradients_of_all():
    """One expert gets all of 65,536 rows: 256 blocks, or, in rounds as on a mesh, as many of them."""
    tokens, p = 2**16, experts()
    x, dy, sizes = alike(tokens, 8), alike(tokens, 8, seed=9), jnp.asarray([tokens])

    def gradients(p, x):
        return jax.vjp(lambda p: expert_swiglu(x, p["gate"], p["up"], p["down"], sizes, "blocked"), p)[1](
            dy.astype(x.dtype)
        )[0]

    def by_rounds(p, x):
        choice = jnp.zeros((tokens, 1), jnp.int32), sizes
        chunks, weights = functools.partial(_chunks, 256, "blocked"), jnp.ones((tokens, 1))
        return jax.vjp(lambda p: in_rounds(chunks, p, x, weights, choice), p)[1](dy.astype(x.dtype))[0]

    wide = lambda a: a.astype(jnp.float32)  # noqa: E731
    want = jax.jit(gradients)(jax.tree.map(wide, p), wide(x))
    for form in (gradients, by_rounds):
        got = jax.jit(form)(p, x)
        for name in p:
            assert error(got[name], exactly(want[name])) <= 0.01, (form.__name__, name)


def test_results_of_a_tokens_experts_are_weighed_and_added_up_in_float32():
    """Of eight copies whose weights bfloat16 cannot tell from an eighth."""
    tokens, copies = 64, 8
    p, x = experts(copies), alike(tokens, 8)
    weights = jnp.asarray(np.linspace(0.997, 1.003, copies) / copies, jnp.float32) * jnp.ones((tokens, 1))
    chosen, load = jnp.tile(jnp.arange(copies), (tokens, 1)), jnp.full(copies, tokens)
    each = expert_swiglu(jnp.tile(x, (copies, 1)), p["gate"], p["up"], p["down"], load, "blocked")
    want = np.einsum("ktd,tk->td", exactly(each).reshape(copies, tokens, -1), np.asarray(weights, np.float64))
    chunks = functools.partial(_chunks, 64 * copies, "blocked")
    for got in (
        _local(p, x, weights, chosen, load, "blocked"),
        in_rounds(chunks, p, x, weights, (chosen, load)),
    ):
        assert got.dtype == jnp.bfloat16
        assert error(got, want) <= HALF_A_STEP / 2  # on the average, that is
    dy = alike(tokens, 8, seed=3)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (p, x, dy))
    gradient = lambda p, x, dy: jax.vjp(lambda x: _local(p, x, weights, chosen, load, "blocked"), x)[1](dy)[0]  # noqa: E731
    assert error(gradient(p, x, dy), exactly(gradient(*wide))) <= 0.01


def test_cross_entropy_adds_up_the_gradients_of_its_chunks_in_float32():
    """2,048 chunks, each with about the same share of the gradient of x."""
    x, head = jnp.asarray([[[0.01, -0.01, 0.02]]], jnp.bfloat16), alike(3, 4096, dtype=jnp.float32)
    head = 10 * head.astype(jnp.bfloat16).astype(jnp.float32).at[:, 0].multiply(-1)
    targets, weights = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    loss = lambda x, head: cross_entropy(x, head, targets, weights, chunk=2)[0]  # noqa: E731
    dx, dhead = jax.jit(jax.grad(loss, (0, 1)))(x, head)
    scores = exactly(x)[0, 0] @ np.asarray(head, np.float64)
    dscores = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() - (np.arange(4096) == 0)
    assert dhead.dtype == jnp.float32
    assert error(dx, (np.asarray(head, np.float64) @ dscores)[None, None]) <= 0.01
    np.testing.assert_allclose(dhead, np.outer(exactly(x)[0, 0], dscores), rtol=2 * HALF_A_STEP)
