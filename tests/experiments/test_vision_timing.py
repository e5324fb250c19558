"""The study of when vision comes in: equal budgets in all arms, checked on the stream of data itself, and its tables."""

import json

import pytest

import runs
from k25_jax.config import ConfigError, import_file, load_experiment
from k25_jax.data.mixture import realised
from k25_jax.data.pipeline import make_pipeline

FILE = str(runs.ROOT / "experiments/ablations/vision_timing.py")
STUDY = import_file(FILE)


@pytest.mark.parametrize("arm", STUDY.ARMS)
def test_every_arm_reads_the_same_budgets(arm):
    """The arm on a sixtieth of its length: tokens of each modality until no batch has any."""
    steps, text, vision = 50, STUDY.BUDGETS["text"] // 60, STUDY.BUDGETS["vision"] // 60
    changes = [f"train.steps={steps}", f"data.text_tokens={text}", f"data.vision_tokens={vision}"]
    changes += ["optim.warmup_steps=1", "optim.decay_steps=1"]
    experiment = load_experiment(f"{FILE}:{arm}", changes)
    pipeline, seen = make_pipeline(experiment.data, experiment.model, steps), []
    for _ in range(steps + 1):
        next(pipeline)
        seen.append(realised(pipeline.get_state()["lanes"], experiment.data))
    pipeline.close()
    assert seen[-1]["text_tokens"] == text
    assert 0 <= vision - seen[-1]["vision_tokens"] <= STUDY.SLACK
    start, share = STUDY.ARMS[arm]
    before = seen[max(round(start * steps) - 1, 0)]
    assert before["vision_tokens"] == 0 if start else before["vision_tokens"] > 0
    assert seen[45]["mixture/vision"] == pytest.approx(share, abs=0.05)


def test_budgets_are_checked_in_the_runs(tmp_path):
    def write(name, text=0, vision=0):
        (tmp_path / name).mkdir(exist_ok=True)
        counts = {"text_tokens": STUDY.BUDGETS["text"] - text, "vision_tokens": STUDY.BUDGETS["vision"] - vision}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1} | counts) + "\n")

    for arm in STUDY.ARMS:
        for seed in STUDY.SEEDS:
            write(f"{arm}_{seed}", vision=seed)
    assert set(STUDY.check_budgets(tmp_path)) == {f"{arm}_{seed}" for arm in STUDY.ARMS for seed in STUDY.SEEDS}
    for fields in (dict(text=1), dict(vision=STUDY.SLACK + 1), dict(vision=-1)):
        write("late_1", **fields)
        with pytest.raises(ConfigError, match="these runs lack .*late_1"):
            STUDY.check_budgets(tmp_path)


def test_the_table_has_means_deviations_and_the_paper():
    found = {category: {arm: [10.0, 20.0, 30.0] for arm in STUDY.ARMS} for category in STUDY.PAPER}
    lines = STUDY.as_table(found).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == "| vision knowledge | 20.0 ± 10.0 | 20.0 ± 10.0 | 20.0 ± 10.0 | 25.8 | 25.0 | 24.2 |"
