"""The dropless expert-parallel layer on 8 CPU devices beside the dense one-hot form (row c of the bounds).

384 experts, top 8, as in K2.5, narrow enough for a CPU, forward and backward. The dense form passes every token through
every expert and keeps what the router chose; it is shared out over the same 8 devices. The figure is its time over ours,
the median of rounds in which all run one after the other; all give the same result and the same gradients. Beside our
default, the gather, stands the all-to-all. With --topology=v5p-256 a layer of K2.5's real width is compiled for such chips
too, 16 of them sharing out the experts, to see what a chip sends in either form (needs the `preflight` extra). With --json
one JSON line.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from k25_jax.config import MoEConfig
from k25_jax.models.experts import ROWS, routed
from k25_jax.preflight import hlo
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.mesh import make_mesh

BOUND, ERROR_BOUND = 10.0, 1e-5
FORMS = ("gather", "alltoall")
WIDTH, TOKENS, EXPERT = 7168, 4096, 16  # of K2.5: width, a chip's tokens, chips that share out the experts


def dense(p, x_BLD, weights_BLK, experts_BLK):
    """Every token through every expert in three plain products, kept by the one-hot of the choice; the definition."""
    combine_BLE = jnp.einsum("blk,blke->ble", weights_BLK, jax.nn.one_hot(experts_BLK, p["gate"].shape[0]))
    gate_BLEF, up_BLEF = (jnp.einsum("bld,edf->blef", x_BLD, p[name]) for name in ("gate", "up"))
    return jnp.einsum("blef,efd->bld", jax.nn.silu(gate_BLEF) * up_BLEF * combine_BLE[..., None], p["down"])


def problem(tokens: int, width: int, ffn: int, mesh):
    """(config, weights, tokens, router weights, chosen experts), laid out over `mesh`; loads are uneven by nature."""
    config = MoEConfig(ffn_dim=ffn)
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    p = {
        name: place(jax.random.normal(key, (config.experts, *shape)) * shape[0] ** -0.5, "expert")
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    scores_TE = jax.random.normal(keys[3], (tokens, config.experts)) + 0.5 * jax.random.normal(
        keys[4], (config.experts,)
    )
    weights_TK, experts_TK = jax.lax.top_k(jax.nn.sigmoid(scores_TE), config.top_k)
    x_TD = jax.random.normal(keys[5], (tokens, width))
    return config, p, *(place(a.reshape(8, tokens // 8, -1), ROWS) for a in (x_TD, weights_TK, experts_TK))


def gradients(layer):
    """(result, gradients of weights, tokens and router weights) of a layer, compiled."""

    def loss(p, x_BLD, weights_BLK, experts_BLK):
        y_BLD = layer(p, x_BLD, weights_BLK, experts_BLK)
        return (y_BLD * jnp.sin(jnp.arange(y_BLD.shape[-1]))).mean(), y_BLD

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def seconds(function, arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def error(ours, theirs) -> float:
    """The largest difference of an array over its largest value, over result and gradients."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)


def ours(config: MoEConfig, form: str):
    """Our layer in one of the two forms."""
    config = dataclasses.replace(config, dispatch=form)

    def layer(p, x_BLD, weights_BLK, experts_BLK):
        load_E = jnp.bincount(experts_BLK.reshape(-1), length=config.experts)
        return routed(p, x_BLD, weights_BLK, experts_BLK, load_E, config)

    return gradients(layer)


def sent(name: str, form: str) -> float:
    """GB that a chip of topology `name` sends along `expert` for one K2.5 layer in bfloat16, forward and backward."""
    mesh, config = (
        make_mesh(expert=EXPERT, devices=devices_of(parse_topology(name))),
        MoEConfig(grouped_matmul="megablox"),
    )
    chips, ffn = mesh.size, config.ffn_dim

    def shape(dims, dtype, *axes):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    p = {name: shape((config.experts, WIDTH, ffn), jnp.bfloat16, "expert", "fsdp") for name in ("gate", "up")}
    p["down"] = shape((config.experts, ffn, WIDTH), jnp.bfloat16, "expert", None, "fsdp")
    tokens = ((WIDTH, jnp.bfloat16), (config.top_k, jnp.float32), (config.top_k, jnp.int32))
    rows = [shape((chips, TOKENS, last), dtype, ROWS) for last, dtype in tokens]
    with jax.set_mesh(mesh):
        program = hlo.parse(ours(config, form).lower(p, *rows).compile().as_text())
    found = hlo.collectives(program, hlo.runs(program)[0], dict(mesh.shape))
    return sum(item.bytes * item.times for item in found if item.axes == ("expert",)) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--topology", default="", help="chips to compile the real width for, as v5p-256")
    for name, default in (("tokens", 4096), ("width", 256), ("ffn", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    mesh = make_mesh(expert=8)
    with jax.set_mesh(mesh):
        config, *arguments = problem(args.tokens, args.width, args.ffn, mesh)
        layers = [gradients(dense), *(ours(config, form) for form in FORMS)]
        want, *results = [layer(*arguments) for layer in layers]
        difference = max(error(result, want) for result in results)
        rounds = [[seconds(layer, arguments) for layer in layers] for _ in range(args.rounds)]
    ratios = [dense_time / our_time for dense_time, our_time, _ in rounds]
    figure = statistics.median(ratios)
    ok = figure >= BOUND and difference <= ERROR_BOUND
    out = {"name": "expert_parallel", "figure": figure, "bound": BOUND, "ok": ok, "error": difference}
    out |= {"error_bound": ERROR_BOUND, "range": [min(ratios), max(ratios)], "rounds": args.rounds}
    names = ("dense_seconds", "seconds", "alltoall_seconds")
    out |= {name: statistics.median(times) for name, times in zip(names, zip(*rounds, strict=True), strict=True)}
    out |= {f"{form}_sent_gb": sent(args.topology, form) for form in FORMS if args.topology}
    if args.json:
        print(json.dumps(out))
        return
    print(
        f"{args.tokens} tokens, {config.experts} experts {args.width} -> {args.ffn}, top {config.top_k}, 8 CPU devices"
    )
    print(
        f"forward and backward: dense one-hot {out['dense_seconds']:.3f} s, ours by gather {out['seconds']:.3f} s, "
        f"by all-to-all {out['alltoall_seconds']:.3f} s"
    )
    print(f"ratio {figure:.1f} [{min(ratios):.1f}, {max(ratios):.1f}], bound {BOUND}")
    print(f"largest relative difference {difference:.1e}, bound {ERROR_BOUND}")
    if args.topology:
        both = " and ".join(f"{out[f'{form}_sent_gb']:.2f} GB by {form}" for form in FORMS)
        print(
            f"a K2.5 layer of {TOKENS} tokens a chip, experts over {EXPERT} chips of {args.topology}: a chip sends {both}"
        )


if __name__ == "__main__":
    main()
