"""Name a drawn shape or its colour, or count shapes: drawn as they are asked for, without end."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import COLOURS, FINE, PAPERS, SHAPES, coarse, outline, spread
from k25_jax.scoring import scores

QUESTIONS = {"shape": "shape?", "colour": "colour?", "count": "how many?"}
MOST = 5  # shapes in a picture to count


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or more shapes of one kind and colour."""

    question: str
    shape: str
    colour: str
    paper: tuple[int, int, int]
    places: tuple[tuple[float, float, float, float], ...]  # x, y, radius (shares of the side), angle in radians


@dataclass(frozen=True)
class Shapes(Endless):
    """`ask` is shape, colour, count, or any of them. `size` is the side of the image in pixels.

    A count scores 1 - |prediction - gold| / gold, at least 0 (K2.5 §3.5). Held out: where which shape of which colour
    is, to a 16th of the side.
    """

    category: ClassVar[str] = "vision_reasoning"

    ask: str = "any"
    size: int = 56

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*QUESTIONS, "any"))
        self.check_range("size", 14, 448)

    def question(self, index: int) -> str:
        return QUESTIONS[self.scene(index).question]

    def image(self, index: int) -> np.ndarray:
        return draw(self.scene(index), self.size)

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        return {"shape": scene.shape, "colour": scene.colour, "count": str(len(scene.places))}[scene.question]

    def score(self, prediction: str, index: int) -> float:
        scene = self.scene(index)
        if scene.question == "count":
            return scores.count(prediction, len(scene.places))
        return scores.exact(prediction, self.answer(index))

    def key(self, scene: Scene) -> str:
        return f"{scene.shape} {scene.colour} {coarse(scene.places)}"

    def compose(self, generator: np.random.Generator) -> Scene:
        question = str(generator.choice(list(QUESTIONS))) if self.ask == "any" else self.ask
        shape, colour = str(generator.choice(SHAPES)), str(generator.choice(list(COLOURS)))
        paper = PAPERS[generator.integers(len(PAPERS))]
        if question == "count":
            places = spread(generator, int(generator.integers(1, MOST + 1)), radii=(0.1, 0.17))
        else:
            places = spread(generator, 1, radii=(0.25, 0.42))
        return Scene(question, shape, colour, paper, places)


def draw(scene: Scene, size: int) -> np.ndarray:
    """uint8 RGB [size, size, 3]."""
    side = size * FINE
    image = Image.new("RGB", (side, side), scene.paper)
    pen = ImageDraw.Draw(image)
    for x, y, radius, angle in scene.places:
        points = outline(scene.shape, angle) * (radius * side) + np.array([x, y]) * side
        pen.polygon([tuple(point) for point in points.tolist()], COLOURS[scene.colour])
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
