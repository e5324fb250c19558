"""TPU chips that only say where they stand, for meshes without a TPU compiler."""

import itertools

V5P, V5E, V7X = "TPU v5", "TPU v5 lite", "TPU7x"  # as JAX calls them


class Chip:
    """A core of the TPU chip at `coords` of slice `slice_index`."""

    platform, client = "tpu", None

    def __init__(self, kind, coords, process_index, slice_index=0, core_on_chip=0):
        self.device_kind, self.coords, self.slice_index = kind, coords, slice_index
        self.process_index, self.core_on_chip = process_index, core_on_chip


def chips(kind, sides, slices=1, cores=1):
    """All of some slices, process by process, as `jax.devices()` has them; a process has 2 x 2 of them."""
    boxes = [range(0, side, 2) for side in reversed(sides[:2])]
    out = []
    for index in range(slices):
        for z, y, x in itertools.product(range(sides[2]), *boxes):
            for dy, dx, core in itertools.product(range(2), range(2), range(cores)):
                out.append(Chip(kind, [x + dx, y + dy, z], len(out) // (4 * cores), index, core))
    return out
