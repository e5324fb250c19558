"""Read a chart: values, the largest and the smallest of bars or of the points of a line."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import COLOURS, Canvas, pick, pick_some
from k25_jax.scoring import scores

KINDS = ("value", "largest", "smallest", "difference")
TOP = 9  # of the axis
INK, RULE = (30, 32, 38), (205, 208, 214)


@dataclass(frozen=True)
class Scene:
    """A chart of values 1..9 over letters, and a question."""

    question: str
    answer: str
    letters: tuple[str, ...]
    values: tuple[int, ...]
    line: bool
    colour: str


@dataclass(frozen=True)
class Charts(Endless):
    """`ask` is value, largest, smallest, difference or any; 3 to `bars` values; `size` pixels a side.

    Numbers score 1 - |prediction - gold| / gold, at least 0. Held out: the values, in order.
    """

    category: ClassVar[str] = "charts"

    ask: str = "any"
    bars: int = 5
    size: int = 84

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*KINDS, "any"))
        self.check_range("bars", 3, 7)
        self.check_range("size", 56, 448)

    def question(self, index: int) -> str:
        return self.scene(index).question

    def answer(self, index: int) -> str:
        return self.scene(index).answer

    def image(self, index: int) -> np.ndarray:
        return draw(self.scene(index), self.size)

    def score(self, prediction: str, index: int) -> float:
        gold = self.answer(index)
        return scores.count(prediction, int(gold)) if gold.isdigit() else scores.exact(prediction, gold)

    def key(self, scene: Scene) -> str:
        return " ".join(map(str, scene.values))

    def compose(self, generator: np.random.Generator) -> Scene:
        number = int(generator.integers(3, self.bars + 1))
        letters = pick_some(generator, "ABCDEFGHKLMNPRSTUVXYZ", number)
        values = pick_some(generator, range(1, TOP + 1), number)
        kind = pick(generator, KINDS) if self.ask == "any" else self.ask
        match kind:
            case "value":
                place = int(generator.integers(number))
                question, answer = f"{letters[place]}?", str(values[place])
            case "difference":
                low, high = sorted(pick_some(generator, range(number), 2), key=values.__getitem__)
                question, answer = f"{letters[high]}-{letters[low]}?", str(values[high] - values[low])
            case _:
                place = values.index(max(values) if kind == "largest" else min(values))
                question, answer = f"{kind}?", letters[place]
        colour = pick(generator, tuple(COLOURS))
        return Scene(question, answer, tuple(letters), tuple(values), bool(generator.random() < 0.35), colour)


def draw(scene: Scene, size: int) -> np.ndarray:
    """uint8 RGB [size, size, 3]: numbers on the left of rules at every third value, letters below."""
    canvas = Canvas(size, size, (252, 252, 250))
    text = max(10, round(size * 0.14))
    left, bottom, top = text * 0.9, size - text * 1.15, text * 0.6
    right, unit = size - 2, (bottom - top) / TOP
    for value in range(0, TOP + 1, 3):
        y = bottom - value * unit
        canvas.line([(left, y), (right, y)], INK if value == 0 else RULE, 1)
        canvas.text(str(value), left - 2, y, text - 1, INK, "rm")
    step = (right - left) / len(scene.values)
    colour = COLOURS[scene.colour]
    centres = [left + (i + 0.5) * step for i in range(len(scene.values))]
    heights = [bottom - value * unit for value in scene.values]
    if scene.line:
        canvas.line(list(zip(centres, heights, strict=True)), colour, 1.5)
    for x, y, letter in zip(centres, heights, scene.letters, strict=True):
        if scene.line:
            canvas.shape("circle", INK, (x, y, 0.028 * size, 0.0))
        else:
            canvas.box(x - 0.36 * step, y, x + 0.36 * step, bottom, colour)
        canvas.text(letter, x, size - text * 0.5, text, INK, "mm")
    return canvas.pixels()
