"""Tasks that a few lines of Python solve from the pixels (K2.5 §3.4): what zero-vision SFT teaches without showing a picture.

`program` gives the cells of such a solution. They find `np`, `Image` (Pillow's) and `ndimage` (SciPy's) imported, and the
pictures as `images`, uint8 arrays [h, w, 3]. What the last cell shows is the answer, or holds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import pick

PREAMBLE = "import numpy as np\nfrom PIL import Image\nfrom scipy import ndimage"
DARK = "m=images[0].mean(2)<128"  # the ink of a picture on light paper
GLYPHS = {  # five rows of three pixels for each digit
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001010010010",
    "8": "111101111101111",
    "9": "111101111001111",
}


@dataclass(frozen=True)
class Programmed(Endless):
    """A task with `program`. `size` is the side of its pictures in pixels."""

    category: ClassVar[str] = "tool_use"

    size: int = 56

    def __post_init__(self):
        super().__post_init__()
        self.check_range("size", 40, 448)

    def program(self, index: int) -> tuple[str, ...]:
        """Cells of Python, in order: the last one ends with an expression or print that shows the answer."""
        raise NotImplementedError


def paper(generator: np.random.Generator, height: int, width: int, light: bool = True) -> np.ndarray:
    """Noisy paper, uint8 [h, w, 3]: every pixel on the same side of 128."""
    base = generator.integers(185, 226, 3) if light else generator.integers(30, 71, 3)
    return (base + generator.integers(-25, 26, (height, width, 3))).astype(np.uint8)


def ink(generator: np.random.Generator, light: bool = False) -> np.ndarray:
    """A colour far from the paper: every channel on the other side of 128."""
    return generator.integers(170, 246, 3) if light else generator.integers(10, 86, 3)


def disc(height: int, width: int, x: int, y: int, radius: int) -> np.ndarray:
    """bool [h, w]: pixels of a disc around (column x, row y)."""
    rows, columns = np.ogrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def apart(
    generator: np.random.Generator, number: int, side: int, radii: Sequence[int]
) -> tuple[tuple[int, int, int], ...]:
    """Up to `number` discs (column, row, radius) inside a square that do not touch; at least one."""
    places: list[tuple[int, int, int]] = []
    for _ in range(60):
        radius = pick(generator, radii)
        x, y = generator.integers(radius + 1, side - radius - 1, 2).tolist()
        if all((x - a) ** 2 + (y - b) ** 2 > (radius + r + 2) ** 2 for a, b, r in places):
            places.append((x, y, radius))
        if len(places) == number:
            break
    return tuple(places)


def glyph(digit: str) -> np.ndarray:
    """bool [5, 3]."""
    return np.array([bit == "1" for bit in GLYPHS[digit]]).reshape(5, 3)
