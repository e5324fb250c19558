"""Grouped matmul against the dense product of as many FLOPs, in the same run, and against other libraries' forms.

K2.5's experts (7168 -> 2048, 48 on a card) and those of the preset 1b (1024 -> 512, 32), bfloat16; equal loads, and a heavy
tail, whose busiest expert has some ten times the mean.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu.run import Run, peak_flops, seconds
from k25_jax.kernels import grouped_triton
from k25_jax.kernels.grouped_matmul import expert_swiglu, grouped_matmul

BOUND = 0.7  # of the dense product's rate
SHAPES = {"k25": (131072, 7168, 2048, 48), "1b": (131072, 1024, 512, 32)}  # rows, D, F, experts
SMALL = {"minute": (64, 32, 16, 4)}
TILES = ((128, 256, 3, 8), (128, 256, 4, 8), (128, 128, 4, 8), (128, 128, 4, 4), (64, 256, 4, 4), (256, 128, 3, 8))


def run(run: Run) -> None:
    """Lines: ours against dense, forward and with gradients; the whole SwiGLU in both our forms; other forms; tiles."""
    shapes = SMALL if run.small else SHAPES
    for name, shape in shapes.items():
        for load in ("heavy",) if run.small else ("equal", "heavy"):
            run.attempt(f"grouped_{name}_{load}", against_dense, run, name, load, shape, seconds=2)
    for name, shape in shapes.items():
        run.attempt(f"swiglu_{name}", swiglu, run, name, shape, seconds=5)
    name, shape = next(iter(shapes.items()))
    for peer, function in peers().items():
        run.attempt(f"grouped_{name}_{peer}", other, run, name, shape, peer, function, seconds=5)
    run.attempt(f"grouped_{name}_tiles", tiles, run, name, shape, seconds=5)


def draw(shape, load: str):
    """(x [N,D], w [E,D,F], dy [N,F], sizes [E]) on the card, all rows in use."""
    rows, inner, outer, experts = shape
    weights = np.ones(experts) if load == "equal" else np.random.default_rng(0).pareto(1.2, experts) + 0.05
    sizes = np.floor(weights / weights.sum() * rows).astype(np.int32)
    sizes[sizes.argmax()] += rows - sizes.sum()
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((rows, inner), (experts, inner, outer), (rows, outer))
    arrays = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    return *arrays, jnp.asarray(sizes)


def with_gradients(function):
    """(x, w, dy) -> (result, gradients of x and w)."""

    def both(x, w, dy):
        out, pull = jax.vjp(function, x, w)
        return out, pull(dy)

    return jax.jit(both)


def against_dense(run: Run, name: str, load: str, shape) -> None:
    x, w, dy, sizes = draw(shape, load)
    ours, dense = lambda x, w: grouped_matmul(x, w, sizes, "triton"), lambda x, w: x @ w
    for passes, what in ((1, "forward"), (3, "forward_backward")):
        mine, peer = (jax.jit(ours), jax.jit(dense)) if passes == 1 else map(with_gradients, (ours, dense))
        more = (dy,) if passes == 3 else ()
        taken = seconds(
            {"ours": functools.partial(mine, x, w, *more), "dense": functools.partial(peer, x, w[0], *more)},
            rounds=1 if run.small else 5,
        )
        rates = {
            side: 2 * passes * x.shape[0] * w.shape[1] * w.shape[2] / duration / 1e12
            for side, duration in taken.items()
        }
        ratio, peak = rates["ours"] / rates["dense"], peak_flops()
        run.line(
            f"grouped_{name}_{load}_{what}", rates["ours"], "TFLOP/s", peer="dense", peer_value=rates["dense"], ratio=ratio,
            bound=BOUND, ok=None if run.small else ratio >= BOUND, dtype="bfloat16", shape=list(shape),
            of_peak=peak and rates["ours"] * 1e12 / peak,
        )  # fmt: skip


def swiglu(run: Run, name: str, shape) -> None:
    """The experts' feed-forward with all gradients: through the kernel, and in plain XLA."""
    x, gate, dy, sizes = draw(shape, "heavy")
    up, down = gate[::-1], gate.swapaxes(1, 2)
    dx = x[::-1]

    def side(form):
        @jax.jit
        def both(x, *w):
            out, pull = jax.vjp(lambda x, *w: expert_swiglu(x, *w, sizes, form), x, *w)
            return out, pull(dx)

        return functools.partial(both, x, gate, up, down)

    taken = seconds({form: side(form) for form in ("triton", "blocked")}, rounds=1 if run.small else 3)
    run.line(
        f"swiglu_{name}_forward_backward", taken["triton"], "s", peer="blocked", peer_value=taken["blocked"],
        ratio=taken["blocked"] / taken["triton"], dtype="bfloat16", shape=list(shape),
    )  # fmt: skip


def peers() -> dict:
    """name -> (x, w, sizes) -> product: XLA's, JAX's own kernel for Hopper, tokamax's. Imported when called."""

    def mosaic(x, w, sizes):
        module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
        return module.ragged_dot(
            x, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
        )

    def tokamax(x, w, sizes):
        return importlib.import_module("tokamax").ragged_dot(x, w, sizes)

    return {"ragged_dot": jax.lax.ragged_dot, "mosaic": mosaic, "tokamax": tokamax}


def other(run: Run, name: str, shape, peer: str, function) -> None:
    """A peer's forward pass beside ours; that it is not there, or fails, is no failure of ours."""
    x, w, _, sizes = draw(shape, "heavy")
    ours = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, "triton"))
    try:
        theirs = jax.jit(lambda x, w: function(x, w, sizes))
        taken = seconds(
            {"ours": functools.partial(ours, x, w), peer: functools.partial(theirs, x, w)}, rounds=1 if run.small else 3
        )
    except Exception as error:
        run.line(
            f"grouped_{name}_{peer}", peer=peer, peer_error=f"{type(error).__name__}: {error}"[:400], dtype="bfloat16"
        )
        return
    rate = 2e-12 * x.shape[0] * w.shape[1] * w.shape[2] / taken["ours"]
    ratio = taken[peer] / taken["ours"]
    run.line(
        f"grouped_{name}_{peer}", rate, "TFLOP/s", peer=peer, peer_value=rate / ratio, ratio=ratio, dtype="bfloat16"
    )


def tiles(run: Run, name: str, shape) -> None:
    """Rates of the forward pass with other tiles, while there is time: rows x columns, stages, warps."""
    x, w, _, sizes = draw(shape, "equal")
    names, rates = ("ROWS", "COLUMNS", "STAGES", "WARPS"), {}
    usual = tuple(getattr(grouped_triton, name) for name in names)
    try:
        for tile in TILES[: 1 if run.small else None]:
            for constant, value in zip(names, tile, strict=True):
                setattr(grouped_triton, constant, value)
            if run.left() < 8:
                break
            try:
                side = functools.partial(jax.jit(lambda x, w: grouped_matmul(x, w, sizes, "triton")), x, w)
                rates[str(tile)] = 2e-12 * x.shape[0] * w.shape[1] * w.shape[2] / seconds({"": side}, rounds=1)[""]
            except Exception as error:
                rates[str(tile)] = f"{type(error).__name__}: {error}"[:100]
    finally:
        for constant, value in zip(names, usual, strict=True):
            setattr(grouped_triton, constant, value)
    best = max((rate for rate in rates.values() if isinstance(rate, float)), default=None)
    run.line(f"grouped_{name}_tiles", best, "TFLOP/s", peer=f"as it is: {usual}", dtype="bfloat16", tiles=rates)
