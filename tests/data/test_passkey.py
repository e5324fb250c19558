"""The passkey task: length in tokens, what is said and where, two splits that share no passkey."""

import re

import numpy as np
import pytest

from k25_jax.data.tasks import TaskError, make_task
from k25_jax.text.chat import render
from k25_jax.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("length, digits", [(128, 3), (77, 1), (1024, 5)])
def test_a_document_has_its_length_and_says_its_passkey_once(length, digits):
    tokenizer = load_tokenizer("")
    for split in ("train", "test"):
        task = make_task(f"passkey:{split}:length={length},digits={digits}")
        task.validate(16)
        for index in range(40):
            rendered = render(task.record(index)["messages"], tokenizer)
            assert len(rendered.tokens) == length and sum(rendered.weights) == digits + 1
            (said,) = re.findall(r"\d+", task.question(index))
            assert said == task.answer(index) and len(said) == digits
            place = task.question(index).index(f" key: {said}")
            assert task.depth(index) == pytest.approx(place / (length - 30 - 2 * digits))
            assert task.question(index).endswith(" key?") and task.prompt(index) == task.record(index)["messages"][:1]


def test_lengths_are_drawn_evenly_from_the_shortest_to_the_longest():
    tokenizer, task = load_tokenizer(""), make_task("passkey:train:length=120,shortest=61")
    lengths = [len(render(task.record(index)["messages"], tokenizer).tokens) for index in range(600)]
    assert (min(lengths), max(lengths)) == (61, 120)
    counts = np.histogram(lengths, bins=6, range=(61, 121))[0]
    assert counts.min() > 70 and counts.max() < 130
    assert 0 <= min(task.depth(index) for index in range(600)) and max(task.depth(index) for index in range(600)) <= 1


def test_splits_share_no_passkey_and_seeds_differ():
    train, test = (make_task(f"passkey:{split}") for split in ("train", "test"))
    answers = [{task.answer(i) for i in range(500)} for task in (train, test)]
    assert not answers[0] & answers[1] and min(map(len, answers)) > 100
    assert train.record(3) == make_task("passkey:train").record(3) != make_task("passkey:train:seed=1").record(3)
    assert (len(train), len(test), len(make_task("passkey:test:records=7"))) == (1_000_000, 500, 7)


def test_depths_are_spread_evenly():
    task = make_task("passkey:test:length=512")
    depths = np.array([task.depth(i) for i in range(500)])
    counts = np.histogram(depths, bins=5, range=(0, 1))[0]
    assert counts.min() > 70 and counts.max() < 130


@pytest.mark.parametrize("options, words", [
    ("length=20", "length=20 and shortest=0 must be at least 52"), ("digits=0", "digits=0"), ("digits=6", "digits=6"),
    ("shortest=20", "shortest=20 must be at least 52"), ("shortest=129", "shortest=129 must be at least 0 and at most 128"),
    ("lenght=9", "did you mean 'length'"),
])  # fmt: skip
def test_options_that_cannot_be_are_named(options, words):
    with pytest.raises((TaskError, ValueError), match=words):
        make_task(f"passkey:train:{options}")
