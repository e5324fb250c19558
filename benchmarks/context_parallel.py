"""Attention over 262144 tokens shared out over 16 v5p chips, compiled by the real TPU compiler (row j of the bounds).

One MLA layer's attention at K2.5's real width, forward and backward, in bfloat16. The figures: the memory that the program
needs above arguments and results, and the bytes that a chip holds of what the forward pass gathers, which are the latents.
Beside them stands what a ring over keys and values would pass on instead. With --json one JSON line.
"""

import argparse
import json
import math
import sys
import time

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from k25_jax.config import ConfigError, TextConfig
from k25_jax.models.context import attend_over_context
from k25_jax.models.rope import softmax_scale
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.mesh import make_mesh

TOPOLOGY, SHARES = "v5p:2x2x4", 16
TEMP_BOUND_GB, GATHERED_BOUND_GB = 6.0, 0.31


def arguments(mesh, config: TextConfig, tokens: int):
    """(expansions, queries, latents, rotary keys, segments) of one row, as shapes with layouts."""

    def shape(*sizes, striped=True, dtype=jnp.bfloat16):
        spec = PartitionSpec(None, "context") if striped else PartitionSpec()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    rank, heads = config.kv_lora_rank, config.heads
    k_b, v_b = (shape(rank, heads, dim, striped=False) for dim in (config.qk_nope_dim, config.v_dim))
    striped = (heads, config.qk_dim), (rank,), (config.qk_rope_dim,)
    return {"k_b": k_b, "v_b": v_b}, *(shape(1, tokens, *sizes) for sizes in striped), shape(1, tokens, dtype=jnp.int32)


def gathered_gb(function, args) -> float:
    """Bytes that all-gathers over `context` leave on a device, read from the program as it was written."""

    def walk(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "all_gather":
                total += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
            total += sum(walk(getattr(inner, "jaxpr", inner)) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--tokens", type=int, default=262144)
    args = parser.parse_args()
    try:
        devices = devices_of(parse_topology(TOPOLOGY))
    except ConfigError as error:
        sys.exit(str(error))
    config, mesh = TextConfig(), make_mesh(context=SHARES, devices=devices)

    def forward(p, q, c, r, segments):
        return attend_over_context(p, q, c, r, segments, softmax_scale(config))[0]

    def both(p, q, c, r, segments):
        out, pull = jax.vjp(lambda *a: forward(*a, segments), p, q, c, r)
        return out, pull(out)

    with jax.set_mesh(mesh):
        inputs, began = arguments(mesh, config, args.tokens), time.perf_counter()
        memory = jax.jit(both).lower(*inputs).compile().memory_analysis()
        seconds = time.perf_counter() - began
        gathered = gathered_gb(forward, inputs)
    temp = temporaries(memory) / 1e9
    ring = args.tokens * config.heads * (config.qk_dim + config.v_dim) * 2 / 1e9
    ok = temp <= TEMP_BOUND_GB and gathered <= GATHERED_BOUND_GB
    out = {"name": "context_parallel", "figure": temp, "bound": TEMP_BOUND_GB, "ok": ok, "gathered_gb": gathered}
    out |= {"gathered_bound_gb": GATHERED_BOUND_GB, "ring_gb": ring, "tokens": args.tokens, "compile_s": seconds}
    if args.json:
        print(json.dumps(out))
        return
    print(f"{args.tokens} tokens over {SHARES} v5p chips, one layer, forward and backward; compiled in {seconds:.0f} s")
    print(f"memory beside arguments and results {temp:.2f} GB a chip (bound {TEMP_BOUND_GB})")
    print(f"gathered {gathered:.3f} GB (bound {GATHERED_BOUND_GB}); keys and values would be {ring:.1f} GB")


if __name__ == "__main__":
    main()
