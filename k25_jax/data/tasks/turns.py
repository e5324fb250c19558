"""Conversations of several questions, about pictures and without, each of another task (interleaved data, K2.5 §3.3)."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import MILLION, Task, TaskError, make_task
from k25_jax.data.tasks.drawing import pick

PICTURES = ("photographs", "emblems", "shapes", "scenes", "digits", "charts")
TEXTS = ("facts", "puzzles", "programs", "recall", "recall")


@dataclass(frozen=True)
class Turn:
    """A question, by its task and record, and an unrelated picture beside it, or None."""

    task: Task
    index: int
    beside: tuple[Task, int] | None


@dataclass(frozen=True)
class Turns(Task):
    """Two to `most` questions, one in two without a picture of its own; every other of these has one that it does not need.

    The last question is the one that is scored. Held out is what the tasks of its questions hold out.
    """

    category: ClassVar[str] = "interleaved"
    longest: ClassVar[int] = 96

    most: int = 2
    records: int = 0  # 0: a million to train on, 500 to test on
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_range("most", 2, 8)
        if self.records < 0 or self.seed < 0:
            raise TaskError(f"turns: records={self.records} and seed={self.seed} must not be negative")

    def __len__(self) -> int:
        return self.records or (MILLION if self.split == "train" else 500)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The questions of a record, in order; the last one is scored."""
        return _turns(self, int(index))

    def compose(self, generator: np.random.Generator) -> Turn:
        """One turn."""
        if generator.random() < 0.5:
            return Turn(*_drawn(generator, PICTURES, self.split), None)
        beside = _drawn(generator, PICTURES, self.split) if generator.random() < 0.5 else None
        return Turn(*_drawn(generator, TEXTS, self.split), beside)

    def question(self, index: int) -> str:
        last = self.turns(index)[-1]
        return last.task.question(last.index)

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        parts = (part for message in self.prompt(index)[::2] for part in message["content"])
        return tuple(part[part["type"]] for part in parts if part["type"] != "text")

    def answer(self, index: int) -> str:
        last = self.turns(index)[-1]
        return last.task.answer(last.index)

    def score(self, prediction: str, index: int) -> float:
        last = self.turns(index)[-1]
        return last.task.score(prediction, last.index)

    def prompt(self, index: int) -> list[dict]:
        """All questions; the answers to all but the last."""
        messages: list[dict] = []
        for turn in self.turns(index):
            (asked,) = turn.task.prompt(turn.index)
            if turn.beside:
                task, number = turn.beside
                *pictures, _ = task.prompt(number)[0]["content"]
                asked["content"] = [*pictures, *asked["content"]]
            messages += [asked, {"role": "assistant", "content": turn.task.answer(turn.index)}]
        return messages[:-1]


@functools.lru_cache(maxsize=64)
def _turns(task: Turns, index: int) -> tuple[Turn, ...]:
    generator = task.generator(index, task.seed)
    return tuple(task.compose(generator) for _ in range(int(generator.integers(2, task.most + 1))))


def _drawn(generator: np.random.Generator, names: tuple[str, ...], split: str) -> tuple[Task, int]:
    task = make_task(f"{pick(generator, names)}:{split}")
    return task, int(generator.integers(len(task)))
