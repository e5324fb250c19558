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
