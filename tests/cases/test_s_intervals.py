"""Intervals of scores: right where all answers are wrong or right, and where questions are asked several times."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from answerers import Sums
from k25_jax.evals.protocol import Result
from k25_jax.evals.summary import as_markdown, interval, summarise


def results(scores_QK):
    return [Result(q, "", "", float(x), k) for q, scores in enumerate(scores_QK) for k, x in enumerate(scores)]


@pytest.mark.parametrize("questions", [1, 2, 8, 50, 1000])
def test_single_samples_have_wilsons_interval(questions):
    """As scipy has it, at every count and so at the ends."""
    for right in {0, 1, questions // 2, questions - 1, questions}:
        wanted = binomtest(right, questions).proportion_ci(0.95, method="wilson")
        found = interval(np.repeat([1.0, 0.0], [right, questions - right]))
        assert found == pytest.approx((wanted.low, wanted.high), abs=1e-6)
        assert 0 <= found[0] <= right / questions <= found[1] <= 1


def test_none_right_is_not_certain_in_any_place_that_shows_it():
    score = summarise(Sums(8), results(np.zeros((8, 1))))
    assert score.low == 0 and score.high == pytest.approx(0.3244, abs=1e-3)
    assert "0.000–0.324" in as_markdown([score])
    score = summarise(Sums(8), results(np.ones((8, 5))))  # five samples that agree tell no more than one
    assert (
        score.high == 1 and score.low == pytest.approx(1 - 0.3244, abs=1e-3) and "0.676–1.000" in as_markdown([score])
    )


@pytest.mark.parametrize(("rate", "samples", "alike"), [
    (0.05, 1, None), (0.5, 1, None), (0.5, 8, None), (0.3, 8, 1.0), (0.9, 8, 1.0), (0.3, 8, 5.0), (0.05, 4, 5.0),
    (0.97, 1, None),
])  # fmt: skip
@pytest.mark.parametrize("questions", [8, 40])
def test_the_interval_covers(rate, samples, alike, questions):
    """Questions of the same difficulty (None) or of one drawn from a beta law, asked several times."""
    generator, covered, times = np.random.default_rng(0), 0, 1000
    for _ in range(times):
        rates_Q = (
            np.full(questions, rate) if alike is None else generator.beta(rate * alike, (1 - rate) * alike, questions)
        )
        low, high = interval(generator.binomial(samples, rates_Q) / samples)
        covered += low <= rate <= high
    assert covered / times > 0.89, covered


def test_it_is_the_normal_interval_of_many_questions():
    generator = np.random.default_rng(0)
    for means in (generator.binomial(1, 0.4, 5000), generator.beta(2, 3, 5000), generator.binomial(4, 0.6, 5000) / 4):
        error = 1.959964 * means.std() / math.sqrt(len(means))
        assert interval(means) == pytest.approx((means.mean() - error, means.mean() + error), abs=error * 0.05)


def test_few_questions_that_happen_to_agree_are_not_certain():
    low, high = interval(np.full(6, 0.5))
    assert low < 0.35 and high > 0.65
    assert all(map(math.isnan, interval(np.array([]))))
