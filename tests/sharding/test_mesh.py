"""The order of devices in a mesh over several slices, on devices that only say which slice they are of."""

import collections

import jax
import numpy as np
import pytest

from k25_jax.config import ConfigError, MeshConfig, load_experiment
from k25_jax.sharding.mesh import AXES, make_mesh, slice_shape
from k25_jax.train.layout import mesh_of


class Device:
    """Number `id` of slice `slice_index`."""

    platform, process_index, client = "fake", 0, None

    def __init__(self, id, slice_index):
        self.id, self.slice_index = id, slice_index


def mixed(slices, each):
    """Devices of all slices in an order that no slice is contiguous in."""
    return [Device(100 * s + i, s) for i in range(each) for s in reversed(range(slices))]


def crossing(devices_PFCE):
    """The axes along which the slice changes."""
    index = np.vectorize(lambda device: device.slice_index)(devices_PFCE)
    return {name for axis, name in enumerate(AXES) if (np.diff(index, axis=axis) != 0).any()}


@pytest.mark.parametrize(
    ("slices", "sizes", "want"),
    [
        (2, dict(pipe=2, fsdp=2, expert=2), "pipe"),
        (2, dict(pipe=4, fsdp=1, expert=2), "pipe"),
        (2, dict(pipe=1, fsdp=4, expert=2), "fsdp"),
        (2, dict(pipe=3, fsdp=4, expert=2), "fsdp"),
        (4, dict(pipe=2, fsdp=4, expert=2, context=2), "fsdp"),
    ],
)
def test_one_axis_crosses_slices_and_each_slice_keeps_its_order(slices, sizes, want):
    count = int(np.prod(list(sizes.values())))
    devices_PFCE = make_mesh(**sizes, devices=mixed(slices, count // slices)).devices
    assert crossing(devices_PFCE) == {want}
    order = collections.defaultdict(list)
    for device in devices_PFCE.flat:
        order[device.slice_index].append(device.id)
    assert all(ids == sorted(ids) for ids in order.values()) and len(order) == slices
    outermost = np.moveaxis(devices_PFCE, AXES.index(want), 0).reshape(slices, -1)
    assert all(len({device.slice_index for device in part}) == 1 for part in outermost)


def test_one_slice_keeps_the_devices_as_they_come():
    devices = [Device(i, 0) for i in (3, 1, 2, 0)]
    assert [device.id for device in make_mesh(fsdp=2, expert=2, devices=devices).devices.flat] == [3, 1, 2, 0]
    assert make_mesh(devices=jax.devices()).devices.ravel().tolist() == jax.devices()


def test_a_mesh_that_does_not_divide_over_slices_names_the_remedy():
    experiment = load_experiment("experiments/pretrain/demo.py")
    experiment = experiment.__class__(**{**vars(experiment), "mesh": MeshConfig(pipe=1, fsdp=3, expert=2)})
    with pytest.raises(ConfigError, match="pipe=1 x fsdp=3 over 2 slices.*multiple of 2.*set mesh.pipe, mesh.fsdp"):
        mesh_of(experiment, mixed(2, 3))
    with pytest.raises(ValueError, match="unequal size.*0: 4, 1: 2"):
        make_mesh(fsdp=6, devices=[Device(i, i // 4) for i in range(6)])


def test_the_share_of_one_slice():
    shape = {"pipe": 1, "fsdp": 8, "context": 2, "expert": 4}
    assert slice_shape(shape, 2) == shape | {"fsdp": 4}
    assert slice_shape(shape | {"pipe": 4}, 2) == shape | {"pipe": 2}
    assert slice_shape(shape, 1) == shape
