"""A sweep of real runs: two that follow each other, started again, one that fails; and what is refused beforehand."""

import pytest

import runs
from k25_jax.checkpoint.folders import complete_steps
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.train.sweep import points, sweep

FILE = """

def get_hyper():
    short = ("train.steps=2", "train.checkpoint_every=2", "optim.warmup_steps=1", "optim.decay_steps=0")
    return [
        dict(name="first", overrides=(*short, "train.seed=1")),
        dict(name="second", overrides=(*short, "train.init_from={workdir}/first", "train.seed=2")),
    ]

def report(workdir):
    (workdir / "report.txt").write_text("reported")
"""


@pytest.fixture
def file(tmp_path):
    experiment = runs.write_experiment(tmp_path)
    experiment.write_text(experiment.read_text() + FILE)
    return experiment


def test_runs_follow_each_other_and_finished_ones_are_left_alone(file, tmp_path, capfd):
    folder = tmp_path / "runs"
    command = ["sweep", f"--config={file}", f"--workdir={folder}"]
    assert main(command) == 0
    for name in ("first", "second"):
        assert complete_steps(folder / name / "checkpoints") == [2]
        assert "finished" in (folder / name / "log.txt").read_text()
    assert (folder / "report.txt").read_text() == "reported"
    (folder / "report.txt").unlink()
    before = (folder / "first" / "log.txt").read_text()
    assert main([*command, "--only=first"]) == 0
    assert (folder / "first" / "log.txt").read_text() == before and not (folder / "report.txt").exists()
    assert "finished before" in capfd.readouterr().err
    assert (
        main([*command, "--only=first", "--config.model.text.ffn_dim=16"]) == 1
    )  # the folder holds another model's run
    assert "first: failed" in capfd.readouterr().err and not (folder / "report.txt").exists()


def test_what_is_refused_beforehand(file, tmp_path):
    with pytest.raises(ConfigError, match="no run has 'third' in its name; there are first, second"):
        sweep(str(file), tmp_path / "runs", only="third")
    with pytest.raises(ConfigError, match="unknown key 'stepz'"):
        sweep(str(file), tmp_path / "runs", ["train.stepz=3"])
    assert not (tmp_path / "runs").exists()

    class File:
        get_hyper = staticmethod(lambda: [dict(name="a"), dict(name="a")])

    with pytest.raises(ConfigError, match="a name of its own"):
        points(File, "file.py")
    with pytest.raises(ConfigError, match="no get_hyper"):
        points(object(), "file.py")
