"""Read a printed word: English words of 2 to 5 letters from Python's own manual, in Pillow's own font."""

import collections
import functools
import hashlib
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from k25_jax.data.tasks import Task, TaskError, normalise


@dataclass(frozen=True)
class Words(Task):
    """Each word in `variants` sizes, places and colours to train on; other words to test on.

    The image is `height` pixels high and as wide as the word asks for. The score is 1 - the edit distance over the
    length of the longer text (K2.5 §3.5).
    """

    height: int = 28
    variants: int = 16
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.height < 12 or self.variants < 1:
            raise TaskError(f"words: height={self.height} must be at least 12 and variants={self.variants} at least 1")

    def __len__(self) -> int:
        return len(_words(self.split)) * (self.variants if self.split == "train" else 1)

    def question(self, index: int) -> str:
        return "word?"

    def image(self, index: int) -> np.ndarray:
        word, generator = self.answer(index), self.generator(index, self.seed)
        font = _font(round(self.height * generator.uniform(0.62, 0.8)))
        left, _, right, _ = font.getbbox(word)
        ascent, descent = font.getmetrics()
        margin = generator.uniform(0.08, 0.35, 2) * self.height
        width = round(right - left + margin.sum())
        paper, ink = _colours(generator)
        image = Image.new("RGB", (width, self.height), paper)
        baseline = self.height - descent - generator.uniform(0, max(1, self.height - ascent - descent))
        ImageDraw.Draw(image).text((margin[0] - left, baseline), word, ink, font, anchor="ls")
        return np.asarray(image)

    def answer(self, index: int) -> str:
        words = _words(self.split)
        return words[self.check_index(index) % len(words)]

    def score(self, prediction: str, index: int) -> float:
        prediction, answer = normalise(prediction), self.answer(index)
        return 1 - edit_distance(prediction, answer) / max(len(prediction), len(answer))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements of one character that turn `a` into `b`, at least."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def _colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink: one dark, one light."""
    dark, light = generator.integers(0, 90, 3), generator.integers(165, 256, 3)
    pair = (dark, light) if generator.random() < 0.5 else (light, dark)
    return tuple(pair[0].tolist()), tuple(pair[1].tolist())


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.cache
def _words(split: str) -> tuple[str, ...]:
    """The split's words in a fixed mixed order. A word's hash decides its split, so it never changes sides."""
    from pydoc_data.topics import topics

    counts = collections.Counter(re.findall(r"\b[a-z]{2,5}\b", " ".join(topics.values())))
    hashes = {word: hashlib.sha256(word.encode()).digest() for word, count in counts.items() if count >= 3}
    test = split == "test"
    return tuple(word for word in sorted(hashes, key=hashes.__getitem__) if (hashes[word][-1] % 5 == 0) == test)
