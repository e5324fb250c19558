"""The tiny model that comes with the package: small, complete, and able to read."""

import json

from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.load import load_model
from k25_jax.evals.categories import evaluate_suite
from k25_jax.evals.local import open_checkpoint


def test_the_base_model_is_small_and_says_where_it_comes_from():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 10e6
    origin = json.loads((BASE / "origin.json").read_text())
    assert origin["command"] == "make base" and origin["revision"]
    assert list(origin["stages"]) == ["small", "vit", "llm", "projector", "joint", "long"]
    assert all(stage["train"]["seed"] == 0 for stage in origin["stages"].values())


def test_the_base_model_reads_digits_and_has_the_context_of_its_last_stage():
    model = load_model("base")
    assert model.config.text.max_length == 1024 and model.config.text.rope.factor == 4
    (score,) = evaluate_suite(open_checkpoint("base"), ["digits:test"], 32)
    assert score.score > 0.7
