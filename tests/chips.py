"""TPU chips that only say where they stand, for meshes without a TPU compiler."""

import itertools
import types

V5P, V5E, V6E, V7X = "TPU v5", "TPU v5 lite", "TPU v6 lite", "TPU7x"  # as JAX calls them


class Chip:
    """A core of the TPU chip at `coords` of slice `slice_index`."""

    platform, client = "tpu", None

    def __init__(self, kind, coords, process_index, slice_index=0, core_on_chip=0):
        self.device_kind, self.coords, self.slice_index = kind, coords, slice_index
        self.process_index, self.core_on_chip = process_index, core_on_chip

    def addressable_memories(self):
        """As those of a TPU."""
        return [types.SimpleNamespace(kind=kind) for kind in ("device", "pinned_host", "unpinned_host")]


def chips(kind, sides, slices=1, cores=1):
    """All of some slices, process by process, as `jax.devices()` has them; a process has 2 x 2 of them."""
    boxes, out = [range(0, side, 2) for side in reversed(sides[:2])], []
    wide, deep = (min(side, 2) for side in sides[:2])
    for index in range(slices):
        for z, y, x in itertools.product(range(sides[2]), *boxes):
            for dy, dx, core in itertools.product(range(deep), range(wide), range(cores)):
                out.append(Chip(kind, [x + dx, y + dy, z], len(out) // (wide * deep * cores), index, core))
    return out


def chips_of(topology):
    """The devices of a topology (preflight/topology.py)."""
    kind = {"v5p": V5P, "v5e": V5E, "v6e": V6E, "tpu7x": V7X}[topology.chip.name]
    return chips(kind, (*topology.shape, 1)[:3], topology.slices, topology.chip.devices)
