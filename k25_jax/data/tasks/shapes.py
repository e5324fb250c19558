"""Name a drawn shape or its colour, or count shapes: drawn as they are asked for, without end."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from k25_jax.data.tasks import Task, TaskError, normalise

QUESTIONS = {"shape": "shape?", "colour": "colour?", "count": "how many?"}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS = {
    "red": (220, 50, 47),
    "orange": (255, 150, 30),
    "yellow": (250, 225, 70),
    "green": (60, 170, 70),
    "blue": (45, 95, 220),
    "purple": (150, 60, 180),
}
PAPERS = ((255, 255, 255), (236, 232, 222), (70, 74, 82), (16, 18, 22))
MOST = 5  # shapes in a picture to count
FINE = 4  # drawn this many times larger, then reduced: smooth edges


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or more shapes of one kind and colour."""

    question: str
    shape: str
    colour: str
    paper: tuple[int, int, int]
    places: tuple[tuple[float, float, float, float], ...]  # x, y, radius (shares of the side), angle in radians


@dataclass(frozen=True)
class Shapes(Task):
    """`ask` is shape, colour, count, or any of them. `size` is the side of the image in pixels.

    A count scores 1 - |prediction - gold| / gold, at least 0 (K2.5 §3.5).
    """

    ask: str = "any"
    size: int = 56
    records: int = 0  # 0: a million to train on, 500 to test on
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.ask not in (*QUESTIONS, "any"):
            raise TaskError(f"shapes: ask={self.ask!r} must be one of {', '.join(QUESTIONS)}, any")
        if self.size < 14 or self.records < 0:
            raise TaskError(f"shapes: size={self.size} must be at least 14 and records={self.records} not negative")

    def __len__(self) -> int:
        return self.records or (1_000_000 if self.split == "train" else 500)

    def question(self, index: int) -> str:
        return QUESTIONS[self.scene(index).question]

    def image(self, index: int) -> np.ndarray:
        return draw(self.scene(index), self.size)

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        return {"shape": scene.shape, "colour": scene.colour, "count": str(len(scene.places))}[scene.question]

    def score(self, prediction: str, index: int) -> float:
        scene, prediction = self.scene(index), normalise(prediction)
        if scene.question != "count":
            return float(prediction == self.answer(index))
        if not (prediction.isascii() and prediction.isdigit() and len(prediction) < 10):
            return 0.0
        gold = len(scene.places)
        return max(0.0, 1 - abs(int(prediction) - gold) / gold)

    def scene(self, index: int) -> Scene:
        """The drawing with this index."""
        generator = self.generator(index, self.seed)
        question = str(generator.choice(list(QUESTIONS))) if self.ask == "any" else self.ask
        shape, colour = str(generator.choice(SHAPES)), str(generator.choice(list(COLOURS)))
        paper = PAPERS[generator.integers(len(PAPERS))]
        if question == "count":
            places = _places(generator, int(generator.integers(1, MOST + 1)), radii=(0.1, 0.17))
        else:
            places = _places(generator, 1, radii=(0.25, 0.42))
        return Scene(question, shape, colour, paper, places)


def draw(scene: Scene, size: int) -> np.ndarray:
    """uint8 RGB [size, size, 3]."""
    side = size * FINE
    image = Image.new("RGB", (side, side), scene.paper)
    pen = ImageDraw.Draw(image)
    for x, y, radius, angle in scene.places:
        points = _outline(scene.shape, angle) * (radius * side) + np.array([x, y]) * side
        pen.polygon([tuple(point) for point in points.tolist()], COLOURS[scene.colour])
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _outline(shape: str, angle: float) -> np.ndarray:
    """Corners [n, 2] inside the unit circle. Turned by `angle`; a circle has many corners."""
    match shape:
        case "circle":
            corners = _polar(np.arange(48) / 48, 1.0)
        case "square":
            corners = _polar(np.arange(4) / 4 + 1 / 8, 1.0)
        case "triangle":
            corners = _polar(np.arange(3) / 3, 1.0)
        case "diamond":  # upright and narrow, unlike a square however turned
            corners = _polar(np.arange(4) / 4, 1.0) * [0.55, 1.0]
        case "star":
            corners = _polar(np.arange(10) / 10, np.where(np.arange(10) % 2, 0.42, 1.0))
        case "cross":
            a, b = 0.3, 0.9
            quarter = np.array([[a, -b], [a, -a], [b, -a]])
            corners = np.concatenate([quarter @ _turn(k * np.pi / 2) for k in range(4)])
    return corners @ _turn(angle)


def _polar(turns: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Points at these shares of a turn, clockwise from the top."""
    return np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], axis=1) * np.reshape(radius, (-1, 1))


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _places(
    generator: np.random.Generator, number: int, radii: tuple[float, float]
) -> tuple[tuple[float, float, float, float], ...]:
    """`number` places that do not touch. Drawn again from the start when the last ones found no room."""
    while True:
        places: list[tuple[float, float, float, float]] = []
        for _ in range(40):
            radius, angle = generator.uniform(*radii), generator.uniform(-0.25, 0.25)
            x, y = generator.uniform(radius + 0.02, 0.98 - radius, 2)
            if all(np.hypot(x - a, y - b) > radius + r + 0.04 for a, b, r, _ in places):
                places.append((float(x), float(y), float(radius), float(angle)))
            if len(places) == number:
                return tuple(places)
