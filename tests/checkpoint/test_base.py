"""The tiny model that comes with the package: small, complete, and able to read."""

import json

import numpy as np

from k25_jax.checkpoint.load import BASE, load_model
from k25_jax.data.tasks import make_task
from k25_jax.evals.core import accuracy, evaluate
from k25_jax.sampling.sample import Sampler


def test_the_base_model_is_small_and_says_where_it_comes_from():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 10e6
    origin = json.loads((BASE / "origin.json").read_text())
    assert origin["command"] == "make base" and origin["revision"]
    assert list(origin["stages"]) == ["small", "vit", "llm", "projector", "joint", "long"]
    assert all(stage["train"]["seed"] == 0 for stage in origin["stages"].values())


def test_the_base_model_reads_digits_and_has_the_context_of_its_last_stage():
    model = load_model("base")
    assert model.config.text.max_length == 1024 and model.config.text.rope.factor == 4
    task = make_task("digits:test")
    indices = np.linspace(0, len(task) - 1, 32).astype(int).tolist()
    results = evaluate(Sampler(model.params, model.config), model.tokenizer, task, indices)
    assert accuracy(results) > 0.7
