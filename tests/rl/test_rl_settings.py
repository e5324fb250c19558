"""What the stage rl refuses, with the field and the remedy."""

import dataclasses

import pytest

from k25_jax.config import (
    ConfigError,
    DataConfig,
    EpisodeConfig,
    Experiment,
    OptimConfig,
    ProblemsConfig,
    RLConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
    check_rl,
    from_dict,
    preset,
    to_dict,
)  # fmt: skip

TINY = preset("tiny")
MOE = dataclasses.replace(TINY.text.moe, bias_rate=0.0)
MODEL = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, moe=MOE))
GOOD = Experiment(
    stage="rl", model=MODEL, data=DataConfig(batch_size=4, seq_len=128), optim=OptimConfig(weight_decay=0.0),
    rl=RLConfig(problems=(ProblemsConfig("puzzles:train"),), groups=4, samples=4, episode=EpisodeConfig(context=32)),
)  # fmt: skip


def test_a_good_experiment_passes_and_survives_json():
    check_rl(GOOD)
    assert from_dict(Experiment, to_dict(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(temperature=0.7), r"rl.temperature=0.7.*set rl.temperature=1.0"),
        (dict(top_p=0.95), r"rl.top_p=0.95.*set rl.top_p=1.0"),
        (dict(samples=1), "rl.samples=1.*at least 2"),
        (dict(min_groups=0), "rl.min_groups=0.*rl.groups=8"),
        (dict(min_groups=9), "rl.min_groups=9.*rl.groups=8"),
        (dict(pass_low=0.9, pass_high=0.1), "pass_low=0.9"),
        (dict(toggle=dict(arm="toggle"), estimate=0), "rl.estimate=0.*set rl.estimate"),
        (dict(rewards=[]), "rl.rewards"),
        (dict(rewards=[("a", 1.0), ("a", 2.0)]), "each once"),
        (dict(latents="forget"), "latents='forget'"),
        (dict(problems=[dict(path="x:train", ability="singing")]), "ability='singing'"),
        (dict(problems=[dict(ability="coding")]), "path=''"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        from_dict(RLConfig, fields)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(model=TINY), "model.text.moe.bias_rate=.*set it to 0.0"),
        (dict(optim=OptimConfig()), "optim.weight_decay=0.1.*set it to 0.0"),
        (dict(rl=RLConfig()), "rl.problems is empty"),
        (dict(data=dataclasses.replace(GOOD.data, sources=(SourceConfig("x"),))), "data.sources"),
        (dict(data=dataclasses.replace(GOOD.data, text_tokens=9)), "data.text_tokens"),
        (dict(data=dataclasses.replace(GOOD.data, lanes=2, packs=2)), "data.lanes=2"),
        (dict(data=dataclasses.replace(GOOD.data, batch_size=3)), "hold 12 traces.*are 16; raise data.batch_size to 4"),
        (dict(data=dataclasses.replace(GOOD.data, seq_len=31)), "rl.episode.context=32 exceeds data.seq_len=31"),
        (dict(train=TrainConfig(eval_every=5), data=dataclasses.replace(GOOD.data, validation=ValidationConfig(one_in=2))),
         "train.eval_every=5.*k25 eval"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_stage_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        check_rl(dataclasses.replace(GOOD, **changes))
