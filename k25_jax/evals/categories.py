"""A model's scores in every category of rendered tasks, held-out questions only (K2.5 §3.3, §4).

A suite is a list of task specs. Each task is asked the same evenly spaced questions of its test split, whatever the model;
a category's score is the mean over its tasks.
"""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from k25_jax.checkpoint.load import Model, load_model
from k25_jax.checkpoint.store import complete_steps
from k25_jax.config import ConfigError
from k25_jax.data.tasks import PROGRAMMED, TASKS, make_task
from k25_jax.evals.core import evaluate
from k25_jax.sampling.sample import Sampler

FILE = "evals.json"
APART = ("library", "passkey", *PROGRAMMED)  # nothing to ask, another length, other means
SUITE = tuple(f"{name}:test" for name in TASKS if name not in APART)


@dataclass(frozen=True)
class Score:
    """Of one task: mean score, its standard error, the number of questions, and the score of the commonest answer."""

    spec: str
    category: str
    score: float
    error: float
    questions: int
    guessing: float


def check_suite(specs: Sequence[str]) -> None:
    """Raise ConfigError for a spec that is no held-out task."""
    for spec in specs:
        task = make_task(spec)
        if task.split != "test":
            raise ConfigError(f"{spec} is of the split {task.split!r}; evaluate held-out questions, {task.name}:test")


def evaluate_suite(
    model: Model, specs: Sequence[str], questions: int, on_progress: Callable[[str, int], None] | None = None
) -> list[Score]:
    """Greedy answers to `questions` of each task; `on_progress(spec, number)` after each batch of them."""
    check_suite(specs)
    sampler, scores = Sampler(model.params, model.config), []
    for spec in specs:
        task = make_task(spec)
        indices = np.unique(np.linspace(0, len(task) - 1, min(questions, len(task))).astype(int)).tolist()
        golds = [task.answer(i) for i in indices]
        report = (lambda number, spec=spec: on_progress(spec, number)) if on_progress else None
        results = evaluate(sampler, model.tokenizer, task, indices, max_tokens=task.longest + 4, on_progress=report)
        scored = np.array([result.score for result in results])
        commonest = max(sorted(set(golds)), key=golds.count)
        guessing = float(np.mean([task.score(commonest, i) for i in indices]))
        error = float(scored.std(ddof=1) / math.sqrt(len(scored))) if len(scored) > 1 else 0.0
        scores.append(Score(spec, task.category, float(scored.mean()), error, len(scored), guessing))
    return scores


def by_category(scores: Sequence[Score], field: str = "score") -> dict[str, float]:
    """The mean of `field` over the tasks of each category, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for score in scores:
        groups.setdefault(score.category, []).append(getattr(score, field))
    return {category: float(np.mean(values)) for category, values in groups.items()}


def evaluate_run(run: pathlib.Path, specs: Sequence[str], questions: int, on_progress=None) -> list[Score]:
    """`evaluate_suite` of a run's last checkpoint, kept beside it in evals.json and read from there the next time."""
    file, key = run / FILE, {"step": max(complete_steps(run / "checkpoints"), default=0), "questions": questions}
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["of"] == key and [score["spec"] for score in kept["scores"]] == list(specs):
            return [Score(**score) for score in kept["scores"]]
    scores = evaluate_suite(load_model(run), specs, questions, on_progress)
    write_scores(file, scores, key)
    return scores


def write_scores(file: pathlib.Path, scores: Sequence[Score], of: dict) -> None:
    """Scores as JSON, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"of": of, "scores": [asdict(score) for score in scores]}, indent=1) + "\n")
    temporary.replace(file)
