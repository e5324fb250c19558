"""The vision encoder's backward pass under DEP, real size, on one v5p chip without a TPU (row e of the bounds).

MoonViT-3D and the projector in bfloat16 over 32k patches, forward and backward (K2.5 §3.2, §3.8). Figures: the bytes that
the backward pass keeps beyond the arguments, which is what lies in memory while the backbone runs; the FLOPs of both
passes over those of the forward pass, counted in the traced program with loops multiplied out; and the memory above
arguments and results, by the real TPU compiler. Beside one checkpoint a pack stands one a layer. Needs the `preflight`
extra: pip install -e ".[preflight]". With --json one JSON line.
"""

import argparse
import json
import math
import sys

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.sharding import SingleDeviceSharding

from k25_jax.config import ConfigError, K25Config
from k25_jax.models.k25 import abstract_params, cast, vision_features
from k25_jax.models.layers import layer_norm
from k25_jax.models.moonvit3d import encoder_block, normalise, pool, positions
from k25_jax.models.projector import project
from k25_jax.models.rope import axial_tables
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.vision.patchpack import empty_pack

TOPOLOGY, PATCHES, PACK_PATCHES, LONG_PACK = "v5p:2x2x1", 32768, 2048, 4096
BOUNDS = {"held_gb": 0.0, "flops_over_forward": 4.0, "temp_gb": 12.5}
CONFIG = K25Config()


def a_pack(weights, packs):
    """One checkpoint a pack: the form that DEP trains with."""
    return vision_features(weights, packs, CONFIG, "full", jnp.bfloat16)


def a_layer(weights, packs):
    """One checkpoint a layer, the usual form, in the same loop over packs: holds the input of every layer."""
    vision = CONFIG.vision

    def one_pack(pack):
        p = cast(weights, jnp.bfloat16)
        x_NW = normalise(pack.patches_PNC).astype(jnp.bfloat16) @ p["vision"]["patch_embed"]["kernel"]
        x_NW = x_NW + positions(p["vision"], pack.coords_PN5, vision).astype(x_NW.dtype)
        rope = axial_tables(vision, pack.coords_PN5[:, 1], pack.coords_PN5[:, 2])

        @jax.checkpoint
        def layer(x_NW, block):
            return encoder_block(block, x_NW, rope, pack.segments_PN, vision), None

        x_NW, _ = jax.lax.scan(layer, x_NW, p["vision"]["blocks"])
        x_NW = layer_norm(x_NW, p["vision"]["final_norm"], vision.norm_eps)
        return project(p["projector"], pool(x_NW, pack.slots_PN, pack.weights_PN, vision), CONFIG)

    return jax.lax.map(one_pack, packs).reshape(-1, CONFIG.text.d_model)


def a_layer_in_all(weights, packs):
    """The same inside one more checkpoint, so that nothing is held."""
    return jax.checkpoint(a_layer)(weights, packs)


def shapes(pack_patches: int):
    params = abstract_params(CONFIG)
    packs = empty_pack(PATCHES // pack_patches, pack_patches, CONFIG.vision)
    packs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), packs)
    return {"vision": params["vision"], "projector": params["projector"]}, packs


def held_gb(function, weights, packs) -> float:
    """What the backward pass is left by the forward one, less arguments, and constants, which depend on none."""
    traced = jax.make_jaxpr(lambda w, p: jax.vjp(lambda w: function(w, p), w)[1])(weights, packs).jaxpr
    computed = set(traced.invars)
    for eqn in traced.eqns:
        if any(isinstance(v, Var) and v in computed for v in eqn.invars):
            computed |= set(eqn.outvars)
    kept = {v for v in traced.outvars if isinstance(v, Var)} & computed - set(traced.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept) / 1e9


def both_passes(function):
    def run(weights, packs, dfeatures_MD):
        features_MD, backward = jax.vjp(lambda w: function(w, packs), weights)
        return features_MD, backward(dfeatures_MD)

    return run


def flops(jaxpr) -> int:
    """Of the matrix products, bodies of loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        inner = sum(flops(sub) for sub in inside(eqn.params))
        total += inner * eqn.params.get("length", 1)
    return total


def inside(params: dict):
    """The programs that an operation holds."""
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda a: isinstance(a, (Jaxpr, ClosedJaxpr))):
        if isinstance(leaf, (Jaxpr, ClosedJaxpr)):
            yield getattr(leaf, "jaxpr", leaf)


def figures(function, device, pack_patches: int) -> dict:
    weights, packs = shapes(pack_patches)
    dfeatures = jax.ShapeDtypeStruct((PATCHES // CONFIG.vision.group, CONFIG.text.d_model), jnp.bfloat16)
    forward = flops(jax.make_jaxpr(function)(weights, packs).jaxpr)
    run, arguments = both_passes(function), (weights, packs, dfeatures)
    both = flops(jax.make_jaxpr(run)(*arguments).jaxpr)
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    memory = jax.jit(run).lower(*placed).compile().memory_analysis()
    return {
        "held_gb": held_gb(function, weights, packs),
        "flops_over_forward": both / forward,
        "temp_gb": temporaries(memory) / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    try:
        device = devices_of(parse_topology(TOPOLOGY))[0]
    except ConfigError as error:
        sys.exit(str(error))
    ours = figures(a_pack, device, PACK_PATCHES)
    peers = {f.__name__: figures(f, device, PACK_PATCHES) for f in (a_layer, a_layer_in_all)}
    peers |= {"a_long_pack": figures(a_pack, device, LONG_PACK)}
    ok = all(ours[name] <= bound for name, bound in BOUNDS.items())
    out = {"name": "dep_memory", "figure": ours["flops_over_forward"], "bound": BOUNDS["flops_over_forward"], "ok": ok}
    out |= ours | {"bounds": BOUNDS, "pack_patches": PACK_PATCHES, **peers}
    if args.json:
        print(json.dumps(out))
        return
    titles = (f"one checkpoint a pack of {PACK_PATCHES}", "one a layer", "one a layer, in one of all")
    titles += (f"one a pack of {LONG_PACK}",)
    for title, row in zip(titles, (ours, *peers.values()), strict=True):
        print(
            f"{title:32s} holds {row['held_gb']:.2f} GB, FLOPs {row['flops_over_forward']:.3f} x forward, "
            f"{row['temp_gb']:.2f} GB above arguments and results"
        )
    print("bounds: {held_gb} GB, {flops_over_forward} x, {temp_gb} GB".format(**BOUNDS))


if __name__ == "__main__":
    main()
