"""The device mesh (pipe, fsdp, context, expert), over one slice of a pod or several (K2.5 §3.8)."""

import collections

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from k25_jax.sharding import torus

AXES = ("pipe", "fsdp", "context", "expert")


def make_mesh(pipe: int = 1, fsdp: int = -1, expert: int = 1, context: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); fsdp=-1 takes what the other axes leave.

    ValueError where the axes do not multiply to the devices, or neither pipe nor fsdp divides over several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    others = pipe * expert * context
    if fsdp == -1 and len(devices) % others:
        raise ValueError(
            f"mesh pipe={pipe} x context={context} x expert={expert} needs a multiple of {others} devices, there are "
            f"{len(devices)}"
        )
    fsdp = len(devices) // others if fsdp == -1 else fsdp
    if fsdp * others != len(devices):
        raise ValueError(
            f"mesh pipe={pipe} x fsdp={fsdp} x context={context} x expert={expert} needs {fsdp * others} devices, there are "
            f"{len(devices)}"
        )
    return Mesh(_laid(devices, (pipe, fsdp, context, expert)), AXES)


def plain_order(mesh: Mesh, devices) -> np.ndarray:
    """`devices` in the shape of a mesh over them in the order in which they come, to compare with."""
    return _laid(list(devices), mesh.devices.shape, lambda part, sizes: np.asarray(part).reshape(sizes))


def slice_shape(shape: dict[str, int], slices: int) -> dict[str, int]:
    """What one of `slices` slices has of a mesh of `shape`: of pipe or else of fsdp its share, of other axes all.

    The network between slices is tens of times slower than the links inside one, so the axis that asks least of it
    crosses it: pipe passes on activations alone, fsdp gathers weights and adds up gradients, the others wait for one
    another in every layer. ValueError where neither divides.
    """
    for axis in ("pipe", "fsdp"):
        if shape[axis] % slices == 0:
            return shape | {axis: shape[axis] // slices}
    raise ValueError(
        f"mesh pipe={shape['pipe']} x fsdp={shape['fsdp']} over {slices} slices: one of the two must be a multiple of "
        f"{slices}, since no other axis may cross the network between slices"
    )


def _near(devices, sizes) -> np.ndarray:
    """The devices of one slice in the shape `sizes`, neighbours near each other; in the order given where nothing is known.

    The later an axis, the more its devices exchange. JAX knows some small slices only lying on their other side, where the
    order given is the better one.
    """
    plain = np.asarray(devices).reshape(sizes)
    if torus.torus_of(plain) is None:
        return plain
    near = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return min(near, plain, key=lambda laid: sum(torus.hops(laid)))


def _laid(devices, sizes, within=_near) -> np.ndarray:
    """The devices in the shape of the mesh, those of a slice `within` it. Slices, by `slice_index`, follow along one axis."""
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    counts = {index: len(members) for index, members in sorted(slices.items())}
    if len(set(counts.values())) > 1:
        raise ValueError(f"mesh over slices of unequal size: devices by slice are {counts}; use slices of one size")
    shape = dict(zip(AXES, sizes, strict=True))
    inner = slice_shape(shape, len(slices))
    parts = [within(slices[index], tuple(inner.values())) for index in counts]
    crossing = next((i for i, axis in enumerate(AXES) if inner[axis] != shape[axis]), 0)
    return np.concatenate(parts, axis=crossing)


def platform() -> str:
    """Where a program that is being traced will run, "tpu", "gpu" or "cpu": on the mesh in use, else where JAX would."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def on_own_device() -> bool:
    """Whether arrays being traced are those of one device: no mesh, one device, or inside a shard_map over all axes.

    Kernels in Pallas need that; the compiler cannot share them out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())
