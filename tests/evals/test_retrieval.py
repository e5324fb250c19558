"""Passkey retrieval: what counts as given back against greedy decoding, the bins of depth, the figure."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from k25_jax.checkpoint.load import Model
from k25_jax.config import preset
from k25_jax.data.tasks import make_task
from k25_jax.evals import passkey
from k25_jax.evals.categories import GREEDY, Rendered
from k25_jax.evals.core import evaluate
from k25_jax.evals.local import Checkpoint
from k25_jax.evals.passkey import Found, by_depth, retrieval
from k25_jax.models.k25 import init_params
from k25_jax.report.retrieval import retrieval_figure
from k25_jax.text.tokenizer import load_tokenizer


def test_it_is_what_greedy_decoding_gives():
    """Of fresh weights, of whose answers few are right: a task of their own answers, half of them spoilt."""
    config, tokenizer = preset("tiny"), load_tokenizer("")
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    task = make_task("passkey:test:length=64,digits=1")
    answerer = Checkpoint(lambda: Model(params, config, tokenizer), {})
    said = [r.answer for r in evaluate(answerer, Rendered(task), dataclasses.replace(GREEDY, max_tokens=2), range(6))]
    assert not any(found.right for found in retrieval(params, config, tokenizer, task, range(6)))
    assert all(answer != task.answer(i) for i, answer in enumerate(said))


@pytest.mark.parametrize("wrong", [set(), {1}, {0, 2}])
def test_all_of_a_passkey_must_come_back(monkeypatch, wrong):
    """A model that knows the answers but for one token of some."""
    task = make_task("passkey:test:length=80")

    def likeliest(params, rows, config):
        out = np.array(rows.targets_BL)
        for row in wrong:
            asked = np.flatnonzero(rows.loss_weights_BL[row] > 0)
            out[row, asked[row % len(asked)]] += 1
        out[rows.loss_weights_BL == 0] = -1  # nobody asks
        return out

    monkeypatch.setattr(passkey, "_likeliest", likeliest)
    found = retrieval({}, preset("tiny"), load_tokenizer(""), task, range(3), batch=4)
    assert [f.right for f in found] == [row not in wrong for row in range(3)]
    assert [f.depth for f in found] == [task.depth(i) for i in range(3)]


def test_bins_of_depth():
    found = [Found(0.0, True), Found(0.1, False), Found(0.5, True), Found(1.0, True), Found(0.99, True)]
    shares = by_depth(found, 4)
    assert shares[0] == 0.5 and np.isnan(shares[1]) and shares[2:] == [1.0, 1.0]


def test_the_figure_is_a_png():
    shares = np.array([[1.0, 0.5], [0.0, np.nan]])
    png = retrieval_figure({"before": [1, 0.2], "after": [1, 0.9]}, {"before": shares}, (128, 256), 128, "Retrieval")
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and min(image.size) > 300
