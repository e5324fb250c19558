"""The device mesh (pipe, fsdp, context, expert)."""

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("pipe", "fsdp", "context", "expert")


def make_mesh(pipe: int = 1, fsdp: int = -1, expert: int = 1, context: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); fsdp=-1 takes what the other axes leave."""
    devices = list(jax.devices() if devices is None else devices)
    if fsdp == -1:
        fsdp = len(devices) // (pipe * expert * context)
    if pipe * fsdp * context * expert != len(devices):
        raise ValueError(
            f"mesh pipe={pipe} x fsdp={fsdp} x context={context} x expert={expert} needs "
            f"{pipe * fsdp * context * expert} devices, there are {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(pipe, fsdp, context, expert), AXES)


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
