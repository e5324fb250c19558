"""The eight ways in which a stored picture may be turned and mirrored when it is shown: for images and for videos."""

from collections.abc import Sequence

import numpy as np

# By number, as in EXIF: (a, b, c, d). A stored point (x, y) is shown at (a x + c y, b x + d y); y grows downwards.
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
_NUMBERS = {matrix: number for number, matrix in MATRICES.items()}
_SLANT = 0.1  # of the larger entries; what a matrix may be off by: about 6 degrees


def turn(rgb: np.ndarray, number: int) -> np.ndarray:
    """A stored picture [h, w, 3] as it is shown; a number that is none of the eight counts as upright."""
    a, b, c, d = MATRICES.get(number, MATRICES[1])
    if not a:
        rgb = rgb.swapaxes(0, 1)
    return np.ascontiguousarray(rgb[:: b + d, :: a + c])


def from_matrix(matrix: Sequence[float]) -> int | None:
    """The number of a display matrix (a, b, c, d), whatever it scales by; None when it slants, shears or shows nothing."""
    a, b, c, d = (float(value) for value in matrix)
    straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) < _SLANT * straight:
        b = c = 0.0
    elif max(abs(a), abs(d)) < _SLANT * across:
        a = d = 0.0
    else:
        return None
    return _NUMBERS[tuple(int(np.sign(value)) for value in (a, b, c, d))]
