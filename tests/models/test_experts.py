"""Expert parallelism on eight devices against one, in a process of its own: gradients, steps, and a run that moves."""

import runs

GRADIENTS = """
import contextlib, dataclasses
import jax, numpy as np
from k25_jax.config import DataConfig, Experiment, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.sharding.mesh import make_mesh
from k25_jax.sharding.rules import batch_shardings
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

model, rng = preset("tiny"), np.random.default_rng(0)
model = dataclasses.replace(model, text=dataclasses.replace(model.text, layers=2))
data = DataConfig(batch_size=8, seq_len=48, packs=2, pack_patches=64)
examples = []
for length in (48, 40, 48, 20, 20, 48, 30, 48, 33):
    clip = Clip(rng.integers(0, 256, (16, model.vision.patch_dim)).astype(np.uint8), (1, 4, 4))
    clips = [clip] if len(examples) % 2 else []
    tokens = [model.media_pad_id] * len(clips) + rng.integers(0, 256, length - 4 * len(clips)).tolist()
    examples.append(make_example(tokens, [1.0] * len(tokens), clips, model.media_pad_id))
batch = pack_examples(examples, data, model)

def run(axes):
    mesh = None if axes is None else make_mesh(*axes)
    optim = OptimConfig(name="muonclip", muon_dtype="float32", warmup_steps=1, peak_lr=1e-3)
    experiment = Experiment(model=model, data=data, optim=optim, train=TrainConfig(steps=3))
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        placed = batch if mesh is None else jax.device_put(batch, batch_shardings(batch, mesh))
        state = init_state(experiment, mesh)
        grads_of = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=2)
        grads, (_, stats) = grads_of(state.params, placed, experiment)
        step, losses = make_step(experiment, loss_fn, mesh), []
        for _ in range(3):
            state, metrics = step(state, placed)
            losses.append(metrics["loss"].item())
    if mesh is not None:
        gate = state.params["moe"]["moe"]["experts"]["gate"]
        split = mesh.shape["fsdp"] * mesh.shape["expert"]
        assert gate.addressable_shards[0].data.size * split == gate.size, gate.sharding
    return jax.tree.map(np.asarray, (grads, stats)), losses

(want, want_stats), want_losses = run(None)
for axes in ((1, 2, 4), (1, 4, 2)):
    (got, stats), losses = run(axes)
    np.testing.assert_array_equal(stats.load_YE, want_stats.load_YE)
    np.testing.assert_allclose(stats.max_logit_YH, want_stats.max_logit_YH, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        error = np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)
        assert error <= 1e-5, (axes, jax.tree_util.keystr(path), error)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, err_msg=str(axes))
print("equal")
"""


def test_gradients_and_steps_equal_those_of_one_device():
    assert runs.on_eight_devices(GRADIENTS) == "equal\n"


MOVING = """
import dataclasses, json, pathlib
import numpy as np
from k25_jax.config import ConfigError, MeshConfig, load_experiment
from k25_jax.train.loop import train

folder = pathlib.Path({folder!r})
overrides = ["model.text.layers=5", "data.batch_size=8", "optim.decay_steps=0", "train.checkpoint_every=2"]
base = load_experiment({experiment!r}, overrides)

def run(name, mesh, steps):
    losses = []
    experiment = dataclasses.replace(base, mesh=MeshConfig(*mesh), train=dataclasses.replace(base.train, steps=steps))
    train(experiment, folder / name, lambda step, metrics: losses.append(metrics["loss"]))
    return losses

whole = run("whole", (1, 8, 1), 4)
moved = run("moved", (2, 2, 2, 2), 2)  # a pipeline with two repeats
assert json.loads((folder / "moved" / "run.json").read_text())["pipeline_bubble"] == 1 / 5
moved += run("moved", (1, 2, 4), 4)
assert len(whole) == 4 and whole[3] < whole[0]
np.testing.assert_allclose(moved, whole, rtol=1e-5)
bad = ((1, 3, 1), "there are 8; set mesh.pipe"), ((1, 1, 8), "moe.experts=4 must be a multiple of mesh.expert=8")
for mesh, words in bad:
    try:
        run("bad", mesh, 1)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise AssertionError("no error")
print("equal")
"""


def test_a_run_goes_on_on_another_mesh(tmp_path):
    experiment = str(runs.write_experiment(tmp_path))
    assert runs.on_eight_devices(MOVING.format(folder=str(tmp_path), experiment=experiment)).endswith("equal\n")
