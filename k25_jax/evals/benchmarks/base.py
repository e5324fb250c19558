"""What benchmarks share: prompts of questions with options or without, options in another order for each sample, checks.

A benchmark reads the file that its authors published. The wording of the prompts is our own, so scores are comparable
between models asked here, and nearly so with published ones.
"""

import pathlib
import random
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks.rows import Rows
from k25_jax.evals.local import fingerprint
from k25_jax.evals.protocol import digest_of
from k25_jax.scoring.answers import LETTERS, choice, plain, short_answer

REASONING, VISION = 98304, 65536  # completion tokens (K2.5 §4)

PICK = (
    "One option is right. Think as long as you need, then end with a line that reads: Answer: X, where X is its letter."
)
SAY = "Think as long as you need, then end with a line that reads: Answer: and the answer alone, as short as it can be."


class Benchmark:
    """A `TaskSet` over the rows of a file. A benchmark gives `question` and `golds`, or `options` and `right`.

    `k` is the number of samples, `max_tokens` the limit of an answer, where nothing else is asked for.
    """

    name: ClassVar[str]
    category: ClassVar[str]
    k: ClassVar[int] = 1
    max_tokens: ClassVar[int] = REASONING
    permuted: ClassVar[bool] = True  # whether options come in another order in each sample

    def __init__(self, path: str | pathlib.Path):
        self.rows = Rows(path)

    def __len__(self) -> int:
        return len(self.rows)

    # ------------------------------------------------------------------------------------------- what a benchmark gives
    def question(self, index: int) -> str:
        """The question, without its options."""
        raise NotImplementedError

    def options(self, index: int) -> list[str]:
        """The options in the file's order; none where the answer is free."""
        return []

    def right(self, index: int) -> int:
        """The number of the right option."""
        raise NotImplementedError

    def golds(self, index: int) -> list[str]:
        """Right answers to a question without options."""
        raise NotImplementedError

    def media(self, index: int) -> list[dict]:
        """Parts of the message before the question, as `text.chat` has them."""
        return []

    def hint(self, index: int) -> str:
        """How to answer."""
        return PICK if self.options(index) else SAY

    def score_free(self, text: str, index: int) -> float:
        """The score of an answer to a question without options."""
        return short_answer(text, self.golds(index))

    def group(self, index: int) -> str:
        """The subject, or whatever the authors report by; "" for none."""
        return ""

    # ------------------------------------------------------------------------------------------------- what follows
    def label(self, index: int) -> str:
        """What errors call a question."""
        return self.rows.label(index)

    def order(self, index: int, seed: int) -> list[int]:
        """The numbers of the options in the order in which this sample shows them."""
        numbers = list(range(len(self.options(index))))
        if self.permuted:
            random.Random(seed).shuffle(numbers)
        return numbers

    def text(self, index: int, seed: int) -> str:
        """Question, options with their letters, and how to answer."""
        options = self.options(index)
        shown = [f"{LETTERS[at]}) {options[number]}" for at, number in enumerate(self.order(index, seed))]
        return "\n\n".join(filter(None, (self.question(index), "\n".join(shown), self.hint(index))))

    def prompt(self, index: int, seed: int) -> list[dict]:
        """One message of the user's."""
        return [{"role": "user", "content": [*self.media(index), {"type": "text", "text": self.text(index, seed)}]}]

    def gold(self, index: int, seed: int) -> str:
        """The letter that is right in this sample, or the first gold answer."""
        if self.options(index):
            return LETTERS[self.order(index, seed).index(self.right(index))]
        return self.golds(index)[0]

    def score(self, text: str, index: int, seed: int) -> float:
        """1 for the right option, or what the benchmark's rule says of a free answer."""
        options = self.options(index)
        if not options:
            return self.score_free(text, index)
        order = self.order(index, seed)
        chosen = choice(text, [options[number] for number in order])
        return float(chosen is not None and order[chosen] == self.right(index))

    def digest(self) -> str:
        """Of the data files, and of the wording of a few prompts."""
        files, places = self.rows.files(), np.linspace(0, len(self) - 1, min(8, len(self))).astype(int).tolist()
        return digest_of(self.name, fingerprint(self.rows.root, files), [self.text(index, 0) for index in places])

    def guessing(self, indices: Sequence[int]) -> float:
        """One over the number of options; of free answers, the score of the commonest gold answer."""
        free = [index for index in indices if not self.options(index)]
        golds = [self.golds(index)[0] for index in free]
        commonest = max(sorted(set(golds)), key=golds.count, default="")
        scores = [1 / len(self.options(index)) for index in indices if self.options(index)]
        scores += [self.score_free(f"Answer: {commonest}", index) for index in free]
        return float(np.mean(scores)) if scores else 0.0

    def validate(self, samples: int = 64):
        """Raise DataError unless all rows can be read, gold answers score 1, and empty, other or wrong ones less.

        Scores are looked at in rows that are evenly spaced over the file.
        """
        for index in range(len(self)):
            self.question(index)
            options = self.options(index)
            if options and not 0 <= self.right(index) < len(options):
                raise DataError(f"{self.label(index)}: option {self.right(index)} of {len(options)} is the answer")
            if not options and not self.golds(index):
                raise DataError(f"{self.label(index)}: has no gold answer")
            if len(options) == 1 or len(options) > len(LETTERS):
                raise DataError(f"{self.label(index)}: {len(options)} options; there must be 2 to {len(LETTERS)}")
        for index in np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int).tolist():
            self.media(index)
            gold, where = self.gold(index, index), self.label(index)
            if self.score(f"Let me see.\n\nAnswer: {gold}", index, index) != 1.0:
                raise DataError(f"{where}: the gold answer {gold!r} does not score 1")
            if self.score("", index, index) == 1.0:
                raise DataError(f"{where}: an empty answer scores as much as {gold!r}")
            wrong = [letter for letter in LETTERS[: len(self.options(index))] if letter != gold]
            if any(self.score(f"Answer: {letter}", index, index) for letter in wrong):
                raise DataError(f"{where}: a wrong option scores as well")

    def letter(self, index: int, letter: str, options: Sequence[str]) -> int:
        """The number of an option by its letter, or its text, in the file's order; raises DataError."""
        if len(bare := letter.strip(" \t\n().:")) == 1 and bare.upper() in LETTERS[: len(options)]:
            return LETTERS.index(bare.upper())
        same = [number for number, option in enumerate(options) if plain(option) == plain(letter)]
        if len(same) != 1:
            raise DataError(f"{self.label(index)}: the answer {letter[:80]!r} is none of its {len(options)} options")
        return same[0]
