"""Products over groups of rows, compiled for v5p and v5e by the real TPU compiler without a TPU (row b of the bounds).

48 of K2.5's experts on a chip, 7168 -> 2048, at the rows that a chip gets when eight chips share the experts and each
brings four rows of 4096 tokens: 131072 for all its experts together. The figure is the largest ratio of FLOPs over those
of the rows alone, of the product and its two gradients on both chips. The kernel reports no FLOPs to the compiler: they
follow from its grid and its tiles, and from how many tiles of rows the experts touch. Beside it stands XLA's `ragged_dot`
as the compiler counts it. Needs the `preflight` extra: pip install -e ".[preflight]". With --json one JSON line.
"""

import argparse
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from jax.sharding import SingleDeviceSharding

from k25_jax.config import ConfigError
from k25_jax.kernels.grouped_matmul import TILE, grouped_matmul
from k25_jax.preflight.topology import devices_of, parse_topology

EXPERTS, WIDTH, HIDDEN = 48, 7168, 2048
ROWS = 8 * 4 * 4096 * 8 // 8  # chips x rows x tokens x experts a token, an eighth of it
TOPOLOGIES, BOUND = ("v5p:2x2x1", "v5e:2x2"), 1.05
PRODUCTS = ("forward", "d-lhs", "d-rhs")


def loads() -> dict[str, np.ndarray]:
    """Rows of each expert: equal, and with a heavy tail (the busiest has some 10 times the mean)."""
    weights = np.random.default_rng(0).pareto(1.2, EXPERTS) + 0.05
    heavy = np.floor(weights / weights.sum() * ROWS).astype(np.int32)
    heavy[heavy.argmax()] += ROWS - heavy.sum()
    equal = np.full(EXPERTS, ROWS // EXPERTS, np.int32)
    equal[0] += ROWS - equal.sum()
    return {"equal": equal, "heavy": heavy}


def functions(implementation: str) -> dict:
    """The product and its gradients as functions of (x_ND, w_EDF, dy_NF, sizes_E)."""

    def pulled(x, w, sizes):
        return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w)[1]

    return {
        "forward": lambda x, w, dy, sizes: grouped_matmul(x, w, sizes, implementation),
        "d-lhs": lambda x, w, dy, sizes: pulled(x, w, sizes)(dy)[0],
        "d-rhs": lambda x, w, dy, sizes: pulled(x, w, sizes)(dy)[1],
    }


def arguments(sharding=None) -> tuple:
    shapes = ((ROWS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (ROWS, HIDDEN))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return *arrays, jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=sharding)


def kernels(jaxpr):
    """The Pallas calls in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            yield from (call for inner in jaxprs_in_params(eqn.params) for call in kernels(inner))


def kernel_flops(function, sizes_E: np.ndarray) -> float:
    """Steps of the grid times the FLOPs of one. How many tiles of rows there are, the kernel's own plan says."""
    whole = jax.make_jaxpr(function)(*arguments())
    used, _ = partial_eval.dce_jaxpr(whole.jaxpr, [True])
    (call,) = kernels(used)
    grid = call.params["grid_mapping"]
    static = math.prod(n for n in grid.grid if isinstance(n, int))
    _, tiles = make_group_metadata(
        group_sizes=jnp.asarray(sizes_E), m=ROWS, tm=TILE, start_group=0, num_nonzero_groups=EXPERTS
    )
    # Three blocks [tm,tk], [tk,tn], [tm,tn] have (tm tk tn) squared entries.
    entries = math.prod(getattr(n, "block_size", 1) for block in grid.block_mappings for n in block.block_shape)
    return 2.0 * math.isqrt(entries) * static * int(tiles)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    ideal, rows = 2.0 * ROWS * WIDTH * HIDDEN, []
    try:
        chips = {name: devices_of(parse_topology(name))[0] for name in TOPOLOGIES}
    except ConfigError as error:
        sys.exit(str(error))
    ours, theirs = functions("megablox"), functions("ragged")
    for product in PRODUCTS:
        ratios = {name: kernel_flops(ours[product], sizes) / ideal for name, sizes in loads().items()}
        for chip, device in chips.items():
            place = arguments(SingleDeviceSharding(device))
            jax.jit(ours[product]).lower(*place).compile()  # or else its tiles are too large for the chip
            peer = jax.jit(theirs[product]).lower(*place).compile().cost_analysis()["flops"] / ideal
            rows.append({"product": product, "chip": chip, **ratios, "ragged_dot": peer})
    figure = max(row[load] for row in rows for load in loads())
    peer = max(row["ragged_dot"] for row in rows)
    out = {"name": "grouped_matmul", "figure": figure, "bound": BOUND, "ok": figure <= BOUND}
    out |= {"ragged_dot": peer, "ratio": peer / figure, "rows": ROWS, "products": rows}
    if args.json:
        print(json.dumps(out))
        return
    for row in rows:
        print(
            f"{row['chip']:10s}{row['product']:8s} kernel {row['equal']:.3f} x ideal with equal loads, {row['heavy']:.3f} "
            f"with a heavy tail; ragged_dot {row['ragged_dot']:.2f}"
        )
    print(f"bound: {BOUND}; the worst is {figure:.3f}")


if __name__ == "__main__":
    main()
