"""Muon's heaviest matrices over 128 v5p chips, compiled by the real TPU compiler without a TPU (row d of the bounds).

The experts of four K2.5 layers, [4, 384, 7168, 2048], split over `expert` and `fsdp` as the rules table says. The
figure is the FLOPs of a chip over 1/128 of those that five Newton-Schulz iterations need. Beside it stand the memory that
the program needs above arguments and results, and the same of optax's Muon. Needs the `preflight` extra:
pip install -e ".[preflight]". With --json one JSON line.
"""

import argparse
import json
import math
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import _muon

from k25_jax.config import ConfigError
from k25_jax.optim.newton_schulz import STEPS, sharded_newton_schulz
from k25_jax.preflight import hlo
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.mesh import make_mesh

SHAPE, TOPOLOGY, FSDP, EXPERT = (4, 384, 7168, 2048), "v5p:4x4x8", 8, 16
BOUND, MEMORY_BOUND_GB = 1.05, 1.0


def ideal_flops() -> float:
    """Of one chip: its share of the matrices, with products over the shorter side."""
    *stack, rows, columns = SHAPE
    short, long = min(rows, columns), max(rows, columns)
    return math.prod(stack) * STEPS * (4 * long * short**2 + 2 * short**3) / (FSDP * EXPERT)


def compiled(function, layout):
    argument = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=layout)
    return jax.jit(function, out_shardings=layout).lower(argument).compile()


def figures(program) -> dict:
    """FLOPs of products, right through loops, over ideal; and temporary memory."""
    text = hlo.parse(program.as_text())
    flops = hlo.products(text, hlo.runs(text)[0])
    return {"flops_over_ideal": flops / ideal_flops(), "temp_gb": temporaries(program.memory_analysis()) / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    try:
        devices = devices_of(parse_topology(TOPOLOGY))
    except ConfigError as error:
        sys.exit(str(error))
    mesh = make_mesh(fsdp=FSDP, expert=EXPERT, devices=devices)
    layout = NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp", None))
    ours = figures(compiled(lambda a: sharded_newton_schulz(a, layout), layout))

    def theirs(a):
        axes = optax.contrib.MuonDimensionNumbers(-2, -1)
        coefficients = jnp.asarray(_muon._DEFAULT_NS_COEFFS)
        return _muon.orthogonalize_via_newton_schulz(a.astype(jnp.bfloat16), coefficients, dimension_numbers=axes)

    peer = figures(compiled(lambda a: theirs(a).astype(jnp.float32), layout))
    ok = ours["flops_over_ideal"] <= BOUND and ours["temp_gb"] <= MEMORY_BOUND_GB
    out = {"name": "newton_schulz", "figure": ours["flops_over_ideal"], "bound": BOUND, "ok": ok, **ours}
    out |= {
        "temp_bound_gb": MEMORY_BOUND_GB,
        "optax": peer,
        "ratio": peer["flops_over_ideal"] / ours["flops_over_ideal"],
    }
    if args.json:
        print(json.dumps(out))
        return
    for name, row in (("ours", ours), ("optax", peer)):
        print(
            f"{name:6s} FLOPs {row['flops_over_ideal']:.3f} x ideal, {row['temp_gb']:.2f} GB beside arguments and results"
        )
    print(f"bounds: {BOUND} and {MEMORY_BOUND_GB} GB; optax takes {out['ratio']:.1f} times our FLOPs")


if __name__ == "__main__":
    main()
