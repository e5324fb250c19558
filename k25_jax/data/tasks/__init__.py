"""Rendered tasks with verifiable answers, made of what installed libraries ship. Nothing is downloaded.

`make_task("digits:train:size=56")` gives a `Task`: records in the chat format of `text.chat`, gold answers, a score.
Everything is a function of (spec, index). The train and test splits of a task share no picture, word, file or question:
each says in its docstring what is held out.
"""

import ast
import difflib
import functools
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from k25_jax.config import ConfigError, from_dict
from k25_jax.scoring import scores

# Name of the task -> its module. The class has the name of the task, with a capital.
TASKS = {
    "photographs": "photographs",
    "emblems": "emblems",
    "shapes": "shapes",
    "scenes": "scenes",
    "digits": "digits",
    "words": "words",
    "lines": "lines",
    "charts": "charts",
    "documents": "documents",
    "screens": "screens",
    "boxes": "grounding",
    "points": "grounding",
    "polygons": "polygons",
    "motion": "motion",
    "facts": "facts",
    "puzzles": "puzzles",
    "programs": "programs",
    "dots": "pixels",
    "spots": "pixels",
    "sizes": "pixels",
    "lengths": "pixels",
    "changes": "pixels",
    "numerals": "patterns",
    "glyphs": "patterns",
    "bars": "patterns",
    "mazes": "patterns",
    "library": "library",
    "passkey": "passkey",
    "recall": "recall",
    "turns": "turns",
    "lookups": "lookups",
}
PROGRAMMED = ("dots", "spots", "sizes", "lengths", "changes", "numerals", "glyphs", "bars", "mazes")  # for a sandbox
CATEGORIES = (
    "vision_knowledge",
    "vision_reasoning",
    "ocr",
    "charts",
    "documents",
    "screens",
    "grounding",
    "polygons",
    "video",
    "text_knowledge",
    "text_reasoning",
    "code",
    "tool_use",  # programs over pixels, tables that are looked up in
    "long_context",
    "interleaved",  # conversations of questions of other tasks
    "text",  # to read on: no questions
)
SPLITS = ("train", "test")
TEST_SHARE = 8  # one in so many combinations is held out for testing
MILLION = 1_000_000


class TaskError(ConfigError):
    """A task that cannot be made or does not hold; the message names the task and the remedy."""


