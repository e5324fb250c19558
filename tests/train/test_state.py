"""The training state as shapes, and with the optimizer's means in the hosts' memory."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from k25_jax.config import ConfigError, load_experiment
from k25_jax.models.k25 import abstract_params
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.layout import check_mesh
from k25_jax.train.state import abstract_state


def test_the_abstract_state_is_that_of_a_checkpoint(finished):
    """Shapes and types of parameters, two moments each, a step and a key."""
    experiment = load_experiment(str(finished.file))
    state = abstract_state(experiment)
    params = abstract_params(experiment.model)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state.params) == shapes
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert len(moments) == 2 * len([a for a in jax.tree.leaves(params) if a.ndim])
    assert state.step.dtype == jnp.int32 and state.key.dtype == jnp.uint32


OFFLOADED = """
import pathlib, shutil
import jax, numpy as np
from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.train.layout import mesh_of
from k25_jax.train.loop import train
from k25_jax.train.state import abstract_state

folder = pathlib.Path({folder!r})
changes = ["data.batch_size=8", "data.packs=8", "optim.name=muonclip", "mesh.expert=4", "train.steps=4"]
changes += ["train.checkpoint_every=2"]
device, host = (load_experiment({experiment!r}, changes + [f"optim.offload={{offload}}"]) for offload in (False, True))

def run(name, experiment):
    losses = []
    train(experiment, folder / name, lambda step, metrics: losses.append(metrics["loss"]))
    return losses

def restored(name, experiment):
    store = Store(folder / name / "checkpoints")
    return store.restore(abstract_state(experiment, mesh_of(experiment)))[0]

whole = run("device", device)
shutil.copytree(folder / "device" / "checkpoints" / "2", folder / "host" / "checkpoints" / "2")
np.testing.assert_allclose(run("host", host), whole[2:], rtol=1e-6)
want, got, back = restored("device", device), restored("host", host), restored("host", device)
for a, b, c in zip(jax.tree.leaves(want), jax.tree.leaves(got), jax.tree.leaves(back), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(b, c)
kinds = lambda tree: {{a.sharding.memory_kind for a in jax.tree.leaves(tree) if a.ndim}}
assert kinds((want, back, got.params)) == {{"device"}} and kinds(got.opt_state) == {{"pinned_host"}}
print("equal")
"""


@pytest.mark.slow
def test_means_in_the_hosts_memory_train_alike_and_are_checkpointed(tmp_path):
    """A run that began without goes on with them there; its checkpoint can be read into either memory."""
    experiment = str(runs.write_experiment(tmp_path))
    assert runs.on_eight_devices(OFFLOADED.format(folder=str(tmp_path), experiment=experiment)).endswith("equal\n")


def test_devices_that_do_not_reach_the_hosts_memory_are_refused(finished):
    class Device:
        process_index = 0

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="device"), types.SimpleNamespace(kind="unpinned_host")]

    experiment = load_experiment(str(finished.file), ["optim.offload=True"])
    one = make_mesh(devices=jax.devices()[:1])
    mesh = types.SimpleNamespace(shape=one.shape, devices=np.full(one.devices.shape, Device()), size=1)
    with pytest.raises(
        ConfigError, match="optim.offload=True.*pinned_host.*device, unpinned_host; set optim.offload=F"
    ):
        check_mesh(experiment, mesh)
    check_mesh(dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, offload=False)), mesh)


ORDERED = """
import contextlib, dataclasses
import jax, numpy as np
from k25_jax.checkpoint.store import Store
from k25_jax.config import DataConfig, Experiment, MeshConfig, OptimConfig, preset
from k25_jax.parallel.pipeline import layers_of
from k25_jax.train.layout import mesh_of
from k25_jax.train.state import abstract_state, in_layers, in_stages, init_state

tiny = preset("tiny")
model = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, layers=13))
data = DataConfig(batch_size=8, packs=8)
experiment = Experiment(model=model, data=data, optim=OptimConfig(name="muonclip"), mesh=MeshConfig(2, 2, 2, repeats=3))
plain = jax.device_get(init_state(dataclasses.replace(experiment, mesh=MeshConfig())))
mesh, order = mesh_of(experiment), layers_of(12, 2, 3)
assert order.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
state = init_state(experiment, mesh)
for a, b in zip(jax.tree.leaves(plain.params["moe"]), jax.tree.leaves(state.params["moe"]), strict=True):
    np.testing.assert_array_equal(a[order], b)
held = jax.device_get(state)
with contextlib.closing(Store({folder!r})) as store:
    store.save(1, in_layers(state, experiment, mesh), dict())
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(jax.device_get(state)), strict=True):
        np.testing.assert_array_equal(a, b)  # saving leaves the run its own
    files = jax.device_get(store.restore(abstract_state(dataclasses.replace(experiment, mesh=MeshConfig())))[0])
    back = in_stages(store.restore(abstract_state(experiment, mesh))[0], experiment, mesh)
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(files), strict=True):
    np.testing.assert_array_equal(a, b)
for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(jax.device_get(back)), strict=True):
    np.testing.assert_array_equal(a, b)
assert [a.sharding for a in jax.tree.leaves(back)] == [a.sharding for a in jax.tree.leaves(state)]
print("equal")
"""


def test_a_pipelines_state_lies_in_the_order_of_its_stages_and_its_files_in_that_of_the_layers(tmp_path):
    """Two stages with three blocks of two layers each: what a file holds, one device reads, and the other way round."""
    assert runs.on_eight_devices(ORDERED.format(folder=str(tmp_path / "checkpoints"))).endswith("equal\n")
