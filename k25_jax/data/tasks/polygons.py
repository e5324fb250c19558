"""Outline a region: say the corners of a polygon, in thousandths of the image."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import COLOURS, PAPERS, Canvas, pick, pick_some
from k25_jax.scoring import scores

STEP = 20  # corners lie on a lattice of so many thousandths


@dataclass(frozen=True)
class Scene:
    """Regions of different colours, the first one asked for, with corners [n, 2] in thousandths, clockwise."""

    colours: tuple[str, ...]
    regions: tuple[tuple[scores.Point, ...], ...]
    paper: tuple[int, int, int]


@dataclass(frozen=True)
class Polygons(Endless):
    """A region of 3 to `corners` corners, alone or beside another of another colour.

    `<polygon>x,y x,y x,y</polygon>`, clockwise from the corner nearest to the top left. The score is the IoU of the
    areas. Held out: the colours, and the corners to a 16th of the side.
    """

    category: ClassVar[str] = "polygons"
    longest: ClassVar[int] = 96

    corners: int = 5
    size: int = 84

    def __post_init__(self):
        super().__post_init__()
        self.check_range("corners", 3, 7)
        self.check_range("size", 28, 448)

    def question(self, index: int) -> str:
        return f"outline: {self.scene(index).colours[0]}"

    def answer(self, index: int) -> str:
        return scores.write_polygon(self.scene(index).regions[0])

    def score(self, prediction: str, index: int) -> float:
        return scores.polygon(prediction, self.scene(index).regions[0])

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        canvas = Canvas(self.size, self.size, scene.paper)
        for colour, region in zip(scene.colours, scene.regions, strict=True):
            canvas.polygon(np.array(region) * (self.size / scores.SCALE), COLOURS[colour])
        return canvas.pixels()

    def key(self, scene: Scene) -> str:
        cells = " ".join(f"{16 * x // scores.SCALE},{16 * y // scores.SCALE}" for x, y in scene.regions[0])
        return f"{scene.colours} {cells}"

    def compose(self, generator: np.random.Generator) -> Scene:
        """Corners at random distances from a middle, at angles that keep away from each other: no side crosses."""
        two = bool(generator.random() < 0.5)
        if two:  # one in each half, left and right or above and below
            middles = [(270, 500), (730, 500)] if generator.random() < 0.5 else [(500, 270), (500, 730)]
            middles = [middles[i] for i in generator.permutation(2)]
            reach = 240
        else:
            middles, reach = [tuple(generator.integers(400, 601, 2).tolist())], 390
        colours = pick_some(generator, tuple(COLOURS), len(middles))
        regions = tuple(self._region(generator, middle, reach) for middle in middles)
        return Scene(tuple(colours), regions, pick(generator, PAPERS))

    def _region(self, generator: np.random.Generator, middle: tuple[int, int], reach: int) -> tuple[scores.Point, ...]:
        number = int(generator.integers(3, self.corners + 1))
        turns = (np.arange(number) + generator.uniform(-0.25, 0.25, number) + generator.uniform()) / number
        radii = generator.uniform(0.6, 1.0, number) * reach
        x, y = middle[0] + radii * np.cos(2 * math.pi * turns), middle[1] + radii * np.sin(2 * math.pi * turns)
        corners = [
            (STEP * round(a / STEP), STEP * round(b / STEP)) for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
        first = min(range(number), key=lambda i: sum(corners[i]))
        return tuple(corners[first:] + corners[:first])
