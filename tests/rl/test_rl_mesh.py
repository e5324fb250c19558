"""The stage rl over eight devices: sampled and learnt from on the same mesh."""

import pytest

import rollouts
import runs

SCRIPT = """
import dataclasses
from k25_jax.config import MeshConfig, load_experiment
from k25_jax.train.loop import train

experiment = load_experiment({file!r})
data = dataclasses.replace(experiment.data, batch_size=8, packs=8)
mesh = MeshConfig(fsdp=2, expert=2, context=2)
rl = dataclasses.replace(experiment.rl, old_logprobs={old!r}, estimate=0)
settings = dataclasses.replace(experiment.train, steps=4)
train(dataclasses.replace(experiment, data=data, mesh=mesh, rl=rl, train=settings), {run!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", ["engine", "trainer"])
def test_sampler_and_learner_agree_on_a_mesh(tmp_path, old):
    """Rows lie in stripes over `context`: log-probabilities that the trainer computes go back to their places."""
    file = rollouts.write_experiment(tmp_path)
    runs.on_eight_devices(SCRIPT.format(file=str(file), run=str(tmp_path / "run"), old=old))
    rows = runs.rows(tmp_path / "run")
    assert [row["batch"] for row in rows] == [0, 0, 1, 1]
    for row in rows[::2]:
        assert row["mismatch"] <= (1e-5 if old == "engine" else 1e-6)
        assert old == "engine" or row["engine_mismatch"] <= 1e-5
    assert any(not row["skipped"] for row in rows[::2])
