"""Reason a little in text: sums, comparisons, orders, letters and sequences."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import pick, pick_some
from k25_jax.data.tasks.words import vocabulary

KINDS = ("sum", "less", "largest", "sort", "letters", "reverse", "sequence", "taller")
NAMES = ("Ann", "Bob", "Cem", "Dee", "Eli", "Fay", "Gus", "Hal")


@dataclass(frozen=True)
class Puzzles(Endless):
    """`ask` is sum, less, largest, sort, letters, reverse, sequence, taller or any; numbers up to `limit`.

    Held out: the question, word by word. `letters` also has the words of the split of `words` only.
    """

    category: ClassVar[str] = "text_reasoning"
    modality: ClassVar[str] = "text"

    ask: str = "any"
    limit: int = 50

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*KINDS, "any"))
        self.check_range("limit", 20, 10**6)

    def question(self, index: int) -> str:
        return self.scene(index)[0]

    def answer(self, index: int) -> str:
        return self.scene(index)[1]

    def key(self, scene: tuple[str, str]) -> str:
        return scene[0]

    def compose(self, generator: np.random.Generator) -> tuple[str, str]:
        numbers = [int(number) for number in generator.integers(1, self.limit, 4)]
        a, b = sorted(numbers[:2], reverse=True)
        match pick(generator, KINDS) if self.ask == "any" else self.ask:
            case "sum":
                return f"{numbers[0]}+{numbers[1]}", str(numbers[0] + numbers[1])
            case "less":
                return f"{a}-{b}", str(a - b)
            case "largest":
                return f"largest: {' '.join(map(str, numbers))}", str(max(numbers))
            case "sort":
                return f"sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))
            case "letters":
                word = pick(generator, vocabulary(self.split)) + pick(generator, vocabulary(self.split))
                letter = pick(generator, word)
                return f"{letter} in {word}", str(word.count(letter))
            case "reverse":
                letters = "".join(pick_some(generator, "abcdefghijklmnopqrstuvwxyz", 4))
                return f"reverse: {letters}", letters[::-1]
            case "sequence":
                start, step = numbers[0], numbers[1] % 12 + 1
                terms = [start + step * i for i in range(4)]
                return f"next: {' '.join(map(str, terms[:3]))}", str(terms[3])
        return _taller(generator)


def _taller(generator: np.random.Generator) -> tuple[str, str]:
    """Who is tallest, or shortest, of three: two comparisons in either direction and order."""
    first, second, third = pick_some(generator, NAMES, 3)  # from tall to short
    facts = [
        f"{x} is taller than {y}" if generator.random() < 0.5 else f"{y} is shorter than {x}"
        for x, y in ((first, second), (second, third))
    ]
    facts = [facts[i] for i in generator.permutation(2)]
    tall = generator.random() < 0.5
    return f"{facts[0]}, {facts[1]}. {'tallest' if tall else 'shortest'}?", first if tall else third
