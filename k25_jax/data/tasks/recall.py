"""Say what a line of a list said: numbers, pairs and words are copied out of the context as they stand there (K2.5 §3.3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import pick

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BETWEEN = (": ", "=", " is ", " -> ")  # name and value
KINDS = ("number", "number", "pair", "pair", "word", "mixed")


@dataclass(frozen=True)
class Noted:
    """Lines of a name and a value, what stands between the two, and the name that is asked for."""

    lines: tuple[tuple[str, str], ...]
    between: str
    asked: str


@dataclass(frozen=True)
class Recall(Endless):
    """One to `most` lines of names and values, then a name: the answer is its value. Held out: the name with its value."""

    category: ClassVar[str] = "long_context"
    modality: ClassVar[str] = "text"

    most: int = 6

    def __post_init__(self):
        super().__post_init__()
        self.check_range("most", 1, 500)

    def compose(self, generator: np.random.Generator) -> Noted:
        number = int(generator.integers(1, self.most + 1))
        values = {name_of(generator): value_of(generator) for _ in range(number)}
        return Noted(tuple(values.items()), pick(generator, BETWEEN), pick(generator, tuple(values)))

    def key(self, scene: Noted) -> str:
        return f"{scene.asked} {dict(scene.lines)[scene.asked]}"

    def question(self, index: int) -> str:
        scene = self.scene(index)
        return "".join(f"{name}{scene.between}{value}\n" for name, value in scene.lines) + f"{scene.asked}?"

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        return dict(scene.lines)[scene.asked]


def name_of(generator: np.random.Generator) -> str:
    """One to four letters."""
    return _letters(generator, 1, 4)


def value_of(generator: np.random.Generator) -> str:
    """A number, two numbers with a comma, a word, or letters and digits."""
    match pick(generator, KINDS):
        case "number":
            return _number(generator, 4)
        case "pair":
            return f"{_number(generator, 2)},{_number(generator, 2)}"
        case "word":
            return _letters(generator, 2, 8)
    return "".join(pick(generator, LETTERS + "0123456789") for _ in range(int(generator.integers(2, 9))))


def _number(generator: np.random.Generator, digits: int) -> str:
    return str(generator.integers(10 ** int(generator.integers(1, digits + 1))))


def _letters(generator: np.random.Generator, least: int, most: int) -> str:
    return "".join(pick(generator, LETTERS) for _ in range(int(generator.integers(least, most + 1))))
