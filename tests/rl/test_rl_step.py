"""An update that is skipped, and a source that waits."""

import dataclasses

import jax
import numpy as np
import pytest

from drawn import MINUTE
from groups import group
from k25_jax.config import DataConfig, Experiment, OptimConfig, RLConfig, TrainConfig
from k25_jax.rl.batches import batch_of
from k25_jax.train.rl import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step

MODEL = dataclasses.replace(
    MINUTE, text=dataclasses.replace(MINUTE.text, moe=dataclasses.replace(MINUTE.text.moe, bias_rate=1e-3))
)  # the rate that the stage refuses: here it would show


@pytest.fixture(scope="module", params=["muonclip", "adamw"])
def world(request):
    """(experiment, step, state after an update that moved)."""
    optim = OptimConfig(name=request.param, warmup_steps=0, weight_decay=0.1, qk_clip=1e-3)
    experiment = Experiment(
        stage="rl", model=MODEL, data=DataConfig(batch_size=2, seq_len=32, packs=0), optim=optim,
        train=TrainConfig(steps=9), rl=RLConfig(min_groups=2),
    )  # fmt: skip
    step = make_step(experiment, loss_fn)
    state, metrics = step(init_state(experiment), batch(experiment, [[1.0, 0.0], [0.0, 1.0]]))
    assert not metrics["skipped"] and not metrics["bad"] and state.opt_state.count == 1
    return experiment, step, jax.device_get(state)


def batch(experiment, rewards):
    return batch_of([group(r) for r in rewards], 0, experiment.rl, experiment.data, experiment.model)[0]


@pytest.mark.parametrize("rewards", [[[1.0, 0.0], [1.0, 1.0]], [[0.5, 0.5], [1.0, 1.0]], [[None, 1.0], [None, None]]])
def test_an_update_of_too_few_unequal_groups_moves_nothing(world, rewards):
    """Neither parameters nor means nor the schedule, though the policy has moved and tau's term has a gradient."""
    experiment, step, state = world
    after, metrics = step(jax.device_put(state), batch(experiment, rewards))
    assert metrics["skipped"] == 1 and metrics["bad"] == 0
    assert after.step == state.step + 1
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves((state.params, state.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_an_update_of_enough_moves(world):
    experiment, step, state = world
    after, metrics = step(jax.device_put(state), batch(experiment, [[1.0, 0.0], [0.0, 1.0]]))
    assert metrics["skipped"] == 0 and after.opt_state.count == 2
    assert any(
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
    )
