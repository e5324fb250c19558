"""The loss of the stage rl on two and eight devices against one, with pictures by DEP, in a process of its own."""

import pytest

import runs

EQUAL = """
import dataclasses, sys; sys.path[:0] = ["tests"]
import jax, numpy as np
from k25_jax.config import DataConfig, Experiment, RLConfig, TrainConfig, preset
from k25_jax.data.packing import pack_samples
from k25_jax.models.k25 import init_params
from k25_jax.parallel import dep, hosts
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.rl import logprobs, loss_fn
from samples import draw_samples

TINY = preset("tiny")
text, vision = dataclasses.replace(TINY.text, layers=2, dense_layers=0), dataclasses.replace(TINY.vision, layers=1)
MODEL = dataclasses.replace(TINY, text=text, vision=vision)
DATA = DataConfig(batch_size=16, seq_len=48, packs=16, pack_patches=32)
params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
batch = pack_samples(draw_samples(np.random.default_rng(0), MODEL, 24), DATA, MODEL)
grads_of = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)
logprobs_of = jax.jit(logprobs, static_argnums=2)

def run(axes=None, parts=1, arm="dep", form="k25"):
    train, rl = TrainConfig(vision=arm, accumulate=parts), RLConfig(loss=form)
    experiment = Experiment(model=MODEL, data=DATA, stage="rl", train=train, rl=rl)
    if axes is None:
        (loss, (metrics, _)), grads = grads_of(params, batch, experiment)
        return jax.device_get((loss, metrics, grads)), np.asarray(logprobs_of(params, batch, experiment))
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    with jax.set_mesh(mesh):
        placed = hosts.place(batch, mesh, experiment)
        assert (placed.routes is None) == (arm == "plain") and placed.old_logprobs_BL.sharding == placed.tokens_BL.sharding
        (loss, (metrics, _)), grads = grads_of(params, placed, experiment)
        return jax.device_get((loss, metrics, grads)), np.asarray(logprobs_of(params, placed, experiment))

wants = {}
for form, axes, parts, arm in ARMS:
    wants[form] = wants.get(form) or run(form=form)
    (want, logs), (got, mine) = wants[form], run(axes, parts, arm, form)
    assert want[1]["clipped_low"] > 0.05 and want[1]["clipped_high"] > 0.05, want[1]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-12 if np.ndim(b) else 1e-2)
        assert error <= 1e-5, (axes, parts, arm, jax.tree_util.keystr(path), error)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got[2]["vision"]))
    shares = axes[3] if len(axes) > 3 else 1
    own = dep.striped(batch.replace(old_logprobs_BL=logs), shares)
    assert np.abs(np.where(own.loss_weights_BL > 0, mine - own.old_logprobs_BL, 0)).max() <= 1e-5, axes
print("equal")
"""
QUICK = [("k25", (2, 2, 2), 2, "dep")]
MORE = [
    ("k25", (1, 2, 1), 1, "dep"),
    ("k25", (1, 8, 1), 1, "dep"),
    ("k25", (1, 2, 4), 2, "dep"),
    ("k25", (2, 4, 1), 1, "stage0"),
    ("k25", (2, 2, 1, 2), 2, "dep"),
    ("k25", (1, 4, 2), 2, "plain"),
    ("grpo", (1, 2, 1, 4), 2, "dep"),
]


@pytest.mark.parametrize("arms", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["all at once", "one by one"])
def test_gradients_metrics_and_log_probabilities_equal_those_of_one_device(arms):
    assert runs.on_eight_devices(f"ARMS = {arms}\n{EQUAL}") == "equal\n"
