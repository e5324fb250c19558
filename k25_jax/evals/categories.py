"""A model's scores in every category of rendered tasks, held-out questions only (K2.5 §3.3, §4).

A suite is a list of task specs. Each task is asked the same evenly spaced questions of its test split, whatever the model;
a category's score is the mean over its tasks.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from k25_jax.checkpoint.folders import complete_steps
from k25_jax.data.tasks import PROGRAMMED, TASKS, Task, make_task
from k25_jax.evals.core import evaluate, spaced
from k25_jax.evals.episodes import TURN_TOKENS, Player, check_playable, why_not
from k25_jax.evals.local import open_checkpoint
from k25_jax.evals.protocol import Answerer, Settings, digest_of
from k25_jax.evals.suite import check_suite
from k25_jax.evals.summary import Score, summarise, write_scores
from k25_jax.runtime.paths import AnyPath

logger = logging.getLogger(__name__)

FILE = "evals.json"
APART = ("library", "lookups", "passkey")  # nothing to ask, or no tool; another length
SUITE = tuple(f"{name}:test" for name in TASKS if name not in APART)
GREEDY = Settings(temperature=0.0, score_cut=True)  # the length of an answer is set by `Rendered.longest`


class Rendered:
    """A rendered task (data/tasks) as a `TaskSet`; its questions are the same for every seed."""

    def __init__(self, task: Task, spec: str = ""):
        self.task, self.name, self.category = task, spec or f"{task.name}:{task.split}", task.category
        self.played = task.name in PROGRAMMED  # with the tool `ipython`: see evals/episodes.py
        self.max_tokens = TURN_TOKENS if self.played else task.longest + 4

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


def evaluate_suite(
    answerer: Answerer,
    specs: Sequence[str],
    questions: int,
    settings: Settings = GREEDY,
    folder: AnyPath | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> list[Score]:
    """Ask `questions` of each task; `folder` keeps every answer, a file a task. Tasks PROGRAMMED are played in a sandbox.

    `on_progress(spec, number)` hears of answers. The settings' `max_tokens` is replaced by what the task's answers need.
    """
    check_suite(specs)
    tasks = [Rendered(make_task(spec), spec) for spec in specs]
    check_playable(answerer, (task.name for task in tasks if task.played))
    scores = []
    with contextlib.ExitStack() as stack:
        player = stack.enter_context(Player(answerer)) if any(task.played for task in tasks) else None
        for task in tasks:
            report = (lambda number, spec=task.name: on_progress(spec, number)) if on_progress else None
            file = folder / f"{result_name(task.name)}.jsonl" if folder else None
            asked = dataclasses.replace(settings, max_tokens=task.max_tokens)
            who = player if task.played else answerer
            results = evaluate(who, task, asked, spaced(task, questions), file, report)
            scores.append(summarise(task, results, task.name))
    return scores


def default_suite(answerer: Answerer) -> tuple[tuple[str, ...], str]:
    """SUITE, as far as it can be asked here; and what is left out, with the reason."""
    played = tuple(f"{name}:test" for name in PROGRAMMED)
    if problem := why_not(answerer):
        return tuple(spec for spec in SUITE if spec not in played), f"tool_use is left out: {problem}"
    return SUITE, ""


def result_name(spec: str) -> str:
    """A spec as the name of a file."""
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in spec)


def evaluate_run(run: AnyPath, specs: Sequence[str] | None, questions: int, on_progress=None) -> list[Score]:
    """`evaluate_suite` of a run's last checkpoint, None: the default suite. Answers are kept, and only asked for once."""
    answerer = open_checkpoint(run)
    if specs is None:
        specs, note = default_suite(answerer)
        if note:
            logger.warning(note)
    step = max(complete_steps(run / "checkpoints"), default=0)
    scores = evaluate_suite(answerer, specs, questions, GREEDY, run / "evals" / str(step), on_progress)
    write_scores(run / FILE, scores, {"step": step, "questions": questions})
    return scores
