"""Figures against brute force: pass@k over all subsets, intervals against the normal law, clusters of samples."""

import itertools
import math

import numpy as np
import pytest

from answerers import Sums
from k25_jax.evals.protocol import Result
from k25_jax.evals.summary import (
    Score,
    as_markdown,
    by_category,
    interval,
    pass_at_k,
    row,
    summarise,
)


def results(scores_QK, finish="stop"):
    return [
        Result(q, "", "", float(score), k, tokens=10 * q, finish=finish)
        for q, scores in enumerate(scores_QK)
        for k, score in enumerate(scores)
    ]


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([1] * right + [0] * (samples - right), k))
        assert pass_at_k(samples, right, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))
    for bad in ((samples, samples + 1, 1), (samples, 0, samples + 1), (samples, -1, 1), (samples, 0, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_samples_of_a_question_are_one_cluster():
    """A question asked twenty times is no better known than one asked once, when its samples all agree."""
    values = np.random.default_rng(0).integers(0, 2, 40)
    once = summarise(Sums(40), results(values[:, None]))
    often = summarise(Sums(40), results(np.repeat(values[:, None], 20, axis=1)))
    assert often.score == once.score == values.mean()
    assert often.error == pytest.approx(once.error) == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.k == 20 and often.passed == {n: values.mean() for n in ("1", "2", "4", "8", "16", "20")}


def test_the_interval_is_about_the_normal_one_and_covers():
    generator, covered = np.random.default_rng(1), 0
    for _ in range(50):
        sample = generator.binomial(1, 0.3, 100)
        low, high = interval(sample)
        error = sample.std(ddof=1) / 10
        assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.03)
        assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.03)
        covered += low <= 0.3 <= high
    assert 43 <= covered <= 50
    assert all(math.isnan(bound) for bound in interval(np.array([])))


def test_errors_count_apart_and_limits_are_counted():
    mixed = results([[1, 0], [1, 1]]) + [
        Result(1, "", "", 0.0, 2, finish="error", retries=5, error="503"),
        Result(2, "", "", 0.0, 0, finish="error", retries=5),
        Result(3, "", "", 0.0, 0, tokens=50, finish="length", retries=1),
    ]
    score = summarise(Sums(), mixed, "spec")
    assert score.score == pytest.approx((0.5 + 1 + 0) / 3) and score.questions == 3
    assert (score.failed, score.cut, score.retries) == (2, 1, 11)
    assert score.tokens == pytest.approx((0 + 0 + 10 + 10 + 50) / 5) and score.guessing == 0.25
    assert score.passed == {"1": pytest.approx(0.5), "2": 1.0}  # pass@2 over the questions with two samples
    assert score.groups == {"even": 0.5, "odd": 0.5}
    nothing = summarise(Sums(), [Result(0, "", "", 0.0, finish="error")])
    assert math.isnan(nothing.score) and nothing.failed == 1 and nothing.tokens is None


def test_a_category_is_the_mean_of_its_tasks():
    scores = [Score("a", "ocr", 0.5, 0, 1, 0.1), Score("b", "code", 1.0, 0, 1, 0.2), Score("c", "ocr", 0.0, 0, 1, 0.3)]
    assert by_category(scores) == {"ocr": 0.25, "code": 1.0}
    assert by_category(scores, "guessing") == {"ocr": pytest.approx(0.2), "code": 0.2}


def test_the_table_in_markdown():
    score = summarise(Sums(), results([[1, 0], [1, 1]]), "a|b")
    lines = as_markdown([score]).splitlines()
    assert all(line.count("|") - line.count("\\|") == len(row(score)) + 1 for line in lines[:3])
    assert "a\\|b" in lines[2] and "0.750" in lines[2] and "1.000 @2" in lines[2] and "2 × 2" in lines[2]
    assert lines[-2:] == ["| a\\|b | even | 0.500 |", "| a\\|b | odd | 1.000 |"]
