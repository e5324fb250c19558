"""Say where things are: boxes around shapes, and points in their middles, in thousandths of the image."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless, TaskError
from k25_jax.data.tasks.drawing import COLOURS, PAPERS, SHAPES, Canvas, coarse, outline, pick, pick_some, spread
from k25_jax.scoring import scores


@dataclass(frozen=True)
class Scene:
    """Shapes with colours at places (x, y, radius, angle: shares of the side); `targets` are those asked for."""

    wanted: str
    targets: tuple[int, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[tuple[float, float, float, float], ...]
    paper: tuple[int, int, int]


@dataclass(frozen=True)
class Grounding(Endless):
    """Up to `objects` shapes, of which up to `most` are asked for, by their colour or their shape.

    Held out: which shapes of which colours are where, to a 16th of the side.
    """

    category: ClassVar[str] = "grounding"
    longest: ClassVar[int] = 96

    objects: int = 3
    most: int = 2
    size: int = 84

    def __post_init__(self):
        super().__post_init__()
        self.check_range("objects", 1, 6)
        self.check_range("most", 1, 3)
        self.check_range("size", 28, 448)
        if self.most > self.objects:
            raise TaskError(f"{self.name}: most={self.most} must be at most objects={self.objects}")

    def question(self, index: int) -> str:
        return f"{self.name}: {self.scene(index).wanted}"

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        canvas = Canvas(self.size, self.size, scene.paper)
        for shape, colour, place in zip(scene.shapes, scene.colours, scene.places, strict=True):
            x, y, radius, angle = place
            canvas.shape(shape, COLOURS[colour], (x * self.size, y * self.size, radius * self.size, angle))
        return canvas.pixels()

    def key(self, scene: Scene) -> str:
        return f"{scene.shapes} {scene.colours} {coarse(scene.places)}"

    def compose(self, generator: np.random.Generator) -> Scene:
        """The targets share a colour, or a shape, that no other has."""
        number = int(generator.integers(1, self.objects + 1))
        wanted = int(generator.integers(1, min(self.most, number) + 1))
        by_colour = bool(generator.random() < 0.5)
        names, others = (tuple(COLOURS), SHAPES) if by_colour else (SHAPES, tuple(COLOURS))
        target, *rest = pick_some(generator, names, len(names))
        named = [target] * wanted + [pick(generator, rest) for _ in range(number - wanted)]
        other = [pick(generator, others) for _ in range(number)]
        shapes, colours = (other, named) if by_colour else (named, other)
        radii = (0.12, 0.2) if number <= 4 else (0.1, 0.15)
        places = spread(generator, number, radii)
        targets = sorted(range(wanted), key=lambda i: places[i][:2])  # from left to right
        return Scene(target, tuple(targets), tuple(shapes), tuple(colours), places, pick(generator, PAPERS))


@dataclass(frozen=True)
class Boxes(Grounding):
    """Draw boxes around shapes: `<box>left,top,right,bottom</box>` for each. The score is F1 with soft IoU matches."""

    def gold(self, index: int) -> list[scores.Box]:
        """The boxes of the shapes asked for, from left to right."""
        scene = self.scene(index)
        return [box_of(scene.shapes[target], scene.places[target]) for target in scene.targets]

    def answer(self, index: int) -> str:
        return scores.write_boxes(self.gold(index))

    def score(self, prediction: str, index: int) -> float:
        return scores.boxes(prediction, self.gold(index))


@dataclass(frozen=True)
class Points(Grounding):
    """Point at shapes: `<point>x,y</point>` for each. The score is F1 with Gaussian matches by distance."""

    objects: int = 4
    most: int = 3

    def gold(self, index: int) -> list[scores.Point]:
        """The middles of the shapes asked for, from left to right."""
        scene = self.scene(index)
        return [tuple(round(part * scores.SCALE) for part in scene.places[target][:2]) for target in scene.targets]

    def answer(self, index: int) -> str:
        return scores.write_points(self.gold(index))

    def score(self, prediction: str, index: int) -> float:
        return scores.points(prediction, self.gold(index))


def box_of(shape: str, place: tuple[float, float, float, float]) -> scores.Box:
    """The smallest box around a shape, in thousandths."""
    x, y, radius, angle = place
    corners = outline(shape, angle) * radius + np.array([x, y])
    return tuple(np.rint(np.concatenate([corners.min(0), corners.max(0)]) * scores.SCALE).astype(int).tolist())