@dataclass(frozen=True)
class Task:
    """A split of questions. A task gives `__len__`, `question`, `answer`, and `image` or `media`; the rest follows.

    `category` is one of CATEGORIES, `modality` is vision or text, and `longest` is the most bytes a gold answer has.
    """

    category: ClassVar[str]
    modality: ClassVar[str] = "vision"
    longest: ClassVar[int] = 16

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
        """uint8 RGB [h, w, 3], of a task that asks about one image."""
        raise NotImplementedError

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        """What is shown before the question, in order: uint8 images [h, w, 3], or videos [frames, h, w, 3]."""
        return (self.image(index),) if self.modality == "vision" else ()

    def answer(self, index: int) -> str:
        raise NotImplementedError

    def prompt(self, index: int) -> list[dict]:
        """The user's message: the media and the question."""
        kinds = {3: "image", 4: "video"}
        content = [{"type": kinds[shown.ndim], kinds[shown.ndim]: shown} for shown in self.media(index)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question(index)}]}]

    def record(self, index: int) -> dict:
        """{"messages": [...]}: the prompt, and the answer as the assistant's."""
        return {"messages": [*self.prompt(index), {"role": "assistant", "content": self.answer(index)}]}

    def score(self, prediction: str, index: int) -> float:
        """1 for the gold answer, whatever its case and the space or full stop around it; 0 otherwise."""
        return scores.exact(prediction, self.answer(index))

    def validate(self, samples: int = 64):
        """Raise `TaskError` unless gold answers score 1, and an empty one or that of another record less.

        The records are evenly spaced over the split.
        """
        golds: list[str] = []
        for index in np.linspace(0, len(self) - 1, min(samples, len(self))).astype(int).tolist():
            where, answer = f"{self.name}:{self.split}[{index}]", self.answer(index)
            if self.score(answer, index) != 1.0:
                raise TaskError(f"{where}: the gold answer {answer!r} does not score 1")
            if self.score("", index) == 1.0:
                raise TaskError(f"{where}: an empty answer scores as much as {answer!r}")
            if len(answer.encode()) > self.longest:
                raise TaskError(f"{where}: {answer!r} has more than {self.longest} bytes; set `longest`")
            for other in golds[-4:]:
                if scores.normalise(other) != scores.normalise(answer) and self.score(other, index) == 1.0:
                    raise TaskError(f"{where}: {other!r} scores as much as {answer!r}")
            golds.append(answer)

    def check_index(self, index: int) -> int:
        """The index, if it lies in the split."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}:{self.split} has {len(self)} records; {index} is not one of them")
        return index

    def check_range(self, option: str, least: int, most: int):
        """Raise `TaskError` unless an option lies in its range."""
        if not least <= getattr(self, option) <= most:
            value = getattr(self, option)
            raise TaskError(f"{self.name}: {option}={value} must be at least {least} and at most {most}")

    def check_choice(self, option: str, choices: Sequence[str]):
        """Raise `TaskError` unless an option is one of its choices."""
        if getattr(self, option) not in choices:
            raise TaskError(f"{self.name}: {option}={getattr(self, option)!r} must be one of {', '.join(choices)}")

    def generator(self, index: int, seed: int) -> np.random.Generator:
        """Random numbers that belong to this task, split, seed and index, on every machine the same."""
        return np.random.default_rng([*self.name.encode(), SPLITS.index(self.split), seed, self.check_index(index)])


@dataclass(frozen=True)
class Endless(Task):
    """A task that composes scenes as they are asked for: `compose` gives one, and `key` says what is held out of it.

    The hash of the key decides the split of a scene: those of the wrong split are composed again. So no key of the
    test split is ever trained on, whatever the seed.
    """

    records: int = 0  # 0: a million to train on, 500 to test on
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.records < 0 or self.seed < 0:
            raise TaskError(f"{self.name}: records={self.records} and seed={self.seed} must not be negative")

    def __len__(self) -> int:
        return self.records or (MILLION if self.split == "train" else 500)

    def compose(self, generator: np.random.Generator) -> Any:
        """A scene of either split: all that a record shows and asks. It is not changed afterwards."""
        raise NotImplementedError

    def key(self, scene: Any) -> str:
        """What is held out: scenes with equal keys are in the same split."""
        raise NotImplementedError

    def scene(self, index: int) -> Any:
        """The scene of a record."""
        return _scene(self, int(index))


@functools.lru_cache(maxsize=64)
def _scene(task: Endless, index: int) -> Any:
    """Question, media, answer and score of a record all start from its scene, so the last ones are kept."""
    generator = task.generator(index, task.seed)
    while True:
        scene = task.compose(generator)
        if held_out(f"{task.name} {task.key(scene)}") == (task.split == "test"):
            return scene


def held_out(key: str, share: int = TEST_SHARE) -> bool:
    """Whether the test split has this combination, by its hash: one in `share` is."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[-4:]) % share == 0


def make_task(spec: str) -> Task:
    """A task from `name:split[:option=value,...]`, as in "digits:train:size=56,variants=4"."""
    name, _, rest = spec.partition(":")
    split, _, options = rest.partition(":")
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise TaskError(f"no task {name!r} in {spec!r}; did you mean {nearest!r}? There are: {', '.join(TASKS)}")
    if not split:
        raise TaskError(f"task {spec!r} names no split; write {name}:train or {name}:test")
    # Imported when asked for: some of the tasks need libraries of the extra `demo`.
    module = importlib.import_module(f"k25_jax.data.tasks.{TASKS[name]}")
    task = getattr(module, name.capitalize())
    return from_dict(task, {"split": split} | _options(spec, options), where=f"task {spec!r}")


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
