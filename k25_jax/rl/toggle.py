"""Toggle: phases in which long answers do not count take turns with phases in which they do (K2.5 §3.6).

    r~(x, y) = r(x, y) * 1{ mean_K r(x, .) < solved  or  |y| <= budget(x) }     in a phase 0: floor(t / m) is even
    r~(x, y) = r(x, y)                                                          in a phase 1

t counts the learner's updates: the phase is that of the update, not of the sampling. mean_K r is of the present group, before
Toggle. |y| counts sampled tokens with the end token. A problem's budget is estimated once, from the start model's answers
(rl/start.py), and is infinite where none of those was correct. Two arms show what a budget without phases does.
"""

import math
from collections.abc import Sequence

import numpy as np

from k25_jax.config import ToggleConfig


def nearest_rank(values: Sequence[float], percentile: float) -> float:
    """The smallest of the values which at least `percentile` percent of them do not exceed; infinite where there are none."""
    if not len(values):
        return math.inf
    return sorted(values)[math.ceil(percentile * len(values) / 100) - 1]


def budget(lengths: Sequence[int], correct: Sequence[bool], percentile: float) -> float:
    """The tokens that a problem's answers may take, by the answers of the start model."""
    return nearest_rank([length for length, right in zip(lengths, correct, strict=True) if right], percentile)


def phase(update: int, config: ToggleConfig) -> int:
    """0 where the update counts answers within their budget alone, 1 where it counts all; updates are numbered from 0."""
    return {"none": 1, "toggle": update // config.updates % 2}.get(config.arm, 0)


def toggled(
    rewards: Sequence[float], lengths: Sequence[int], budget: float, update: int, config: ToggleConfig
) -> np.ndarray:
    """The rewards of one group that update `update` learns from, float64 [K]; `budget` is the problem's."""
    rewards, lengths = np.asarray(rewards, np.float64), np.asarray(lengths)
    if phase(update, config) or not len(rewards):
        return rewards
    within = lengths <= (config.budget if config.arm == "constant" else budget)
    unsolved = config.arm == "toggle" and rewards.mean() < config.solved
    return rewards * (within | unsolved)
