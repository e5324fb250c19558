"""Evaluation (K2.5 §4): questions, several samples of each, scores, and a file that remembers them.

An answer that runs into a limit is a failure; what fails on the way to a model, such as a lost connection, is counted
apart from wrong answers.
"""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from k25_jax.evals.protocol import Answer, Answerer, Request, Result, Settings, TaskSet, sample_seed
from k25_jax.evals.results import FORMAT, ResultFile


def spaced(task: TaskSet, questions: int) -> list[int]:
    """Indices of `questions` evenly spaced questions; of all, when there are no more, or for 0."""
    number = len(task)
    return np.unique(np.linspace(0, number - 1, min(questions or number, number)).astype(int)).tolist()


def evaluate(
    answerer: Answerer,
    task: TaskSet,
    settings: Settings,
    indices: Sequence[int],
    file: pathlib.Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Ask `settings.k` times each question at `indices`; results in that order, sample by sample.

    With a `file`, every sample is a line of it as soon as it is scored, and is not asked again; samples that ended in an
    error are. `on_progress(number)` hears of finished samples, of those in the file at once.
    """
    wanted = [(index, sample) for index in indices for sample in range(settings.k)]  # samples share their prompt
    of = {"answerer": dict(answerer.identity), "task": {"name": task.name, "digest": task.digest()}}
    asked = asdict(settings)
    asked.pop("k")  # more samples, or more questions, go on from those that are there
    with contextlib.ExitStack() as stack:
        kept, write = {}, None
        if file is not None:
            kept_file = stack.enter_context(ResultFile(file, {"format": FORMAT, **of, "settings": asked}))
            kept, write = kept_file.finished, kept_file.add
        results = {place: kept[place] for place in wanted if place in kept}
        missing = [place for place in wanted if place not in results]
        if on_progress and results:
            on_progress(len(results))
        seeds = [sample_seed(settings.seed, *place) for place in missing]
        requests = (Request(task.prompt(i, s), s, settings) for (i, _), s in zip(missing, seeds, strict=True))
        for number, answer in answerer.answer(requests) if missing else ():
            (index, sample), seed = missing[number], seeds[number]
            result = _scored(task, settings, index, sample, seed, answer)
            if write:
                write(result)
            results[index, sample] = result
            if on_progress:
                on_progress(1)
    return [results[place] for place in wanted]


def _scored(task: TaskSet, settings: Settings, index: int, sample: int, seed: int, answer: Answer) -> Result:
    failed = answer.finish in ("error", "overflow") or (answer.finish == "length" and not settings.score_cut)
    score = 0.0 if failed else task.score(answer.text, index, seed)
    gold = task.gold(index, seed)
    return Result(index, answer.text, gold, score, sample, answer.tokens, answer.finish, answer.retries, answer.error)


def accuracy(results: Sequence[Result]) -> float:
    """Mean score of the samples that were answered."""
    scores = [result.score for result in results if result.finish != "error"]
    return sum(scores) / max(len(scores), 1)
