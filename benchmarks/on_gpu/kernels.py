"""Are the kernels right on this card? Each with its gradients, against its definition in float32 on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu.run import Run, difference
from k25_jax.kernels.attention import attention, reference_attention
from k25_jax.kernels.grouped_matmul import expert_swiglu, grouped_matmul
from k25_jax.kernels.paged_attention import paged_attention, reference_paged_attention
from k25_jax.sharding.mesh import platform

BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


def run(run: Run) -> None:
    """A line for each kernel, form and type."""
    for dtype in BOUNDS:
        for name, check in checks(run.small).items():
            run.attempt(f"{name}_error", compare, run, name, dtype, check, seconds=5)


def checks(small: bool) -> dict:
    """name -> function of a random generator: (ours, definition, arrays)."""
    sizes = (96, 32, 16) if small else (4096, 1024, 512)
    found = {"attention_blocked": functools.partial(attention_check, small, "blocked")}
    if platform() == "tpu":
        found["attention_flash"] = functools.partial(attention_check, small, "flash")
    found |= {f"swiglu_{form}": functools.partial(swiglu_check, form, *sizes) for form in ("blocked", "triton")}
    if not small:
        found["swiglu_triton_few_rows"] = functools.partial(swiglu_check, "triton", 128, 1024, 512)
    found["grouped_matmul_ragged"] = functools.partial(ragged_check, *sizes)
    found["paged_attention"] = functools.partial(paged_check, small)
    return found


def compare(run: Run, name: str, dtype: str, check, seed: int = 0) -> None:
    """Result and gradients of ours in `dtype`, of the definition in float32, from the same rounded arrays."""
    ours, definition, arrays = check(np.random.default_rng(seed))
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    with jax.default_matmul_precision("highest"):
        got = jax.jit(functools.partial(with_gradients, ours))(*arrays)
        on_cpu = jax.device_put([np.asarray(a, np.float32) for a in arrays], jax.devices("cpu")[0])
        want = jax.jit(functools.partial(with_gradients, definition))(*on_cpu)
    error, bound = difference(got, want), BOUNDS[dtype]
    run.line(
        f"{name}_error", error, "relative", peer="definition, float32, CPU", bound=bound, ok=error <= bound, dtype=dtype
    )


def with_gradients(function, *arrays):
    """(result, gradients of a weighted sum of it); the weights are cosines, so that none is like its neighbour."""

    def loss(*arrays):
        out = function(*arrays).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    gradients, out = jax.grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return out, gradients


def segments(rng, rows: int, length: int) -> np.ndarray:
    """Packed rows: four documents of random lengths, then a little padding."""
    cuts = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
    out = np.stack([1 + np.searchsorted(cut, np.arange(length), side="right") for cut in cuts]).astype(np.int32)
    out[:, length - length // 16 :] = 0
    return out


def attention_check(small: bool, form: str, rng):
    rows, length, heads = (1, 96, 2) if small else (2, 1024, 8)
    arrays = [rng.standard_normal((rows, length, heads, width)) for width in (192, 192, 128)]
    how = dict(scale=192**-0.5, causal=True)
    segments_BL = segments(rng, rows, length)
    return (
        lambda q, k, v: attention(q, k, v, segments_BL, block=32 if small else 256, implementation=form, **how)[0],
        lambda q, k, v: reference_attention(q, k, v, segments_BL, **how)[0],
        arrays,
    )


def loads(rng, rows: int, experts: int) -> np.ndarray:
    """Rows of each expert, with a heavy tail; one has none, and a sixteenth of the rows belongs to no expert."""
    weights = rng.pareto(1.2, experts) + 0.05
    weights[experts // 2] = 0
    return np.floor(weights / weights.sum() * (rows - rows // 16)).astype(np.int32)


def swiglu_check(form: str, rows: int, width: int, hidden: int, rng, experts: int = 8):
    sizes_E = jnp.asarray(loads(rng, rows, experts))
    shapes = (rows, width), (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    arrays = [rng.standard_normal(shape) / (1 if len(shape) == 2 else shape[1] ** 0.5) for shape in shapes]

    def through(form):
        return lambda x, *w: used(expert_swiglu(used(x, sizes_E), *w, sizes_E, form), sizes_E)

    return through(form), through("reference"), arrays


def ragged_check(rows: int, width: int, hidden: int, rng, experts: int = 8):
    sizes_E = jnp.asarray(loads(rng, rows, experts))
    arrays = [rng.standard_normal((rows, width)), rng.standard_normal((experts, width, hidden)) / width**0.5]

    def through(form):
        return lambda x, w: used(grouped_matmul(used(x, sizes_E), w, sizes_E, form), sizes_E)

    return through("ragged"), through("reference"), arrays


def used(x_ND, sizes_E):
    """Rows that belong to an expert; zero for the others, which kernels may leave as they find them."""
    return jnp.where(jnp.arange(len(x_ND))[:, None] < sizes_E.sum(), x_ND, 0)


def paged_check(small: bool, rng):
    rows, length, heads, rank, rope, size, width = (3, 2, 2, 16, 8, 4, 9) if small else (32, 4, 16, 256, 32, 16, 32)
    pages = rows * width
    arrays = [rng.standard_normal((rows, length, heads, n)) for n in (rank, rope)]
    arrays += [rng.standard_normal((pages, size, n)) for n in (rank, rope)]
    tables_BW = rng.permutation(pages).reshape(rows, width).astype(np.int32)
    positions_BL = (rng.integers(0, width * size - length, (rows, 1)) + np.arange(length)).astype(np.int32)
    more = tables_BW, positions_BL, (rank + rope) ** -0.5

    def ours(*arrays):  # for sampling only: its gradient is not asked for
        return jax.lax.stop_gradient(paged_attention(*map(jax.lax.stop_gradient, arrays), *more))

    return ours, lambda *arrays: jax.lax.stop_gradient(reference_paged_attention(*arrays, *more)), arrays
