"""The torus that a mesh lies on: where TPU chips stand, which sides close to rings, hops between neighbours (K2.5 §3.8).

Chips are joined along the sides of their slice. Of v4, v5p and TPU7x, which have three, optical switches close every side to
a ring where the slice is made of whole cubes of 4x4x4; of v5e and v6e, which have two, only a side of 16 is closed
(jax-ml.github.io/scaling-book/tpus). The cores of a chip count as one place.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Torus:
    """Chips along each side of a slice, and whether the last is joined to the first."""

    sides: tuple[int, ...]
    rings: tuple[bool, ...]

    def steps(self, start, end) -> np.ndarray:
        """Links along each side from one place to another, [..., sides]; negative where the short way is downward."""
        sides, step = np.asarray(self.sides), np.asarray(end) - np.asarray(start)
        around = step - sides * np.sign(step)
        return np.where(np.asarray(self.rings) & (abs(around) < abs(step)), around, step)


def torus_of(devices: np.ndarray) -> Torus | None:
    """That of one slice, from an array of all its devices; None where they are no TPU chips, or not a whole block."""
    first = devices.flat[0]
    if first.platform != "tpu":
        return None
    stand = places(devices).reshape(devices.size, -1)
    sides = stand.max(axis=0) - stand.min(axis=0) + 1
    if len(np.unique(stand, axis=0)) != sides.prod():
        return None
    flat = "lite" in first.device_kind  # as JAX calls v5e and v6e
    cubes = not flat and not (sides % 4).any()
    return Torus(tuple(sides.tolist()), tuple(cubes or bool(flat and side == 16) for side in sides))


def places(devices: np.ndarray) -> np.ndarray:
    """Where the chip of each device stands, [..., sides]."""
    return np.asarray([device.coords for device in devices.flat]).reshape(*devices.shape, -1)


def hops(devices: np.ndarray) -> list[float]:
    """Mean links from a device to the next along each axis of the array, the first following the last.

    Of several slices, by `slice_index`, the pairs of two slices are left out. Empty where there is no torus.
    """
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0), otypes=[int])(devices)
    torus = torus_of(devices[slices == slices.flat[0]])
    if torus is None:
        return []
    stand, out = places(devices), []
    for axis in range(devices.ndim):
        inside = slices == np.roll(slices, -1, axis)
        links = abs(torus.steps(stand, np.roll(stand, -1, axis))).sum(axis=-1)
        out.append(float(links[inside].mean()) if inside.any() else 0.0)
    return out
