"""Rewards composed, and what of them an update learns from."""

import dataclasses

import numpy as np
import pytest

from groups import group, segment, trace
from k25_jax.config import ConfigError, DataConfig, K25Config, RLConfig, ToggleConfig
from k25_jax.data.packing import PackingError
from k25_jax.rl.advantages import advantages, composed, rewards_of, unequal
from k25_jax.rl.batches import batch_of, metrics_of

RL, MODEL = RLConfig(), K25Config(media_pad_id=50)
DATA = DataConfig(batch_size=4, seq_len=32, packs=0)


def test_an_advantage_is_a_reward_less_the_mean_of_its_group_and_nothing_else():
    found = advantages(group([1.0, 0.0, 0.0, 0.5], [1, 50, 2, 3]), 0, RL)
    np.testing.assert_array_equal(found, [0.625, -0.375, -0.375, 0.125])


def test_infrastructure_is_left_out_and_what_was_cut_is_not():
    some = group([1.0, None, 0.0])
    cut = trace(0.5, ending="length", seed=7)
    some = dataclasses.replace(some, traces=[*some.traces, cut])
    assert len(some.valid) == 3 and some.kept
    np.testing.assert_allclose(advantages(some, 0, RL), [0.5, -0.5, 0.0])


@pytest.mark.parametrize(("rewards", "kept"), [([1.0, 0.0], True), ([1.0, None], False), ([None, None], False)])
def test_one_valid_trace_is_no_group(rewards, kept):
    assert group(rewards).kept == kept


def test_equal_rewards_are_equal_whatever_rounding_makes_of_their_mean():
    assert not unequal(advantages(group([0.1] * 7), 0, RL)) and not unequal(np.zeros(0))
    assert unequal(advantages(group([0.1] * 6 + [0.1001]), 0, RL))


def test_rewards_are_composed_of_named_components():
    weights = (("outcome", 0.9), ("format", 0.1), ("speed", 2.0))
    assert composed({"outcome": 1.0, "format": 0.5}, weights) == pytest.approx(0.95)
    with pytest.raises(ConfigError, match="rl.rewards.*'style' no weight"):
        composed({"outcome": 1.0, "style": 1.0}, weights)


def test_toggle_comes_after_composition_and_goes_by_the_update():
    config = dataclasses.replace(RL, toggle=ToggleConfig(arm="toggle", updates=1), rewards=(("outcome", 1.0),))
    solved = group([1.0, 1.0, 1.0, 1.0], [4, 4, 9, 4], budget=5)
    np.testing.assert_allclose(advantages(solved, 0, config), [0.25, 0.25, -0.75, 0.25])
    np.testing.assert_array_equal(advantages(solved, 1, config), 0)
    np.testing.assert_array_equal(rewards_of(solved, config), 1)


def test_a_batch_has_each_trainable_segment_of_each_valid_trace_once():
    helper = segment(2, 3, 5, agent="helper", parent=0, trainable=False)
    own = segment(3, 4, 6)
    two = trace(0.0, segments=(own, helper), seed=9)
    some = group([1.0, None])
    some = dataclasses.replace(some, traces=[*some.traces, two])
    batch, differing = batch_of([some, group([None, 1.0])], 0, RL, DATA, MODEL)
    assert differing == 1
    sampled_BL = batch.loss_weights_BL > 0
    assert sampled_BL.sum() == 8
    assert sorted(set(batch.advantages_BL[sampled_BL].tolist())) == [-0.5, 0.5]
    assert batch.segments_BL.max() >= 1 and (batch.segments_BL > 0).sum() == 14
    first = some.traces[0].segments[0]
    row, column = np.argwhere(batch.tokens_BL == first.tokens[0])[0]
    np.testing.assert_array_equal(batch.targets_BL[row, column + 2 : column + 6], first.tokens[3:])
    np.testing.assert_array_equal(batch.old_logprobs_BL[row, column + 2 : column + 6], first.logprobs[3:])


def test_too_few_unequal_groups_leave_no_advantage_but_all_their_tokens():
    config = dataclasses.replace(RL, min_groups=2)
    groups = [group([1.0, 0.0]), group([1.0, 1.0])]
    batch, differing = batch_of(groups, 0, config, DATA, MODEL)
    sampled_BL = batch.loss_weights_BL > 0
    assert differing == 1 and sampled_BL.sum() == 16 and not batch.advantages_BL[sampled_BL].any()
    batch, _ = batch_of([], 0, RL, DATA, MODEL)
    assert not batch.segments_BL.any()


def test_a_trace_that_finds_no_room_is_an_error_that_names_it():
    with pytest.raises(PackingError, match="t1/0"):
        batch_of([group([1.0, 0.0], [4, 40])], 0, RL, DATA, MODEL)


def test_metrics_are_of_valid_traces_by_task_and_ability_before_toggle():
    config = dataclasses.replace(RL, toggle=ToggleConfig(arm="constant", budget=1))
    groups = [
        group([1.0, 0.0, None], [4, 8, 2]),
        group([1.0, 1.0], [6, 6], task="boxes", ability="knowledge"),
        group([None, 0.5], task="boxes", ability="knowledge"),
    ]
    found = metrics_of(groups, config)
    assert found["reward"] == pytest.approx(0.7) and found["reward/sums"] == 0.5
    assert found["reward/boxes"] == found["reward/knowledge"] == pytest.approx(2.5 / 3)
    assert found["pass_rate"] == pytest.approx(0.8) and found["pass_rate/reasoning"] == 0.5
    assert found["length/sums"] == 6 and found["length_max"] == 8
    assert found["infrastructure"] == pytest.approx(2 / 7) and found["dropped_groups"] == 1 and found["cut"] == 0
    assert metrics_of([group([None, None])], config)["infrastructure"] == 1
