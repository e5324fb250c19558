"""Vision features to the tokens of 64 v5p chips, compiled by the real TPU compiler without a TPU (row f of the bounds).

Every chip has encoded 8192 features of width 7168 in bfloat16, and its rows have tokens for as many (K2.5 §3.8). The
figure is the memory that the forward program needs above arguments and results, with the number of its all-to-alls.
Beside it stand the same for images of heavy-tailed sizes, where some pairs of chips exchange much more than others and
the exchange takes several rounds, and for a global gather that the compiler lays out. Needs the `preflight` extra:
pip install -e ".[preflight]". With --json one JSON line.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import ConfigError, VisionConfig
from k25_jax.data.packing import Batch
from k25_jax.parallel.dep import exchange, routed
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES
from k25_jax.vision.patchpack import empty_pack

TOPOLOGY, SHAPE, FEATURES, WIDTH = "v5p:4x4x4", (4, 4, 1, 4), 8192, 7168
CHIPS, ROWS, LENGTH = 64, 2, 8192  # rows of a chip, tokens of a row: half of them are vision
BOUND_GB = 0.3


def even(rng) -> np.ndarray:
    """media_BL where every chip has as many features for each chip as for any other."""
    media_ZXU = np.arange(CHIPS * FEATURES).reshape(CHIPS, CHIPS, -1).swapaxes(0, 1)
    return in_rows(media_ZXU.reshape(CHIPS, FEATURES))


def heavy_tailed(rng) -> np.ndarray:
    """media_BL where images of 4 to 1024 tokens, log-normal, lie in rows of other chips at random."""
    sizes = np.clip(np.exp(rng.normal(np.log(150), 1.2, CHIPS * FEATURES)), 4, 1024).astype(int)
    ends = sizes.cumsum()
    images = np.split(np.arange(CHIPS * FEATURES), ends[ends < CHIPS * FEATURES])
    order = rng.permutation(len(images))
    return in_rows(np.concatenate([images[i] for i in order]).reshape(CHIPS, FEATURES))


def in_rows(features_XM: np.ndarray) -> np.ndarray:
    """The features of each chip as the first halves of its rows: media_BL."""
    media_BL = np.full((CHIPS * ROWS, LENGTH), -1, np.int32)
    media_BL[:, : FEATURES // ROWS] = features_XM.reshape(CHIPS * ROWS, -1)
    return media_BL


def tables(media_BL: np.ndarray):
    config = VisionConfig(patch_size=1)  # patches of 3 values: their contents do not matter here
    packs = empty_pack(CHIPS, FEATURES * config.group, config)
    blank = Batch(*(None,) * 5, media_BL=media_BL, vision=packs)
    return routed(blank, dict(zip(AXES, SHAPE, strict=True)), config).routes


def figures(function, mesh: Mesh, *arguments) -> dict:
    """Temporary memory, and how often the program exchanges, of one forward pass."""
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    every = NamedSharding(mesh, PartitionSpec(AXES))
    features = jax.ShapeDtypeStruct((CHIPS * FEATURES, WIDTH), jnp.bfloat16, sharding=every)
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a, place in arguments]
    program = jax.jit(function, out_shardings=rows).lower(features, *placed).compile()
    text = program.as_text()
    count = sum(text.count(f" {name}(") for name in ("all-to-all", "all-to-all-start", "ragged-all-to-all"))
    return {"temp_gb": temporaries(program.memory_analysis()) / 1e9, "all_to_alls": count}


def by_exchange(mesh: Mesh, media_BL: np.ndarray) -> dict:
    send, land = tables(media_BL)

    def body(features_MD, send_XJZU, land_ZJXU):
        return exchange(features_MD, send_XJZU[0], land_ZJXU[0], ROWS * LENGTH).reshape(ROWS, LENGTH, WIDTH)

    every = PartitionSpec(AXES)
    place = NamedSharding(mesh, every)
    call = jax.shard_map(
        body, mesh=mesh, in_specs=(every,) * 3, out_specs=PartitionSpec(RULES["batch"]), check_vma=False
    )
    return figures(call, mesh, (send, place), (land, place)) | {"rounds": send.shape[1], "slots": send.shape[3]}


def by_gather(mesh: Mesh, media_BL: np.ndarray) -> dict:
    def call(features_MD, media_BL):
        return jnp.where(media_BL[..., None] >= 0, features_MD[jnp.maximum(media_BL, 0)], 0)

    return figures(call, mesh, (media_BL, NamedSharding(mesh, PartitionSpec(RULES["batch"]))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    try:
        devices = devices_of(parse_topology(TOPOLOGY))
    except ConfigError as error:
        sys.exit(str(error))
    mesh = Mesh(np.asarray(devices).reshape(SHAPE), AXES)
    rng = np.random.default_rng(0)
    ours, mix = by_exchange(mesh, even(rng)), by_exchange(mesh, heavy_tailed(rng))
    gather = by_gather(mesh, even(rng))
    ok = ours["temp_gb"] <= BOUND_GB and ours["all_to_alls"] == 1
    out = {"name": "dep_routing", "figure": ours["temp_gb"], "bound": BOUND_GB, "ok": ok, **ours}
    out |= {"heavy_tailed": mix, "gather": gather, "ratio": gather["temp_gb"] / ours["temp_gb"]}
    if args.json:
        print(json.dumps(out))
        return
    for name, row in (("exchange", ours), ("exchange, heavy-tailed images", mix), ("global gather", gather)):
        rounds = f" in {row['rounds']} rounds of {row['slots']} a pair" if "rounds" in row else ""
        print(
            f"{name:30s} {row['temp_gb']:6.2f} GB above arguments and results, {row['all_to_alls']} all-to-all{rounds}"
        )
    print(f"bounds: {BOUND_GB} GB and one all-to-all; the gather takes {out['ratio']:.0f} times the memory")


if __name__ == "__main__":
    main()
