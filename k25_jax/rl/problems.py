"""The problems of a run: which there are, which are worth asking, and which one comes when (K2.5 §3.5)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.config import ConfigError, ProblemsConfig, RLConfig
from k25_jax.data.tasks import Task, make_task
from k25_jax.rl.toggle import budget

MARGIN = 1e-9  # shares are quotients


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Record `index` of a task, and how it is asked; `key` tells it from all others of the run."""

    key: str
    task: Task
    index: int
    config: ProblemsConfig

    @property
    def ability(self) -> str:
        """What it trains: knowledge, reasoning, coding or agentic."""
        return self.config.ability


def problems_of(config: RLConfig) -> list[Problem]:
    """All problems that a run may ask; raises ConfigError where a task has fewer, or two entries the same."""
    found: dict[str, Problem] = {}
    for entry in config.problems:
        task = make_task(entry.path)
        if entry.first + entry.records > len(task):
            raise ConfigError(
                f"rl.problems: {entry.path} has {len(task)} records, not the {entry.first + entry.records} of "
                f"first={entry.first} and records={entry.records}; lower one of them"
            )
        for index in range(entry.first, entry.first + entry.records):
            key = f"{entry.path}/{index}" + f"/{entry.tool}" * bool(entry.tool)
            if key in found:
                raise ConfigError(f"rl.problems: {key} is there twice; set `first` of one of the two")
            found[key] = Problem(key, task, index, entry)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the start model made of a problem: the lengths of its answers, and which of them were correct."""

    lengths: Sequence[int]
    correct: Sequence[bool]

    @property
    def pass_rate(self) -> float:
        """The share of correct answers; 0 where none could be scored."""
        return float(np.mean(self.correct)) if len(self.correct) else 0.0

    def budget(self, percentile: float) -> float:
        """Toggle's, in tokens; infinite where none was correct."""
        return budget(self.lengths, self.correct, percentile)


def worth_asking(problems: Sequence[Problem], estimates: Mapping[str, Estimate], config: RLConfig) -> list[Problem]:
    """Those that the start model passes at least at rl.pass_low and at most at rl.pass_high; ConfigError for none."""
    low, high = config.pass_low - MARGIN, config.pass_high + MARGIN
    kept = [problem for problem in problems if low <= estimates[problem.key].pass_rate <= high]
    if not kept:
        rates = [estimates[problem.key].pass_rate for problem in problems]
        raise ConfigError(
            f"rl.problems: the start model passes none of {len(problems)} problems at a rate from rl.pass_low="
            f"{config.pass_low} to rl.pass_high={config.pass_high} ({np.mean(np.asarray(rates) < low):.0%} of them are too "
            f"hard, {np.mean(np.asarray(rates) > high):.0%} too easy, by {config.estimate} answers each); choose other "
            "tasks, give them more records, or start from another model"
        )
    return kept


def asked_in(batch: int, problems: Sequence[Problem], groups: int, seed: int) -> list[Problem]:
    """The problems of a batch, numbered from 0: an endless order in which each comes once an epoch, shuffled anew."""
    out = []
    for place in range(batch * groups, (batch + 1) * groups):
        epoch, number = divmod(place, len(problems))
        out.append(problems[np.random.default_rng([seed, epoch]).permutation(len(problems))[number]])
    return out
