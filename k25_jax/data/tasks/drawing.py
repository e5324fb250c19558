"""What the drawn tasks share: shapes, colours, places that do not touch, text in Pillow's own font, smooth edges."""

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
FINE = 4  # drawn this many times larger, then reduced: smooth edges

Item = TypeVar("Item")


def pick(generator: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of `items`."""
    return items[int(generator.integers(len(items)))]


def pick_some(generator: np.random.Generator, items: Sequence[Item], number: int) -> list[Item]:
    """`number` different ones of `items`, in mixed order."""
    return [items[i] for i in generator.permutation(len(items))[:number].tolist()]


def outline(shape: str, angle: float = 0.0) -> np.ndarray:
    """Corners [n, 2] inside the unit circle. Turned by `angle`; a circle has many corners."""
    return _upright(shape) @ _turn(angle)


@functools.cache
def _upright(shape: str) -> np.ndarray:
    match shape:
        case "circle":
            return _polar(np.arange(48) / 48, 1.0)
        case "square":
            return _polar(np.arange(4) / 4 + 1 / 8, 1.0)
        case "triangle":
            return _polar(np.arange(3) / 3, 1.0)
        case "diamond":  # upright and narrow, unlike a square however turned
            return _polar(np.arange(4) / 4, 1.0) * [0.55, 1.0]
        case "star":
            return _polar(np.arange(10) / 10, np.where(np.arange(10) % 2, 0.42, 1.0))
        case "cross":
            a, b = 0.3, 0.9
            quarter = np.array([[a, -b], [a, -a], [b, -a]])
            return np.concatenate([quarter @ _turn(k * np.pi / 2) for k in range(4)])
    raise KeyError(shape)


def _polar(turns: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Points at these shares of a turn, clockwise from the top."""
    return np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], axis=1) * np.reshape(radius, (-1, 1))


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def spread(
    generator: np.random.Generator, number: int, radii: tuple[float, float]
) -> tuple[tuple[float, float, float, float], ...]:
    """`number` places (x, y, radius, angle) that do not touch. Begun again when the last ones found no room."""
    while True:
        places: list[tuple[float, float, float, float]] = []
        for _ in range(40):
            radius, angle = generator.uniform(*radii), generator.uniform(-0.25, 0.25)
            x, y = generator.uniform(radius + 0.02, 0.98 - radius, 2)
            if all(np.hypot(x - a, y - b) > radius + r + 0.04 for a, b, r, _ in places):
                places.append((float(x), float(y), float(radius), float(angle)))
            if len(places) == number:
                return tuple(places)


def coarse(places: Sequence[tuple[float, float, float, float]]) -> str:
    """Where places are to a 16th of the side: what the drawn tasks hold out, beside shapes and colours."""
    return " ".join(f"{int(x * 16)},{int(y * 16)}" for x, y, _, _ in places)


class Canvas:
    """A picture of `width` x `height` pixels. Areas are drawn `FINE` times larger; text comes last, at its size."""

    def __init__(self, width: int, height: int, paper: tuple[int, int, int]):
        self._image = Image.new("RGB", (width * FINE, height * FINE), paper)
        self._pen = ImageDraw.Draw(self._image)
        self._texts: list[tuple[str, float, float, int, tuple[int, int, int], str]] = []

    def polygon(self, corners: np.ndarray, colour: tuple[int, int, int]):
        """A filled polygon with corners [n, 2] in pixels."""
        self._pen.polygon([tuple(corner) for corner in (corners * FINE).tolist()], colour)

    def shape(self, shape: str, colour: tuple[int, int, int], place: Sequence[float]):
        """A shape at (x, y, radius, angle) in pixels."""
        x, y, radius, angle = place
        self.polygon(outline(shape, angle) * radius + np.array([x, y]), colour)

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int], round_: float = 0
    ):
        """A filled box, its corners rounded by `round_` pixels."""
        inner = (left * FINE, top * FINE, right * FINE - 1, bottom * FINE - 1)
        self._pen.rounded_rectangle(inner, round_ * FINE, colour)

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float = 1.0):
        """A line through points in pixels."""
        self._pen.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE), joint="curve")

    def text(self, text: str, x: float, y: float, size: int, colour: tuple[int, int, int], anchor: str = "lm"):
        """Text of `size` pixels at a point; `anchor` is Pillow's: lm, mm, rm, .."""
        self._texts.append((text, x, y, size, colour, anchor))

    def pixels(self) -> np.ndarray:
        """uint8 RGB [height, width, 3]."""
        image = self._image.reduce(FINE)
        pen = ImageDraw.Draw(image)
        for text, x, y, size, colour, anchor in self._texts:
            pen.text((x, y), text, colour, font(size), anchor=anchor)
        return np.asarray(image)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, of `size` pixels."""
    return ImageFont.load_default(size)


def paper_and_ink(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours: one dark, one light."""
    dark, light = generator.integers(0, 90, 3), generator.integers(165, 256, 3)
    pair = (dark, light) if generator.random() < 0.5 else (light, dark)
    return tuple(pair[0].tolist()), tuple(pair[1].tolist())
