"""Products over groups of rows on a GPU, in Pallas through Triton (K2.5 §3.1, dropless MoE).

A program of the grid computes one tile. Tiles begin where a group begins, so that none lies across two groups; there is
one tile a group that is partly empty. The number of programs depends on shapes alone: those without rows end at once.
Sums are in float32, and float32 is not rounded to TF32 on its way. Where there is no GPU the kernels are interpreted.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from k25_jax.sharding.mesh import platform

ROWS, COLUMNS = 128, 256  # of a tile, at most: its sums fill half of the registers
DEEP, STAGES = 128, 3  # bytes along the contracted axis that a program takes at once; such pieces under way
WARPS = 8
TOGETHER = 8  # tiles of rows whose programs run side by side, column after column: the cache has what they read
LEAST = 16  # entries along a side that Triton multiplies


@jax.custom_vjp
def grouped_triton(x_ND, w_EDF, sizes_E):
    """[N,D] x [E,D,F] -> [N,F]; the first sizes_E[0] rows by matrix 0, and so on. Rows beyond them hold anything."""
    return by_matrices(x_ND, w_EDF, sizes_E, transposed=False)


def _backward(saved, dy_NF):
    x_ND, w_EDF, sizes_E = saved
    return by_matrices(dy_NF, w_EDF, sizes_E, transposed=True), by_groups(x_ND, dy_NF, sizes_E, w_EDF.dtype), None


grouped_triton.defvjp(lambda x, w, sizes: (grouped_triton(x, w, sizes), (x, w, sizes)), _backward)


def by_matrices(x_NK, w, sizes_E, transposed: bool):
    """Rows [N,K] by the matrices of their groups, [E,K,M] or transposed [E,M,K]: [N,M]."""
    (total, inner), outer = x_NK.shape, w.shape[1 if transposed else 2]
    height = _side(total // len(sizes_E), ROWS)
    width, deep = _side(outer, COLUMNS), _side(inner, DEEP // x_NK.dtype.itemsize)
    tiles_T = tiles_of(sizes_E, total, height)
    tiles, across = len(tiles_T[0]), pl.cdiv(outer, width)

    def kernel(group_T, first_T, stop_T, x_NK, w, y_NM):
        tile, column = _placed(pl.program_id(0), tiles, across)
        group, first, stop = group_T[tile], first_T[tile], stop_T[tile]

        @pl.when(first < stop)
        def _():
            rows, columns = (first, height, stop), (column * width, width, outer)

            def add(i, sums):
                depth = i * deep, deep, inner
                x = _load(x_NK, (), rows, depth)
                if transposed:
                    return sums + _dot(x, _load(w, (group,), columns, depth), (1, 1))
                return sums + _dot(x, _load(w, (group,), depth, columns), (1, 0))

            sums = jax.lax.fori_loop(0, pl.cdiv(inner, deep), add, jnp.zeros((height, width), jnp.float32))
            _store(y_NM, (), rows, columns, sums)

    out = jax.ShapeDtypeStruct((total, outer), x_NK.dtype)
    return _call(kernel, (tiles * across,), out, total * inner * outer)(*tiles_T, x_NK, w)


def by_groups(x_ND, y_NF, sizes_E, dtype):
    """x^T y of each group's rows: [E,D,F] in `dtype`; zero for a group without rows."""
    (total, tall), wide = x_ND.shape, y_NF.shape[1]
    height, width = _side(tall, ROWS), _side(wide, COLUMNS)
    deep, across = _side(total // len(sizes_E), DEEP // x_ND.dtype.itemsize), pl.cdiv(wide, width)
    stop_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def kernel(first_E, stop_E, x_ND, y_NF, w_EDF):
        tile, group = pl.program_id(0), pl.program_id(1)
        first, stop = first_E[group], stop_E[group]
        rows, columns = (tile // across * height, height, tall), (tile % across * width, width, wide)

        def add(i, sums):
            depth = first + i * deep, deep, stop
            return sums + _dot(_load(x_ND, (), depth, rows), _load(y_NF, (), depth, columns), (0, 0))

        sums = jax.lax.fori_loop(0, pl.cdiv(stop - first, deep), add, jnp.zeros((height, width), jnp.float32))
        _store(w_EDF, (group,), rows, columns, sums)

    grid = pl.cdiv(tall, height) * across, len(sizes_E)
    out = jax.ShapeDtypeStruct((len(sizes_E), tall, wide), dtype)
    return _call(kernel, grid, out, total * tall * wide)(stop_E - sizes_E, stop_E, x_ND, y_NF)


def tiles_of(sizes_E, total: int, height: int):
    """(group, first row, row behind the last of the group) of every tile; tiles that are not needed have no rows."""
    sizes_E = sizes_E.astype(jnp.int32)
    tiles_E, stop_E = -(-sizes_E // height), jnp.cumsum(sizes_E)
    end_E = jnp.cumsum(tiles_E)
    tile_T = jnp.arange(total // height + min(total, len(sizes_E)), dtype=jnp.int32)
    group_T = jnp.minimum(jnp.searchsorted(end_E, tile_T, side="right"), len(sizes_E) - 1).astype(jnp.int32)
    first_T = (stop_E - sizes_E)[group_T] + (tile_T - (end_E - tiles_E)[group_T]) * height
    return group_T, first_T, jnp.where(tile_T < end_E[-1], stop_E[group_T], first_T)


def _placed(program, tiles: int, across: int):
    """(tile of rows, tile of columns) of a program: TOGETHER tiles of rows go over all columns before the next do."""
    block, place = program // (TOGETHER * across), program % (TOGETHER * across)
    together = jnp.minimum(tiles - block * TOGETHER, TOGETHER)
    return block * TOGETHER + place % together, place // together


def _side(size: int, most: int) -> int:
    """A power of two, no smaller than `size` needs, between LEAST and `most`."""
    return min(max(pl.next_power_of_2(max(size, 1)), LEAST), most)


def _load(ref, group, rows, columns):
    """The tile of (first, size, end) rows by columns, with zeros from their ends on."""
    mask = _inside(rows, columns)
    tile = ref.at[(*group, pl.ds(*rows[:2]), pl.ds(*columns[:2]))]
    return plgpu.load(tile) if mask is None else plgpu.load(tile, mask=mask, other=0)


def _store(ref, group, rows, columns, values):
    tile = ref.at[(*group, pl.ds(*rows[:2]), pl.ds(*columns[:2]))]
    plgpu.store(tile, values.astype(ref.dtype), mask=_inside(rows, columns))


def _inside(rows, columns):
    """Which entries of a tile lie before the ends of rows and columns; None where all do, whatever the tile."""
    shape, mask = (rows[1], columns[1]), None
    for axis, (first, size, end) in enumerate((rows, columns)):
        if not isinstance(end, int) or end % size:
            inside = first + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end
            mask = inside if mask is None else mask & inside
    return mask


def _dot(a, b, contracted):
    """Sums over an axis of each, in float32; operands of float32 are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _call(kernel, grid, out, products: int):
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        cost_estimate=pl.CostEstimate(flops=2 * products, transcendentals=0, bytes_accessed=0),
        interpret=platform() != "gpu",
    )
