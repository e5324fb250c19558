"""Vision features to the tokens of 64 v5p chips, compiled by the real TPU compiler without a TPU (row f of the bounds).

Every chip has encoded 8192 features of width 7168 in bfloat16, and its rows have room for twice as many (K2.5 §3.8). The
figure is the memory that the forward program needs above arguments and results, with the number of its all-to-alls: one in
the loop of each hop. The program is the same whatever the images; the tables of batches with images of heavy-tailed sizes,
and of one in which a chip's features all go to one other chip, are made to see that. Beside it stands a global gather that
the compiler lays out. Needs the `preflight` extra: pip install -e ".[preflight]". With --json one JSON line.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import ConfigError, DataConfig, Experiment, K25Config, VisionConfig
from k25_jax.parallel import dep
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES

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


def one_to_one(rng) -> np.ndarray:
    """media_BL where the rows of a chip have all features of one other chip."""
    return in_rows(rng.permutation(CHIPS)[:, None] * FEATURES + np.arange(FEATURES))


def in_rows(features_XM: np.ndarray) -> np.ndarray:
    """The features of each chip as the first halves of its rows: media_BL."""
    media_BL = np.full((CHIPS * ROWS, LENGTH), -1, np.int32)
    media_BL[:, : FEATURES // ROWS] = features_XM.reshape(CHIPS * ROWS, -1)
    return media_BL


def exchange_of(mesh: Mesh) -> dep.Exchange:
    config = VisionConfig(patch_size=1)  # patches of 3 values: their contents do not matter here
    data = DataConfig(batch_size=CHIPS * ROWS, seq_len=LENGTH, packs=CHIPS, pack_patches=FEATURES * config.group)
    return dep.exchange_of(Experiment(model=K25Config(vision=config), data=data), mesh)


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


def by_exchange(mesh: Mesh) -> dict:
    exchange = exchange_of(mesh)
    routes = dep.abstract_routes(exchange)

    def call(features_MD, spread_XJZU, pick_XJZU, land_XJZU):
        every, rows = PartitionSpec(AXES), PartitionSpec(RULES["batch"])

        def body(features_MD, spread_1JZU, pick_1JZU, land_1JZU):
            kept_ID = dep.spread(features_MD, spread_1JZU[0])
            x_TD = dep.moved(kept_ID, pick_1JZU[0], land_1JZU[0], ROWS * LENGTH)
            return x_TD.reshape(ROWS, LENGTH, WIDTH)

        return jax.shard_map(body, mesh=mesh, in_specs=(every,) * 4, out_specs=rows, check_vma=False)(
            features_MD, spread_XJZU, pick_XJZU, land_XJZU
        )

    place = NamedSharding(mesh, PartitionSpec(AXES))
    shapes = routes.spread_XJZU, *(jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in routes[1:])
    form = exchange.form
    sent = (form.kept + form.rounds * form.devices * form.width) * WIDTH * 2 / 1e9
    return figures(call, mesh, *((a, place) for a in shapes)) | {"rounds": form.spreads + form.rounds, "sent_gb": sent}


def served(mesh: Mesh) -> dict:
    """Whether each kind of batch has tables of the program's shapes; raises RouteError where one has not."""
    exchange, rng = exchange_of(mesh), np.random.default_rng(0)
    shapes = [a.shape for a in dep.abstract_routes(exchange)]
    kinds = {kind.__name__: kind(rng) for kind in (even, heavy_tailed, one_to_one)}
    made = {name: dep.routes_of(dep.clips_in(media_BL), exchange, range(CHIPS)) for name, media_BL in kinds.items()}
    return {name: [a.shape for a in routes] == shapes for name, routes in made.items()}


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
    ours, kinds = by_exchange(mesh), served(mesh)
    gather = by_gather(mesh, even(np.random.default_rng(0)))
    ok = ours["temp_gb"] <= BOUND_GB and ours["all_to_alls"] == 2 and all(kinds.values())
    out = {"name": "dep_routing", "figure": ours["temp_gb"], "bound": BOUND_GB, "ok": ok, **ours, "serves": kinds}
    out |= {"gather": gather, "ratio": gather["temp_gb"] / ours["temp_gb"]}
    if args.json:
        print(json.dumps(out))
        return
    for name, row in (("exchange", ours), ("global gather", gather)):
        rounds = f" in {row['rounds']} rounds, {row['sent_gb']:.2f} GB sent" if "rounds" in row else ""
        print(
            f"{name:13s} {row['temp_gb']:6.2f} GB above arguments and results, {row['all_to_alls']} all-to-alls{rounds}"
        )
    print(f"the same program serves {', '.join(name.replace('_', ' ') for name, same in kinds.items() if same)} images")
    print(f"bounds: {BOUND_GB} GB and two all-to-alls; the gather takes {out['ratio']:.0f} times the memory")


if __name__ == "__main__":
    main()
