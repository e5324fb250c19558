"""Read lines of print: words of Python's own manual and numbers, several to a line."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import Canvas, font, paper_and_ink, pick
from k25_jax.data.tasks.words import vocabulary
from k25_jax.scoring import scores

LINE = 22  # pixels from line to line
WIDTH = 112
SIZE = 15  # pixels of the font


@dataclass(frozen=True)
class Lines(Endless):
    """`rows` lines with a word each, and a number or a second word where there is room.

    The score is 1 - the edit distance over the length of the longer text (K2.5 §3.5); a new line counts as a space.
    Held out: the words of the test split of `words`, which no line of the train split has.
    """

    category: ClassVar[str] = "ocr"
    longest: ClassVar[int] = 96

    rows: int = 2

    def __post_init__(self):
        super().__post_init__()
        self.check_range("rows", 1, 6)

    def question(self, index: int) -> str:
        return "read"

    def answer(self, index: int) -> str:
        return " ".join(self.scene(index))

    def score(self, prediction: str, index: int) -> float:
        return scores.edit(" ".join(prediction[: scores.MOST_TEXT].split()), self.answer(index))

    def key(self, scene: tuple[str, ...]) -> str:
        return " ".join(scene)

    def compose(self, generator: np.random.Generator) -> tuple[str, ...]:
        return tuple(self._line(generator) for _ in range(self.rows))

    def _line(self, generator: np.random.Generator) -> str:
        words = vocabulary(self.split)
        items = [pick(generator, words)]
        items.append(pick(generator, words) if generator.random() < 0.4 else str(generator.integers(10, 1000)))
        line = " ".join(items if generator.random() < 0.5 else items[::-1])
        return line if font(SIZE).getlength(line) <= WIDTH - 10 else items[0]

    def image(self, index: int) -> np.ndarray:
        lines, generator = self.scene(index), self.generator(index, self.seed + 1)
        paper, ink = paper_and_ink(generator)
        canvas = Canvas(WIDTH, LINE * self.rows, paper)
        for row, line in enumerate(lines):
            room = WIDTH - font(SIZE).getlength(line)
            x, y = 4 + generator.uniform(0, max(0.0, room - 8)), LINE * (row + 0.5) + generator.uniform(-1.5, 1.5)
            canvas.text(line, x, y, SIZE, ink)
        return canvas.pixels()
