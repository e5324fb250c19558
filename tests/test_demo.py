"""The demonstration: its parts, its kill and resume on a minute run, and (slow) the whole of it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import runs
from k25_jax import demo
from k25_jax.config import ConfigError, load_experiment
from k25_jax.data.tasks import make_task
from k25_jax.evals.protocol import Result

ROWS = [
    {"step": step, "loss": 6.0 - step / 10, "tokens": 100, "tokens_per_second": 1000.0 + (0 if step > 4 else 1e6)}
    for step in range(1, 41)
]


@pytest.fixture
def run(tmp_path):
    """A folder with the metrics of 40 steps."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_the_last_step_of_a_run_that_is_being_written(tmp_path):
    assert demo.last_step(tmp_path) == 0
    file = tmp_path / "metrics.jsonl"
    for content, step in (("", 0), ('{"step": 3', 0), ('{"step": 3}\n', 3), ('{"step": 3}\n{"step": 4}\n{"st', 4)):
        file.write_text(content)
        assert demo.last_step(tmp_path) == step


def test_the_summary_has_every_figure(run):
    results = {
        "digits:test:size=28": [Result(0, "1", "1", 1.0), Result(1, "2", "3", 0.0)],
        "words:test": [Result(0, "cat", "cart", 0.75)],
    }
    resumed = {"resumed_exactly": True, "killed_at_step": 20, "steps_done_twice": 3}
    summary = demo.summarise(run, results, resumed, trained=12.0, seconds=34.0)
    assert summary["digits_accuracy"] == 0.5 and summary["digits_questions"] == 2
    assert summary["words_accuracy"] == 0.75 and summary["words_questions"] == 1
    assert summary["first_loss"] == 5.9 and summary["final_loss"] == pytest.approx(6 - np.mean(range(21, 41)) / 10)
    assert summary["steps"] == 40 and summary["tokens_trained"] == 4000
    assert summary["tokens_per_second"] == 1000  # the first tenth, with the compilation, does not count
    assert summary["parameters_total"] == 990656 > summary["parameters_active"]
    assert summary["training_seconds"] == 12 and summary["total_seconds"] == 34
    assert resumed.items() <= summary.items()
    json.dumps(summary)


def test_chance_is_the_share_of_the_commonest_answer():
    task = make_task("shapes:test")
    golds = [task.answer(int(i)) for i in np.linspace(0, len(task) - 1, 50)]
    share = demo.chance("shapes:test", sample=50)
    assert share == max(golds.count(gold) for gold in set(golds)) / 50 and 0 < share < 1


def test_a_folder_that_holds_something_else_is_not_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something other than a run"):
        demo.demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def command(finished, folder) -> list[str]:
    return [sys.executable, "-m", "k25_jax.cli", "train", f"--config={finished.file}", f"--workdir={folder}"]


def test_training_is_killed_half_way_and_resumed_exactly(finished, tmp_path, monkeypatch):
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    train = load_experiment(str(finished.file)).train
    found = demo.train_with_a_kill(command(finished, tmp_path / "run"), tmp_path / "run", train)
    assert found["resumed_exactly"] is True and found["steps_done_twice"] > 0
    assert runs.STEPS / 2 < found["killed_at_step"] < runs.STEPS
    assert runs.untimed(tmp_path / "run") == runs.untimed(finished.run)


def test_a_run_that_fails_ends_the_demo(finished, tmp_path, monkeypatch):
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    train = load_experiment(str(finished.file)).train
    failing = [*command(finished, tmp_path / "run"), "--config.train.init_frm=x"]
    with pytest.raises(ConfigError, match="training ended with status 2"):
        demo.train_with_a_kill(failing, tmp_path / "run", train)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    arguments = [sys.executable, "-m", "k25_jax.cli", "demo", "--steps=30", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": ""}
    for _ in range(2):  # the second takes the place of the first
        result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["resumed_exactly"] is True and summary["steps"] == 30
        assert summary["digits_questions"] == 360 and 0 <= summary["digits_accuracy"] <= 1
        assert summary["final_loss"] < summary["first_loss"]
        page = (tmp_path / "run" / "report.html").read_text()
        for part in ("Held-out digits", "Held-out photographs", "resumed exactly", "Go on from here", "peak_lr"):
            assert part in page
        assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "run")
