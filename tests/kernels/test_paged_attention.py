"""Attention over pages against its definition, and against attention over the same tokens in one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.kernels import paged_attention as kernel

RANK, ROPE, HEADS, SCALE = 5, 2, 3, 0.4


def draw(seed, rows, length, pages, size, width):
    """Queries, pools and tables; pages are in no order, and several rows share some."""
    rng = np.random.default_rng(seed)
    q = [rng.standard_normal((rows, length, HEADS, width)).astype(np.float32) for width in (RANK, ROPE)]
    pools = [rng.standard_normal((pages, size, width)).astype(np.float32) for width in (RANK, ROPE)]
    tables = np.stack([rng.permutation(pages)[:width] for _ in range(rows)]).astype(np.int32)
    return (*q, *pools, tables), rng


def paged():
    """The function as it is now, compiled anew."""
    return jax.jit(lambda *arguments: kernel.paged_attention(*arguments, SCALE))


def whole(q_LHR, q_LHK, c_SR, r_SK, positions_L):
    """One row, its tokens in one piece, in float64."""
    out = np.zeros(q_LHR.shape)
    for place, position in enumerate(positions_L):
        seen = slice(0, position + 1)
        scores = (q_LHR[place] @ c_SR[seen].T + q_LHK[place] @ r_SK[seen].T).astype(np.float64) * SCALE
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[place] = weights / weights.sum(axis=-1, keepdims=True) @ c_SR[seen]
    return out


@pytest.mark.parametrize("rows, length, size, width, keys", [(4, 1, 4, 6, 8), (3, 5, 1, 30, 7), (2, 3, 16, 3, 8)])
def test_pages_in_any_order_are_one_sequence(monkeypatch, rows, length, size, width, keys):
    """Several blocks, the last one not full; rows of every length, one with no token at all."""
    monkeypatch.setattr(kernel, "KEYS", keys)
    arguments, rng = draw(rows, rows, length, 40, size, width)
    q_BLHR, q_BLHK, c_QOR, r_QOK, tables_BW = arguments
    first_B1 = rng.integers(0, width * size - length + 1, (rows, 1))
    positions_BL = (first_B1 + np.arange(length)).astype(np.int32)
    positions_BL[0, -1] = -1  # a piece that is not full, or a row that is not used
    out = np.asarray(paged()(*arguments, positions_BL))
    defined = np.asarray(kernel.reference_paged_attention(*arguments, positions_BL, SCALE))
    assert np.isfinite(out).all()
    for row, table_W in enumerate(tables_BW):
        there = positions_BL[row] >= 0
        pieces = c_QOR[table_W].reshape(-1, RANK), r_QOK[table_W].reshape(-1, ROPE)
        expected = whole(q_BLHR[row][there], q_BLHK[row][there], *pieces, positions_BL[row][there])
        np.testing.assert_allclose(out[row][there], expected, atol=1e-5)
        np.testing.assert_allclose(defined[row][there], expected, atol=1e-5)


def test_what_lies_behind_a_row_does_not_reach_it():
    """Pages hold what others left there; numbers that are not finite would spread through a product with zero."""
    arguments, _ = draw(7, 2, 1, 12, 4, 5)
    q_BLHR, q_BLHK, c_QOR, r_QOK, tables_BW = arguments
    tables_BW[1] = np.setdiff1d(np.arange(12), tables_BW[0])[:5]
    positions_BL = np.array([[6], [17]], np.int32)
    run = paged()
    clean = np.asarray(run(*arguments, positions_BL))
    for pool in (c_QOR, r_QOK):
        pool[tables_BW[0, 1], 3] = np.nan  # place 7
        pool[tables_BW[0, 2:]] = np.inf
    np.testing.assert_array_equal(run(*arguments, positions_BL), clean)


@pytest.mark.parametrize("form", ["paged", "reference"])
def test_in_bfloat16_logits_of_a_hundred_are_exact_enough(form):
    """Scores 0.2 apart near 100, where bfloat16 knows halves; some rows and pages are empty. Within 0.01 of float32."""
    rng, rows, size, width, rank = np.random.default_rng(3), 3, 8, 40, 64
    direction = rng.standard_normal(rank) / np.sqrt(rank)
    c_QOR = 0.3 * rng.standard_normal((130, size, rank)) + rng.uniform(9.5, 10.5, (130, size, 1)) * direction
    q_BLHR = 10 * direction / (direction @ direction) * np.ones((rows, 2, HEADS, 1))
    q_BLHK, r_QOK = rng.standard_normal((rows, 2, HEADS, 8)), 0.1 * rng.standard_normal((130, size, 8))
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (q_BLHR, q_BLHK, c_QOR, r_QOK)]
    tables_BW = np.stack([rng.permutation(130)[:width] for _ in range(rows)]).astype(np.int32)
    positions_BL = np.array([[300, 301], [17, -1], [-1, -1]], np.int32)
    run = functools.partial(kernel.paged_attention if form == "paged" else kernel.reference_paged_attention, scale=1.0)
    got = np.asarray(jax.jit(run)(*narrow, tables_BW, positions_BL).astype(jnp.float32))
    exact = [np.asarray(a, np.float32) for a in narrow]
    want = np.asarray(kernel.reference_paged_attention(*exact, tables_BW, positions_BL, 1.0))
    there = positions_BL >= 0
    logits = np.einsum("blhr,qor->blhqo", exact[0], exact[2])
    assert logits.max() > 100
    assert np.abs(got - want)[there].max() <= 0.01 * np.abs(want).max(), np.abs(got - want)[there].max()
    assert np.isfinite(got).all()
