"""Find a passkey that was said once in a long text that says nothing (long-context mid-training, K2.5 §3.3)."""

import functools
import hashlib
from dataclasses import dataclass

from k25_jax.data.tasks import Task, TaskError

MARK, QUESTION = " key: ", " key?"
# The chat template around question and answer, in tokens of a byte-level vocabulary: four special tokens, "user",
# "assistant" and the two that end a turn.
TEMPLATE = 19
WORDS = (
    "the sun and a moon go up or down in an old blue sky so we sit by it to see if rain or snow is on its way".split()
)
LEAST = 16  # characters of text around the passkey


@dataclass(frozen=True)
class Passkey(Task):
    """Words without meaning, `digits` digits among them at any depth, and at the end the question which they were.

    A document has `length` tokens, template and answer included, where a character is a token; or from `shortest` to
    `length`, if that is given: then no model can count on where the question stands. The passkeys of the two splits
    differ: a hash of the digits decides.
    """

    length: int = 128
    shortest: int = 0  # 0: as long as the longest
    digits: int = 3
    records: int = 0  # 0: a million to train on, 500 to test on
    seed: int = 0

    category = "long_context"
    modality = "text"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.digits <= 5:
            raise TaskError(f"passkey: digits={self.digits} must lie between 1 and 5")
        least = self._fixed + LEAST
        if min(self.length, self.shortest or self.length) < least or self.records < 0:
            raise TaskError(
                f"passkey: length={self.length} and shortest={self.shortest} must be at least {least}, "
                f"records={self.records} at least 0"
            )
        self.check_range("shortest", 0, self.length)

    @property
    def _fixed(self) -> int:
        """Tokens that are no filler: the passkey is said twice."""
        return TEMPLATE + len(MARK) + len(QUESTION) + 2 * self.digits

    def __len__(self) -> int:
        return self.records or {"train": 1_000_000, "test": 500}[self.split]

    def question(self, index: int) -> str:
        """The whole text, the question at its end."""
        generator = self._drawn(index)[1]
        filler = self._filler(index)
        text = " ".join(generator.choice(WORDS, filler))[:filler]
        place = self._place(index)
        return text[:place] + MARK + self.answer(index) + text[place:] + QUESTION

    def answer(self, index: int) -> str:
        return self._drawn(index)[0]

    def depth(self, index: int) -> float:
        """Where the passkey stands in the filler: 0 is the beginning, 1 the end."""
        return self._place(index) / self._filler(index)

    def _drawn(self, index: int):
        """The passkey, and the generator of the rest of the text."""
        generator = self.generator(index, self.seed)
        keys = _keys(self.split, self.digits)
        return keys[generator.integers(len(keys))], generator

    def _place(self, index: int) -> int:
        """Characters before the passkey. Not drawn from the generator of the words, so that each can be had alone."""
        return self._digest("", index) % (self._filler(index) + 1)

    def _filler(self, index: int) -> int:
        """Characters of text around the passkey."""
        lengths = self.length - (self.shortest or self.length) + 1
        return self.length - self._digest(" length", index) % lengths - self._fixed

    def _digest(self, what: str, index: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.split}:{self.seed}:{index}{what}".encode()).digest()[:8])


@functools.cache
def _keys(split: str, digits: int) -> tuple[str, ...]:
    """All passkeys of the split: one in five is for testing."""
    every = (f"{number:0{digits}d}" for number in range(10**digits))
    test = split == "test"
    return tuple(key for key in every if (hashlib.sha256(f"key {key}".encode()).digest()[-1] % 5 == 0) == test)
