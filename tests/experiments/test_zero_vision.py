"""The zero-vision study: what its arms read, its figures from outcomes, and that nothing is asked twice."""

import dataclasses
import json

import numpy as np
import pytest

import runs
from k25_jax.agents.tasks import CONDITIONS
from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.load import load_model
from k25_jax.config import import_file, load_experiment
from k25_jax.data.tasks import PROGRAMMED
from k25_jax.evals.local import identity_of
from k25_jax.evals.tool_use import Outcome

FILE = str(runs.ROOT / "experiments/sft/zero_vision.py")
STUDY = import_file(FILE)
RIGHT = {"shown": 0.5, "hidden": 1.0, "blank": 0.0}


def outcomes(change: int = 0) -> list[Outcome]:
    """Four questions of each task; of those shown, every other one is right, and `change` more of the first task."""
    return [
        Outcome(f"{task}:test", i, condition, "a", "b", float(i < 4 * RIGHT[condition] + change * (task == "dots")),
                condition != "hidden", 2, 9, "answer")
        for task in PROGRAMMED for condition in CONDITIONS for i in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize("point", STUDY.get_hyper(), ids=lambda point: point["name"])
def test_arms_differ_in_what_they_read_and_seeds_in_its_order(point, tmp_path):
    overrides = [item.replace("{workdir}", str(tmp_path)) for item in point["overrides"]]
    experiment = load_experiment(str(runs.ROOT / point["config"]), overrides)
    arm, seed = point["name"].rsplit("_", 1)
    files = [source.path for source in experiment.data.sources]
    assert files == [f"{tmp_path}/chats/{name}.jsonl" for name in {"zero_vision": ["text"]}.get(arm, ["text", "shown"])]
    assert bool(experiment.data.packs) == (arm == "text_vision")  # the other cannot see a picture if it wanted to
    assert experiment.data.seed == experiment.train.seed == int(seed)
    assert experiment.train.init_from == "base" and experiment.model == load_model("base").config


def test_both_arms_shrink_to_a_laptop():
    for arm in STUDY.ARMS:
        assert load_experiment(f"{FILE}:{arm},runlocal").train.steps == 4


def test_means_are_of_a_task_or_of_all_under_one_condition():
    found = outcomes(change=2)
    assert STUDY.mean(found, "shown", "dots") == 100.0 and STUDY.mean(found, "shown", "spots") == 50.0
    assert STUDY.mean(found, "shown") == pytest.approx(100 * (1.0 + 0.5 * 8) / 9)
    assert STUDY.mean(found, "hidden", field="ran") == 0.0 and STUDY.mean(found, "blank", field="ran") == 100.0


def test_the_report_reads_what_was_asked_before(tmp_path, monkeypatch):
    """Outcomes in their files are not asked for again, unless they are of another model."""
    for name in [f"{arm}_{seed}" for seed in STUDY.SEEDS for arm in STUDY.ARMS] + ["none"]:
        if name != "none":
            (tmp_path / name).symlink_to(BASE)
        change = int(name[-1]) if name.startswith("zero_vision") else 0
        kept = {"of": identity_of("base") | {"questions": STUDY.QUESTIONS}}
        kept["outcomes"] = [dataclasses.asdict(outcome) for outcome in outcomes(change)]
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    STUDY.report(tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "| right answers, % | zero_vision | text_vision | none |"
    assert lines[2] == f"| dots | 75.0 ± {np.std([50, 75, 100], ddof=1):.1f} | 50.0 ± 0.0 | 50.0 |"
    assert lines[-3] == "| code ran, shown | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 |"
    assert (tmp_path / "zero_vision.png").read_bytes().startswith(b"\x89PNG")
    asked = []
    monkeypatch.setattr(STUDY, "ask_all", lambda checkpoint, name: asked.append(name) or outcomes())
    kept = json.loads((tmp_path / "none.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps(kept | {"of": {"weights": "others"}}))
    STUDY.report(tmp_path)
    STUDY.report(tmp_path)
    assert asked == ["none"]
