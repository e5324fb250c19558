"""Rendered tasks with verifiable answers, made of what installed libraries ship. Nothing is downloaded.

`make_task("digits:train:size=56")` gives a `Task`: records in the chat format of `text.chat`, gold answers, a score.
Everything is a function of (spec, index). The train and test splits of a task share no picture, word or file.
"""

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from k25_jax.config import ConfigError, from_dict

NAMES = ("digits", "photographs", "words", "shapes", "library", "passkey")
SPLITS = ("train", "test")


class TaskError(ConfigError):
    """A task that cannot be made or does not hold; the message names the task and the remedy."""


@dataclass(frozen=True)
class Task:
    """A split of questions about images. A task gives `__len__`, `question`, `image` and `answer`; the rest follows."""

    split: str

    def __post_init__(self):
        if self.split not in SPLITS:
            raise TaskError(f"{self.name}: no split {self.split!r}; there are {' and '.join(SPLITS)}")

    @property
    def name(self) -> str:
        """The name in the spec: the class's, in lower case."""
        return type(self).__name__.lower()

    def __len__(self) -> int:
        raise NotImplementedError

    def question(self, index: int) -> str:
        raise NotImplementedError

    def image(self, index: int) -> np.ndarray:
        """uint8 RGB [h, w, 3]."""
        raise NotImplementedError

    def answer(self, index: int) -> str:
        raise NotImplementedError

    def record(self, index: int) -> dict:
        """{"messages": [...]}: the user's image and question, the assistant's answer."""
        content = [{"type": "image", "image": self.image(index)}, {"type": "text", "text": self.question(index)}]
        answer = {"role": "assistant", "content": self.answer(index)}
        return {"messages": [{"role": "user", "content": content}, answer]}

    def score(self, prediction: str, index: int) -> float:
        """1 for the gold answer, whatever its case and the space or full stop around it; 0 otherwise."""
        return float(normalise(prediction) == normalise(self.answer(index)))

    def validate(self, samples: int = 64):
        """Raise `TaskError` unless gold answers score 1 and an empty answer less, at evenly spaced indices."""
        for index in np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int).tolist():
            answer = self.answer(index)
            if self.score(answer, index) != 1.0:
                raise TaskError(f"{self.name}:{self.split}[{index}]: the gold answer {answer!r} does not score 1")
            if self.score("", index) == 1.0:
                raise TaskError(f"{self.name}:{self.split}[{index}]: an empty answer scores as much as {answer!r}")

    def check_index(self, index: int) -> int:
        """The index, if it lies in the split."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}:{self.split} has {len(self)} records; {index} is not one of them")
        return index

    def generator(self, index: int, seed: int) -> np.random.Generator:
        """Random numbers that belong to this task, split, seed and index, on every machine the same."""
        return np.random.default_rng([*self.name.encode(), SPLITS.index(self.split), seed, self.check_index(index)])


def make_task(spec: str) -> Task:
    """A task from `name:split[:option=value,...]`, as in "digits:train:size=56,variants=4"."""
    name, _, rest = spec.partition(":")
    split, _, options = rest.partition(":")
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise TaskError(f"no task {name!r} in {spec!r}; did you mean {nearest!r}? There are: {', '.join(NAMES)}")
    if not split:
        raise TaskError(f"task {spec!r} names no split; write {name}:train or {name}:test")
    return from_dict(_task_class(name), {"split": split} | _options(spec, options), where=f"task {spec!r}")


def normalise(answer: str) -> str:
    """`answer` in lower case, without space and full stops around it."""
    return answer.strip().strip(".").strip().casefold()


def _options(spec: str, text: str) -> Mapping:
    options = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise TaskError(f"task {spec!r}: option {item!r} must read name=value")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _task_class(name: str) -> type[Task]:
    """Imported when asked for: two of the tasks need libraries of the extra `demo`."""
    match name:
        case "digits":
            from k25_jax.data.tasks.digits import Digits as task
        case "photographs":
            from k25_jax.data.tasks.photographs import Photographs as task
        case "words":
            from k25_jax.data.tasks.words import Words as task
        case "shapes":
            from k25_jax.data.tasks.shapes import Shapes as task
        case "library":
            from k25_jax.data.tasks.library import Library as task
        case "passkey":
            from k25_jax.data.tasks.passkey import Passkey as task
    return task
