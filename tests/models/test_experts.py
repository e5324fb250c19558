"""Expert parallelism in chunks; a run that moves to another mesh. Its gradients: tests/parallel/test_parallel_pipeline.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import runs
from k25_jax.config import ConfigError, MoEConfig
from k25_jax.models.dispatch import in_rounds
from k25_jax.models.experts import _chunks, _local, routed
from k25_jax.sharding.mesh import AXES


@pytest.mark.parametrize("favourite", [False, True])
def test_chunks_equal_one_piece_however_many_there_are(favourite):
    """Three of five experts are a device's own; with a favourite all tokens go there, and five chunks are needed."""
    keys = jax.random.split(jax.random.key(0), 6)
    p = {name: jax.random.normal(key, (3, 6, 6)) for name, key in zip(("gate", "up", "down"), keys, strict=False)}
    x_TD, weights_TK = jax.random.normal(keys[3], (20, 6)), jax.random.uniform(keys[4], (20, 2))
    number_TK = jnp.argsort(jax.random.uniform(keys[5], (20, 5)), axis=1)[:, :2]
    if favourite:
        number_TK = jnp.stack([jnp.full(20, 1), jnp.arange(20) % 2 * 2], axis=1)
    number_TK = jnp.minimum(number_TK, 3)
    load_E = jnp.bincount(number_TK.reshape(-1), length=3)

    def run(layer):
        loss = lambda *a: jnp.sin(layer(*a, number_TK, load_E)).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(p, x_TD, weights_TK)

    want = run(lambda *a: _local(*a, "blocked"))
    chunks = functools.partial(_chunks, 8, "blocked")
    got = run(lambda p, x, weights, *choice: in_rounds(chunks, p, x, weights, choice))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


MOVING = """
import dataclasses, json, pathlib
import numpy as np
from k25_jax.config import ConfigError, MeshConfig, load_experiment
from k25_jax.train.loop import train

folder = pathlib.Path({folder!r})
changes = ["model.text.layers=5", "data.batch_size=8", "data.packs=8", "optim.decay_steps=0"]
base = load_experiment({experiment!r}, changes + ["train.checkpoint_every=2"])

def run(name, mesh, steps):
    losses = []
    experiment = dataclasses.replace(base, mesh=MeshConfig(*mesh), train=dataclasses.replace(base.train, steps=steps))
    train(experiment, folder / name, lambda step, metrics: losses.append(metrics["loss"]))
    return losses

whole = run("whole", (1, 8, 1), 4)
moved = run("moved", (2, 2, 2, 1, 2), 2)  # a pipeline with two repeats
assert json.loads((folder / "moved" / "run.json").read_text())["pipeline_bubble"] == 1 / 5
moved += run("moved", (1, 2, 4), 4)
assert len(whole) == 4 and whole[3] < whole[0]
np.testing.assert_allclose(moved, whole, rtol=1e-5)
bad = ((1, 3, 1), 8, "there are 8; set mesh.pipe"), ((1, 1, 8), 8, "moe.experts=4 must be a multiple of 8 (mesh.expert)")
bad += (((1, 8, 1), 4, "data.packs=4 must be a multiple of 8 (the devices"),)
for mesh, packs, words in bad:
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, packs=packs))
    try:
        run("bad", mesh, 1)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise AssertionError("no error")
print("equal")
"""


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path):
    experiment = str(runs.write_experiment(tmp_path))
    assert runs.on_eight_devices(MOVING.format(folder=str(tmp_path), experiment=experiment)).endswith("equal\n")


@pytest.mark.parametrize(
    "rows, tokens, experts, width, words",
    [
        (7, 6, 4, 16, r"rows of a step .*: 7 must be a multiple of mesh.fsdp=4 x mesh.expert=2, 8"),
        (8, 5, 4, 16, r"tokens of a row \(data.seq_len\): 5 must be a multiple of mesh.context=2, 2"),
        (8, 6, 3, 16, r"moe.experts: 3 must be a multiple of mesh.expert=2, 2"),
        (8, 6, 4, 12, r"text.d_model: 12 must be a multiple of mesh.fsdp=4 x mesh.context=2, 8"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_refused_with_its_numbers(rows, tokens, experts, width, words):
    """Once such a layer was laid out as for one device, without a word."""
    config = MoEConfig(experts=experts, top_k=1, ffn_dim=4)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    p = {name: shape(experts, 4, width) for name in ("gate", "up", "down")}
    chosen = shape(rows, tokens, 1), shape(rows, tokens, 1, dtype=jnp.int32)
    mesh = AbstractMesh((1, 4, 2, 2), AXES)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ConfigError, match=words):
        jax.eval_shape(
            lambda p, x, w, e: routed(p, x, w, e, jnp.zeros(experts), config), p, shape(rows, tokens, width), *chosen
        )
