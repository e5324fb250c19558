"""Toggle against what its formulas say, computed by hand."""

import itertools
import math

import numpy as np
import pytest

from k25_jax.config import ConfigError, ToggleConfig
from k25_jax.rl.toggle import budget, nearest_rank, phase, toggled

TOGGLE = ToggleConfig(arm="toggle", solved=0.5, updates=3)


def test_a_nearest_rank_is_the_smallest_value_that_covers_so_many():
    rng = np.random.default_rng(0)
    for count, percentile in itertools.product(range(1, 41), (1, 7, 10, 25, 30, 50, 70, 99, 100)):
        values = rng.integers(0, 20, count).tolist()
        covering = [v for v in values if 100 * sum(other <= v for other in values) >= percentile * count]
        assert nearest_rank(values, percentile) == min(covering), (values, percentile)


def test_a_budget_is_of_correct_answers_and_infinite_without_any():
    lengths, correct = [9, 3, 50, 7, 5, 8], [True, False, True, True, False, True]
    assert budget(lengths, correct, 25) == 7  # of 7, 8, 9, 50
    assert budget(lengths, correct, 26) == 8
    assert budget(lengths, correct, 100) == 50
    assert budget(lengths, [False] * 6, 25) == math.inf == budget([], [], 25)


def test_the_phase_is_that_of_the_update():
    assert [phase(t, TOGGLE) for t in range(13)] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    assert {phase(t, ToggleConfig()) for t in range(9)} == {1}
    for arm in (ToggleConfig(arm="rigid"), ToggleConfig(arm="constant", budget=4)):
        assert {phase(t, arm) for t in range(20)} == {0}


def expected(arm: str, rewards, lengths, limit, update, solved=0.5, m=3, constant=4):
    """The formulas of the paper and its arms, one answer at a time."""
    mean, out = sum(rewards) / len(rewards), []
    for reward, length in zip(rewards, lengths, strict=True):
        counts = {
            "none": True,
            "toggle": (update // m) % 2 == 1 or mean < solved or length <= limit,
            "rigid": length <= limit,
            "constant": length <= constant,
        }[arm]
        out.append(reward if counts else 0.0)
    return out


@pytest.mark.parametrize("arm", ["none", "toggle", "rigid", "constant"])
def test_rewards_are_those_of_the_formula(arm):
    config = ToggleConfig(arm=arm, solved=0.5, updates=3, budget=4 if arm == "constant" else 0)
    for rewards in itertools.product((0.0, 0.25, 1.0), repeat=3):
        for lengths, limit, update in itertools.product(([1, 5, 9], [4, 4, 5]), (3, 4, 5, math.inf), (0, 2, 3, 5, 6)):
            found = toggled(rewards, lengths, limit, update, config)
            assert found.tolist() == expected(arm, rewards, lengths, limit, update), (rewards, lengths, limit, update)


def test_an_unsolved_problem_may_take_any_length_and_a_solved_one_may_not():
    assert toggled([1, 0, 0], [90, 1, 1], 5, 0, TOGGLE).tolist() == [1, 0, 0]
    assert toggled([1, 1, 0], [90, 1, 1], 5, 0, TOGGLE).tolist() == [0, 1, 0]
    assert toggled([1, 0], [90, 1], 5, 0, TOGGLE).tolist() == [0, 0], "a mean of exactly `solved` is solved"
    assert toggled([], [], 5, 0, TOGGLE).tolist() == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(arm="constant"), "rl.toggle.budget=0"),
        (dict(arm="toggle", budget=9), "rl.toggle.budget=9"),
        (dict(percentile=0.0), "percentile=0.0"),
        (dict(solved=1.5), "solved=1.5"),
        (dict(updates=0), "updates=0"),
        (dict(arm="togle"), "did you mean 'toggle'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        ToggleConfig(**fields)
