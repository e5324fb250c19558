"""Every way of sharing out the training step, on eight CPU devices against one (row a of the bounds).

Wherever there are images DEP is at work: features are encoded by all devices and travel to their tokens.

For each arm the gradients of all parameters, the statistics of the forward pass and the losses of three steps, float32.
The figure is the largest relative difference: of a gradient's entry to the largest of its array, or of a loss. With
--json one JSON line.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import argparse
import contextlib
import dataclasses
import functools
import json
from dataclasses import dataclass

import jax
import numpy as np

from k25_jax.config import DataConfig, Experiment, K25Config, MeshConfig, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import Batch, make_example, pack_examples
from k25_jax.parallel import hosts
from k25_jax.parallel.pipeline import layers_of
from k25_jax.train.layout import mesh_of
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import TrainState, in_layers, in_stages, init_state, state_shardings
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

STEPS, BOUND = 3, 1e-5
DATA = DataConfig(batch_size=16, seq_len=48, packs=8, pack_patches=64)


@dataclass(frozen=True)
class Arm:
    """One way of sharing out the step, compared with one device under the same optimizer."""

    mesh: MeshConfig
    optimizer: str = "muonclip"
    remat: str = "none"
    accumulate: int = 1
    dispatch: str = "gather"
    chunk: int = 0


ARMS = {
    "DEP": Arm(MeshConfig(1, 8, 1), optimizer="adamw"),
    "experts": Arm(MeshConfig(1, 2, 4)),
    "context": Arm(MeshConfig(1, 2, 1, context=4)),
    "pipeline": Arm(MeshConfig(4, 1, 2), optimizer="adamw", remat="dots"),
    "pipeline, experts": Arm(MeshConfig(2, 2, 2), remat="full"),
    "pipeline with repeats, experts": Arm(MeshConfig(2, 2, 2, repeats=2, microbatches=4), remat="full", chunk=24),
    "all, in two parts": Arm(
        MeshConfig(2, 1, 2, context=2, repeats=2, microbatches=4),
        remat="full",
        accumulate=2,
        dispatch="alltoall",
        chunk=12,
    ),
}


def model(dispatch: str = "gather", chunk: int = 0) -> K25Config:
    """The tiny model with one dense and four MoE layers."""
    tiny = preset("tiny")
    moe = dataclasses.replace(tiny.text.moe, dispatch=dispatch, chunk=chunk)
    return dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, layers=5, moe=moe))


def make_batch() -> Batch:
    """Random documents, every second with an image."""
    config, rng, examples = model(), np.random.default_rng(0), []
    for length in (48, 40, 48, 20, 20, 48, 30, 48, 33, 12, 36, 48, 44, 48, 48, 25, 48):
        clip = Clip(rng.integers(0, 256, (16, config.vision.patch_dim)).astype(np.uint8), (1, 4, 4))
        clips = [clip] if len(examples) % 2 else []
        tokens = [config.media_pad_id] * len(clips) + rng.integers(0, 256, length - 4 * len(clips)).tolist()
        examples.append(make_example(tokens, [1.0] * len(tokens), clips, config.media_pad_id))
    return pack_examples(examples, DATA, config)


def experiment_of(arm: Arm) -> Experiment:
    """The run of one arm."""
    optim = OptimConfig(name=arm.optimizer, muon_dtype="float32", warmup_steps=1, peak_lr=1e-3, clip_norm=1e9)
    train = TrainConfig(steps=STEPS, remat=arm.remat, accumulate=arm.accumulate)
    return Experiment(model=model(arm.dispatch, arm.chunk), data=DATA, optim=optim, train=train, mesh=arm.mesh)


@functools.cache
def initial_state(optimizer: str) -> TrainState:
    """The state that all arms with this optimizer begin with, on the host."""
    return jax.device_get(init_state(experiment_of(Arm(MeshConfig(), optimizer))))


def observed_loss(params, batch, experiment: Experiment):
    """The loss, with all that the forward pass observed among its metrics."""
    loss, (metrics, stats) = loss_fn(params, batch, experiment)
    return loss, (metrics | stats._asdict(), stats)


def run(arm: Arm, batch: Batch, one_device: bool):
    """(gradients, load_YE, max_logit_YH, losses of STEPS steps) on the arm's mesh or on one device.

    Gradients are read from the first step's means, which are they, but for a factor, as long as nothing is clipped.
    """
    experiment, seen = experiment_of(arm), []
    mesh = None if one_device else mesh_of(experiment)
    state = jax.device_put(initial_state(arm.optimizer), mesh and state_shardings(experiment, mesh))
    state = in_stages(state, experiment, mesh) if mesh else state
    batch = hosts.place(batch, mesh, experiment) if mesh else batch
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        step = make_step(experiment, observed_loss, mesh)
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            ordered = in_layers(state, experiment, mesh) if mesh else state
            seen.append(jax.device_get((metrics, ordered.opt_state.mu)))
    first, grads = seen[0]
    load_YE, max_logit_YH = first["load_YE"], first["max_logit_YH"]
    if mesh:
        places = np.argsort(layers_of(len(load_YE), arm.mesh.pipe, arm.mesh.repeats))
        dense = len(max_logit_YH) - len(load_YE)
        max_logit_YH = max_logit_YH.copy()
        load_YE, max_logit_YH[dense:] = load_YE[places], max_logit_YH[dense:][places]
    return grads, load_YE, max_logit_YH, np.asarray([metrics["loss"] for metrics, _ in seen])


def difference(a, b) -> float:
    """The largest difference of an entry, relative to the largest entry."""
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))


def compare(name: str, batch: Batch, one_device: dict) -> dict:
    """The differences of arm `name` from one device; `one_device` keeps the latter's results by optimizer."""
    arm = ARMS[name]
    if arm.optimizer not in one_device:
        one_device[arm.optimizer] = run(dataclasses.replace(arm, remat="none", accumulate=1), batch, one_device=True)
    want_grads, want_load_YE, want_max_logit_YH, want_losses = one_device[arm.optimizer]
    grads, load_YE, max_logit_YH, losses = run(arm, batch, one_device=False)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want_grads)]
    errors = map(difference, jax.tree.leaves(want_grads), jax.tree.leaves(grads))
    worst, gradient = max(zip(paths, errors, strict=True), key=lambda pair: pair[1])
    return {
        "gradient": gradient,
        "worst": worst,
        "loss": float(np.abs(losses / want_losses - 1).max()),
        "load": int(np.abs(load_YE - want_load_YE).max()),
        "max_logit": float(np.abs(max_logit_YH / want_max_logit_YH - 1).max()),
    }


def worst_of(row: dict) -> float:
    """The figure of one arm; a load that differs at all is too much."""
    return max(row[name] for name in ("gradient", "loss", "load", "max_logit"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    batch, one_device = make_batch(), {}
    rows = {name: compare(name, batch, one_device) for name in ARMS}
    figure = max(map(worst_of, rows.values()))
    if args.json:
        print(json.dumps({"name": "parallel", "figure": figure, "bound": BOUND, "ok": figure <= BOUND, "arms": rows}))
        return
    for name, row in rows.items():
        mesh = ARMS[name].mesh
        sizes = f"{mesh.pipe}x{mesh.fsdp}x{mesh.context}x{mesh.expert}"
        print(
            f"{name:32s} {sizes}  gradients {row['gradient']:.1e} ({row['worst']}), "
            f"losses {row['loss']:.1e}, largest logits {row['max_logit']:.1e}, tokens of an expert {row['load']}"
        )
    print(f"largest relative difference from one device: {figure:.1e} (bound {BOUND:.0e})")


if __name__ == "__main__":
    main()
