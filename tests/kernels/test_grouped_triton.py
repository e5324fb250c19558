"""The GPU's products over groups of rows: interpreted against the definition, and lowered for a GPU that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from k25_jax.kernels import grouped_matmul as kernel
from k25_jax.kernels import grouped_triton as triton

CASES = {  # rows, the groups' sizes, D, F
    "groups without rows, padding, widths that no tile divides": (80, [0, 30, 0, 0, 40, 0], 24, 10),
    "several tiles of rows and columns, none at a border": (700, [129, 128, 127, 1, 315], 32, 600),
    "fewer rows than groups": (3, [1, 0, 2, 0, 0], 16, 16),
    "nothing but padding": (20, [0, 0], 16, 16),
}
GPU = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def draw(case, dtype=jnp.float32):
    """(x [N,D], w [E,D,F], sizes [E], rows that count)."""
    rows, sizes, inner, outer = CASES[case]
    rng = np.random.default_rng(rows)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, inner), (len(sizes), inner, outer)))
    return x, w, jnp.asarray(sizes, jnp.int32), sum(sizes)


@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients_are_those_of_the_reference(case):
    x, w, sizes_E, used = draw(case)

    def both(implementation):
        def loss(x, w):
            y = kernel.grouped_matmul(x, w, sizes_E, implementation)[:used]
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)

    ((dx, dw), y), ((want_dx, want_dw), want_y) = both("triton"), both("reference")
    for got, want in ((y, want_y), (dx[:used], want_dx[:used]), (dw, want_dw)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_sums_of_bfloat16_are_float32():
    """The product of rounded operands is rounded once: half a unit in the last place, however many terms it has."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((32, 4096), (2, 4096, 16)))
    got = np.asarray(triton.grouped_triton(x, w, jnp.asarray([20, 12])), np.float64)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    want = np.concatenate((x[:20] @ w[0], x[20:] @ w[1]))
    assert np.all(np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-3)


def test_a_tile_lies_in_one_group_and_every_row_in_one_tile():
    sizes = [300, 0, 1, 128, 71]
    group_T, first_T, stop_T = map(np.asarray, triton.tiles_of(jnp.asarray(sizes), 520, 128))
    assert len(group_T) == 520 // 128 + len(sizes)
    ends = np.cumsum(sizes)
    taken = []
    for group, first, stop in zip(group_T, first_T, stop_T, strict=True):
        rows = range(first, min(first + 128, stop))
        assert all(ends[group] - sizes[group] <= row < ends[group] for row in rows)
        taken += rows
    assert sorted(taken) == list(range(500))


@pytest.mark.parametrize("across", [1, 3])
@pytest.mark.parametrize("tiles", [1, 8, 21])
def test_every_tile_has_one_program(tiles, across):
    placed = [triton._placed(i, tiles, across) for i in range(tiles * across)]
    assert sorted((int(t), int(c)) for t, c in placed) == [(t, c) for t in range(tiles) for c in range(across)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_lower_for_a_gpu(dtype):
    """And `auto` chooses them there: three products, and for each the gradients of its rows and of its matrices."""
    shapes = [(4096, 512), *[(8, 512, 256)] * 2, (8, 256, 512)]
    x, *w = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def loss(x, w, sizes_E):
        return kernel.expert_swiglu(x, *w, sizes_E).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=GPU)):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, jax.ShapeDtypeStruct((8,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2 + 3 + 3  # the last product itself is not asked for
