"""The order of TPU chips in a mesh and the hops between them, on devices that only say where they stand."""

import numpy as np
import pytest

from chips import V5E, V5P, V7X, chips
from k25_jax.sharding.mesh import AXES, make_mesh, plain_order
from k25_jax.sharding.processes import owners_of, readers
from k25_jax.sharding.torus import Torus, hops, torus_of

# sizes of the axes, chips -> hops along each, and what is best of them
MESHES = {
    "v5p-1024": ((4, 8, 1, 16), (V5P, (8, 8, 8)), (2.0, 1.0, 0.0, 1.5), (2.0, 2.25, 0.0, 1.5)),
    "v5p-512": ((4, 4, 1, 16), (V5P, (4, 8, 8)), (2.0, 2.0, 0.0, 1.125), (2.0, 4.5, 0.0, 1.625)),
    "v5p-128": ((1, 64, 1, 1), (V5P, (4, 4, 4)), (0.0, 1.3125, 0.0, 0.0), (0.0, 1.5625, 0.0, 0.0)),
    "two slices": ((4, 16, 1, 16), (V5P, (8, 8, 8), 2), (4.0, 1.25, 0.0, 1.5), (4.0, 2.375, 0.0, 1.5)),
    "v5e-256": ((1, 16, 1, 16), (V5E, (16, 16, 1)), (0.0, 1.0, 0.0, 1.0), (0.0, 9.0, 0.0, 1.875)),
    "v5e-8": ((1, 2, 1, 4), (V5E, (2, 4, 1)), (0.0, 2.0, 0.0, 1.5), (0.0, 2.0, 0.0, 1.5)),
    "two cores": ((1, 16, 1, 8), (V7X, (4, 4, 4), 1, 2), (0.0, 1.25, 0.0, 0.5), (0.0, 3.25, 0.0, 0.75)),
}


@pytest.mark.parametrize("name", MESHES)
def test_neighbours_of_a_mesh_stand_near_each_other(name):
    sizes, slice_of, want, before = MESHES[name]
    devices = chips(*slice_of)
    mesh = make_mesh(*sizes[:2], expert=sizes[3], context=sizes[2], devices=devices)
    assert set(mesh.devices.flat) == set(devices) and mesh.devices.shape == sizes
    assert tuple(hops(mesh.devices)) == pytest.approx(want)
    assert tuple(hops(plain_order(mesh, devices))) == pytest.approx(before)


def test_a_process_keeps_whole_blocks_of_rows_in_every_mesh():
    """Where context shares out a row over processes too: they read the same rows, and each row is read."""
    for sizes in ((4, 8, 1, 16), (4, 4, 2, 16), (4, 2, 4, 16), (4, 1, 8, 16), (1, 1, 8, 64), (1, 32, 16, 1)):
        mesh = make_mesh(*sizes[:2], expert=sizes[3], context=sizes[2], devices=chips(V5P, (8, 8, 8)))
        everyone = readers(owners_of(mesh))
        rows = sorted(row for reader in everyone for row in reader.rows)
        assert rows == list(range(512 // sizes[2])) and len(everyone) * len(everyone[0].processes) == 128


def test_sides_that_close():
    ring = lambda kind, sides: torus_of(np.asarray(chips(kind, sides))).rings  # noqa: E731
    assert ring(V5P, (4, 4, 8)) == (True, True, True) and ring(V5P, (2, 4, 4)) == (False, False, False)
    assert ring(V5E, (8, 16, 1)) == (False, True, False) and ring(V5E, (8, 8, 1)) == (False, False, False)
    assert torus_of(np.asarray(chips(V5P, (4, 4, 4))[:-1])) is None


def test_the_short_way():
    torus = Torus((8, 4, 2), (True, False, False))
    assert torus.steps([0, 0, 0], [7, 3, 1]).tolist() == [-1, 3, 1]
    assert torus.steps([7, 3, 1], [0, 0, 0]).tolist() == [1, -3, -1]
    assert torus.steps([0, 0, 0], [4, 0, 0]).tolist() == [4, 0, 0]


def test_what_is_no_whole_slice_keeps_its_order():
    devices = chips(V5P, (4, 4, 4))[:6]
    mesh = make_mesh(fsdp=6, devices=devices)
    assert mesh.devices.ravel().tolist() == devices and hops(mesh.devices) == []
    assert tuple(mesh.shape) == AXES
