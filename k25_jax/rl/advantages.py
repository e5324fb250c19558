"""How much better a trace was than the others of its group: A = r - mean r (K2.5 §3.5).

Neither divided by the standard deviation nor by lengths. Traces that did not end by what the model did are left out
of the mean; those that were cut count with what they were worth.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.agents.trace import Trace
from k25_jax.config import ConfigError, RLConfig
from k25_jax.rl.toggle import toggled

LEAST = 2  # valid traces that a group must have: the mean of one is itself


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The samples of one problem. `task` and `ability` are what metrics are reported by, `budget` is Toggle's, in tokens."""

    problem: str
    task: str
    ability: str
    budget: float
    traces: Sequence[Trace]

    @property
    def valid(self) -> list[Trace]:
        """The traces that are scored and trained on."""
        return [trace for trace in self.traces if trace.valid]

    @property
    def kept(self) -> bool:
        """Whether it can be learnt from."""
        return len(self.valid) >= LEAST


def composed(rewards: Mapping[str, float], weights: Sequence[tuple[str, float]]) -> float:
    """The reward that is trained on: the weighted sum of a trace's components; those that it lacks are 0.

    Raises ConfigError for a component without a weight.
    """
    known = dict(weights)
    if unknown := sorted(set(rewards) - set(known)):
        raise ConfigError(
            f"rl.rewards={tuple(weights)} gives the component {unknown[0]!r} no weight; add ({unknown[0]!r}, 0.0) to leave "
            "it out, or another number"
        )
    return float(sum(weight * rewards.get(name, 0.0) for name, weight in weights))


def rewards_of(group: Group, config: RLConfig) -> np.ndarray:
    """The rewards of the valid traces before Toggle, float64."""
    return np.asarray([composed(trace.rewards, config.rewards) for trace in group.valid], np.float64)


def advantages(group: Group, update: int, config: RLConfig) -> np.ndarray:
    """A of each valid trace at update `update`, float64; their sum is 0."""
    lengths = [trace.length for trace in group.valid]
    rewards = toggled(rewards_of(group, config), lengths, group.budget, update, config.toggle)
    return rewards - rewards.mean()


def unequal(advantages: np.ndarray) -> bool:
    """Whether there is anything to learn from a group: rewards that differ, beyond the rounding of their mean."""
    return bool(np.abs(advantages).max(initial=0.0) > 1e-9)
