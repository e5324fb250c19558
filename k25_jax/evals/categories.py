"""A model's scores in every category of rendered tasks, held-out questions only (K2.5 §3.3, §4).

A suite is a list of task specs. Each task is asked the same evenly spaced questions of its test split, whatever the model;
a category's score is the mean over its tasks.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from k25_jax.checkpoint.store import complete_steps
from k25_jax.config import ConfigError
from k25_jax.data.tasks import PROGRAMMED, TASKS, Task, make_task
from k25_jax.evals.core import evaluate, spaced
from k25_jax.evals.local import open_checkpoint
from k25_jax.evals.protocol import Answerer, Settings, digest_of
from k25_jax.evals.summary import Score, summarise, write_scores

FILE = "evals.json"
APART = ("library", "lookups", "passkey", *PROGRAMMED)  # nothing to ask, or no tool; another length; other means
SUITE = tuple(f"{name}:test" for name in TASKS if name not in APART)
GREEDY = Settings(temperature=0.0, score_cut=True)  # the length of an answer is set by `Rendered.longest`


class Rendered:
    """A rendered task (data/tasks) as a `TaskSet`; its questions are the same for every seed."""

    def __init__(self, task: Task, spec: str = ""):
        self.task, self.name, self.category = task, spec or f"{task.name}:{task.split}", task.category
        self.max_tokens = task.longest + 4

    def __len__(self) -> int:
        return len(self.task)

    def digest(self) -> str:
        """Of the task's options, and of what it asks and wants to hear in eight places."""
        places = np.linspace(0, len(self) - 1, min(8, len(self))).astype(int).tolist()
        return digest_of(repr(self.task), [(self.task.question(i), self.task.answer(i)) for i in places])

    def prompt(self, index: int, seed: int) -> list[dict]:
        """The task's."""
        return self.task.prompt(index)

    def gold(self, index: int, seed: int) -> str:
        """The task's answer."""
        return self.task.answer(index)

    def group(self, index: int) -> str:
        """None: the categories are for that."""
        return ""

    def score(self, text: str, index: int, seed: int) -> float:
        """The task's."""
        return self.task.score(text, index)

    def guessing(self, indices: Sequence[int]) -> float:
        """The score of always giving the commonest answer to these questions."""
        golds = [self.task.answer(i) for i in indices]
        commonest = max(sorted(set(golds)), key=golds.count)
        return float(np.mean([self.task.score(commonest, i) for i in indices]))

    def validate(self):
        """See `data.tasks.Task.validate`."""
        self.task.validate()


def check_suite(specs: Sequence[str]) -> None:
    """Raise ConfigError for a spec that is no held-out task."""
    for spec in specs:
        task = make_task(spec)
        if task.split != "test":
            raise ConfigError(f"{spec} is of the split {task.split!r}; evaluate held-out questions, {task.name}:test")


def evaluate_suite(
    answerer: Answerer,
    specs: Sequence[str],
    questions: int,
    settings: Settings = GREEDY,
    folder: pathlib.Path | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> list[Score]:
    """Ask `questions` of each task; `folder` keeps every answer, a file a task.

    `on_progress(spec, number)` hears of answers. The settings' `max_tokens` is replaced by what the task's answers need.
    """
    check_suite(specs)
    scores = []
    for spec in specs:
        task = Rendered(make_task(spec), spec)
        report = (lambda number, spec=spec: on_progress(spec, number)) if on_progress else None
        file = folder / f"{result_name(spec)}.jsonl" if folder else None
        asked = dataclasses.replace(settings, max_tokens=task.max_tokens)
        results = evaluate(answerer, task, asked, spaced(task, questions), file, report)
        scores.append(summarise(task, results, spec))
    return scores


def result_name(spec: str) -> str:
    """A spec as the name of a file."""
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in spec)


def evaluate_run(run: pathlib.Path, specs: Sequence[str], questions: int, on_progress=None) -> list[Score]:
    """`evaluate_suite` of a run's last checkpoint; the answers are kept beside it, and only asked for once."""
    step = max(complete_steps(run / "checkpoints"), default=0)
    scores = evaluate_suite(open_checkpoint(run), specs, questions, GREEDY, run / "evals" / str(step), on_progress)
    write_scores(run / FILE, scores, {"step": step, "questions": questions})
    return scores
