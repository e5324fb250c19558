"""A sweep of real runs: two that follow each other, started again, one that fails; and what is refused beforehand."""

import pytest

from k25_jax.checkpoint.store import complete_steps
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.train.sweep import points, sweep

FILE = """
import ml_collections
from k25_jax.config import run_local

def get_config(arg=""):
    config = ml_collections.ConfigDict(dict(optim={}, train={}))
    config = run_local(config)
    config.data = dict(sources=[dict(path="words:train", kind="task")], batch_size=1, seq_len=64, packs=1, pack_patches=64)
    config.train.steps = 2
    return config

def get_hyper():
    return [
        dict(name="first", overrides=("train.seed=1",)),
        dict(name="second", overrides=("train.init_from={workdir}/first", "train.seed=2")),
    ]

def report(workdir):
    (workdir / "report.txt").write_text("reported")
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.py").write_text(FILE)
    status = main(["sweep", f"--config={folder / 'sweep.py'}", f"--workdir={folder / 'runs'}"])
    return folder, status


def test_runs_follow_each_other_and_are_reported(swept):
    folder, status = swept
    assert status == 0
    for name in ("first", "second"):
        assert complete_steps(folder / "runs" / name / "checkpoints") == [2]
    assert (folder / "runs" / "report.txt").read_text() == "reported"
    log = (folder / "runs" / "second" / "log.txt").read_text()
    assert "finished" in log


def test_finished_runs_are_left_alone_and_changed_ones_are_not(swept, capfd):
    folder, _ = swept
    before = (folder / "runs" / "first" / "log.txt").read_text()
    assert main(["sweep", f"--config={folder / 'sweep.py'}", f"--workdir={folder / 'runs'}"]) == 0
    assert (folder / "runs" / "first" / "log.txt").read_text() == before
    assert "finished before" in capfd.readouterr().err
    wrong = ["sweep", f"--config={folder / 'sweep.py'}", f"--workdir={folder / 'runs'}", "--only=first"]
    assert main([*wrong, "--config.model=1b"]) == 1  # the folder holds a run of another model
    assert "first: failed" in capfd.readouterr().err


def test_what_is_refused_beforehand(swept, tmp_path):
    folder, _ = swept
    with pytest.raises(ConfigError, match="no run has 'third' in its name; there are first, second"):
        sweep(str(folder / "sweep.py"), tmp_path, only="third")
    with pytest.raises(ConfigError, match="unknown key 'stepz'"):
        sweep(str(folder / "sweep.py"), tmp_path, ["train.stepz=3"])
    assert not list(tmp_path.iterdir())

    class File:
        get_hyper = staticmethod(lambda: [dict(name="a"), dict(name="a")])

    with pytest.raises(ConfigError, match="a name of its own"):
        points(File, "file.py")
    with pytest.raises(ConfigError, match="no get_hyper"):
        points(object(), "file.py")
