"""Weights that change while answers are under way: whose a token is, and whose a page of latents. RL needs both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drawn import random_params
from engines import CONFIG, PAD, PARAMS, SETTINGS, drain, greedy, logprobs
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import Completion, EngineError, Request
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


def changed_under_way(engine, latents: str) -> Completion:
    """An answer of 10 tokens of which some are drawn when the weights change to OTHER, as version 7."""
    answers = {}
    number = engine.submit(Request(PROMPT, (), SampleConfig(10, 0.0)))
    while len(answers.get((number, 0), Completion()).tokens) < 3:
        drain(engine, answers)
    engine.update_weights(OTHER, 7, latents)
    late = engine.submit(Request(PROMPT[:5], (), SampleConfig(2, 0.0)))
    while engine.busy:
        drain(engine, answers)
    assert answers[late, 0].versions == [7] * 2 and answers[late, 0].tokens == greedy([(PROMPT[:5], [])], 2, OTHER)[0]
    return answers[number, 0]


def test_latents_that_are_computed_again_are_of_the_new_weights(engine):
    done = changed_under_way(engine, "recompute")
    old = done.versions.count(0)
    assert 3 <= old < 10 and done.versions == [0] * old + [7] * (10 - old)
    (judged,) = logprobs([(PROMPT + done.tokens, [])], OTHER)
    places = np.arange(len(PROMPT) - 1, len(PROMPT) + 9)
    off = np.abs(judged[places, done.tokens] - done.logprobs)
    assert off[old:].max() < 1e-4 and off[:old].min() > 1e-3, off
    assert off[old:].max() < np.abs(off_of_kept(engine)).max()


def off_of_kept(engine) -> np.ndarray:
    """How far tokens after the change are from the new weights when latents are kept: they are not of these alone."""
    engine.update_weights(PARAMS, 0)
    done = changed_under_way(engine, "keep")
    (judged,) = logprobs([(PROMPT + done.tokens, [])], OTHER)
    places = np.arange(len(PROMPT) - 1, len(PROMPT) + 9)
    return (judged[places, done.tokens] - done.logprobs)[done.versions.count(0) :]


def test_answers_are_drained_with_the_weights_that_they_began_with(engine):
    done = changed_under_way(engine, "drain")
    assert done.versions == [0] * 10 and done.tokens == greedy([(PROMPT, [])], 10)[0]
    assert engine.stats()["version"] == 7
    engine.update_weights(PARAMS, 8, "drain")
    assert engine.stats()["version"] == 8, "nothing was under way"


def test_answers_that_were_put_off_are_drained_too(engine):
    """Pages run out meanwhile: who leaves comes back before the weights change, and who has not begun does not."""
    answers, numbers = {}, [engine.submit(Request(PROMPT[:9], (), SampleConfig(20, 0.0))) for _ in range(3)]
    while not all(len(answers.get((number, 0), Completion()).tokens) for number in numbers):
        drain(engine, answers)
    before = engine.stats()["preempted"]
    engine.update_weights(OTHER, 7, "drain")
    while engine.busy:
        drain(engine, answers)
    assert engine.stats()["preempted"] > before
    assert all(answers[number, 0].versions == [0] * 20 for number in numbers)


def test_another_word_for_latents_is_refused(engine):
    with pytest.raises(EngineError, match="keep, recompute, drain"):
        engine.update_weights(OTHER, 1, "forget")


def test_the_engine_has_a_copy_of_weights_that_are_given_away(engine):
    """The trainer's step takes its parameters' memory over."""
    own = jax.tree.map(lambda a: jnp.array(a, copy=True), OTHER)
    engine.update_weights(own, 3)
    jax.tree.map(lambda a: a.delete(), own)
    assert answered(engine, PROMPT, 6).tokens == greedy([(PROMPT, [])], 6, OTHER)[0]
