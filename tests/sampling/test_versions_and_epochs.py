"""Weights that change while answers are under way: whose a token is, and whose a page of latents. RL needs both."""

import numpy as np
import pytest

from drawn import random_params
from engines import CONFIG, PAD, PARAMS, SETTINGS, drain, greedy, logprobs
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import Completion, Request
from k25_jax.sampling.sample import SampleConfig

OTHER = random_params(CONFIG, seed=2, std=0.25)
PROMPT = np.random.default_rng(8).integers(1, 49, 14).tolist()  # three full pages of 4, and 2


@pytest.fixture(scope="module")
def warm():
    engine = Engine(PARAMS, CONFIG, SETTINGS)
    engine.warm_up()
    return engine


@pytest.fixture
def engine(warm):
    """The engine with the weights PARAMS, and nothing kept."""
    warm.update_weights(PARAMS, 0)
    return warm


def answered(engine, tokens, count: int) -> Completion:
    (sample,) = engine.generate([Request(tokens, (), SampleConfig(count, 0.0))])[0]
    return sample


def test_a_token_carries_the_version_that_drew_it_also_when_it_is_read_later(engine):
    """The step in flight when weights change is of the old ones, whose log-probability it has."""
    answers = {}
    number = engine.submit(Request(PROMPT, (), SampleConfig(10, 0.0)))
    while len(answers.get((number, 0), Completion()).tokens) < 3:
        drain(engine, answers)
    before = len(answers[number, 0].tokens)
    engine.update_weights(OTHER, 7)
    while engine.busy:
        drain(engine, answers)
    done = answers[number, 0]
    old = done.versions.count(0)
    assert done.versions == [0] * old + [7] * (10 - old)
    assert old > before, "a token was under way"
    (judged,) = logprobs([(PROMPT + done.tokens, [])])
    places = np.arange(len(PROMPT) - 1, len(PROMPT) + 9)
    off = np.abs(judged[places, done.tokens] - done.logprobs)
    assert off[:old].max() < 1e-4 and off[old:].min() > 1e-3, off


def test_pages_that_old_weights_have_filled_in_part_are_found_by_nobody(engine):
    """An answer goes on over new weights, from latents of the old ones. Who begins as it did must not get its pages."""
    answers = {}
    number = engine.submit(Request(PROMPT, (), SampleConfig(20, 0.0)))
    while len(answers.get((number, 0), Completion()).tokens) < 3:
        drain(engine, answers)
    engine.update_weights(OTHER, 7)
    while engine.busy:
        drain(engine, answers)
    whole = PROMPT + answers[number, 0].tokens
    assert PAD not in whole
    answered(engine, whole[:21], 1)  # beyond the pages that were full when weights changed, by the new weights
    before = engine.stats()["reused"]
    sample = answered(engine, whole, 4)
    assert engine.stats()["reused"] - before == 20
    assert sample.tokens == greedy([(whole, [])], 4, OTHER)[0]
    (judged,) = logprobs([(whole + sample.tokens, [])], OTHER)
    places = np.arange(len(whole) - 1, len(whole) + 3)
    np.testing.assert_allclose(sample.logprobs, judged[places, sample.tokens], atol=1e-4)


def test_nothing_that_was_kept_outlives_the_weights(engine):
    """The same prompt before, under and after other weights: each time the answer of the weights of the time."""
    first, again = answered(engine, PROMPT, 6), answered(engine, PROMPT, 6)
    assert again.tokens == first.tokens and engine.stats()["pages_kept"] > 0
    engine.update_weights(OTHER, 1)
    assert engine.stats()["pages_kept"] == 0
    assert answered(engine, PROMPT, 6).tokens == greedy([(PROMPT, [])], 6, OTHER)[0] != first.tokens
    engine.update_weights(PARAMS, 2)
    last = answered(engine, PROMPT, 6)
    assert last.tokens == first.tokens and last.versions == [2] * 6
