"""Read a printed word: English words of 2 to 5 letters from Python's own manual, in Pillow's own font."""

import collections
import functools
import hashlib
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from k25_jax.data.tasks import Task, TaskError
from k25_jax.data.tasks.drawing import font, paper_and_ink
from k25_jax.scoring import scores


@dataclass(frozen=True)
class Words(Task):
    """Each word in `variants` sizes, places and colours to train on; other words to test on.

    The image is `height` pixels high and as wide as the word asks for. The score is 1 - the edit distance over the
    length of the longer text (K2.5 §3.5).
    """

    category: ClassVar[str] = "ocr"

    height: int = 28
    variants: int = 16
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.height < 12 or self.variants < 1:
            raise TaskError(f"words: height={self.height} must be at least 12 and variants={self.variants} at least 1")

    def __len__(self) -> int:
        return len(vocabulary(self.split)) * (self.variants if self.split == "train" else 1)

    def question(self, index: int) -> str:
        return "word?"

    def image(self, index: int) -> np.ndarray:
        word, generator = self.answer(index), self.generator(index, self.seed)
        ink_font = font(round(self.height * generator.uniform(0.62, 0.8)))
        left, _, right, _ = ink_font.getbbox(word)
        ascent, descent = ink_font.getmetrics()
        margin = generator.uniform(0.08, 0.35, 2) * self.height
        width = round(right - left + margin.sum())
        paper, ink = paper_and_ink(generator)
        image = Image.new("RGB", (width, self.height), paper)
        baseline = self.height - descent - generator.uniform(0, max(1, self.height - ascent - descent))
        ImageDraw.Draw(image).text((margin[0] - left, baseline), word, ink, ink_font, anchor="ls")
        return np.asarray(image)

    def answer(self, index: int) -> str:
        words = vocabulary(self.split)
        return words[self.check_index(index) % len(words)]

    def score(self, prediction: str, index: int) -> float:
        return scores.edit(prediction, self.answer(index))


@functools.cache
def vocabulary(split: str) -> tuple[str, ...]:
    """The split's words in a fixed mixed order. A word's hash decides its split, so it never changes sides."""
    from pydoc_data.topics import topics

    counts = collections.Counter(re.findall(r"\b[a-z]{2,5}\b", " ".join(topics.values())))
    hashes = {word: hashlib.sha256(word.encode()).digest() for word, count in counts.items() if count >= 3}
    test = split == "test"
    return tuple(word for word in sorted(hashes, key=hashes.__getitem__) if (hashes[word][-1] % 5 == 0) == test)
