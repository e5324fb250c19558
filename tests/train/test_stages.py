"""The stages of K2.5 one after the other, each shrunk to a laptop and begun from the one before."""

import jax
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.load import load_model
from k25_jax.config import load_experiment
from k25_jax.train.loop import train

STAGES = (
    ("vit/moonlight_16b.py:runlocal", ""),
    ("vit/k25_1t.py:runlocal", "init_vision_from"),
    ("pretrain/k25_1t.py:runlocal", "init_vision_from"),
    ("midtrain/k25_1t.py:32768,runlocal", "init_from"),
    ("midtrain/k25_1t.py:65536,runlocal", "init_from"),
)


@pytest.mark.slow
def test_each_stage_trains_from_the_one_before(tmp_path):
    """Two steps of each. The second ViT stage leaves the encoder as the first gave it, bit for bit."""
    before, models = None, []
    for number, (spec, field) in enumerate(STAGES):
        changes = ["train.steps=2", *([f"train.{field}={before}"] if field else [])]
        experiment = load_experiment(str(runs.ROOT / "experiments" / spec), changes)
        before = tmp_path / str(number)
        metrics = train(experiment, before)
        assert metrics["step"] == 2 and metrics["bad"] == 0 and metrics["loss"] > 0
        models.append(load_model(before))
    first, second, joint, longer, longest = (model.params for model in models)
    jax.tree.map(np.testing.assert_array_equal, second["vision"], first["vision"])
    assert (np.asarray(second["projector"]["fc1"]) != np.asarray(first["projector"]["fc1"])).any()
    for a, b in ((first, second), (second, joint), (joint, longer), (longer, longest)):
        same = np.abs(np.asarray(a["projector"]["fc1"]) - np.asarray(b["projector"]["fc1"])).max()
        assert same < 0.1 * np.abs(np.asarray(a["projector"]["fc1"])).max()  # two steps away, not drawn anew
    assert [model.config.text.rope.factor for model in models] == [1, 1, 1, 8, 16]
