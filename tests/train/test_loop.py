"""The training loop in processes of its own: killed, stopped, out of disk, with damaged checkpoints and bad steps."""

import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.store import Store
from k25_jax.config import ConfigError, load_experiment
from k25_jax.train.run import revision, save_run
from k25_jax.train.state import abstract_state

GOLDEN = (5.828100204467773, 5.375868320465088)


def train(finished, run: pathlib.Path, *more: str) -> subprocess.CompletedProcess:
    """Start the run in `run`, or resume it, and wait for its end."""
    return runs.k25("train", f"--config={finished.file}", f"--workdir={run}", *more)


def assert_as_uninterrupted(finished, run: pathlib.Path):
    """All metrics but the timings, and every bit of the final state, are those of the run that nobody disturbed."""
    assert runs.untimed(run) == runs.untimed(finished.run)
    abstract = abstract_state(load_experiment(str(finished.file)))
    (state, data), (expected, expected_data) = (Store(r / "checkpoints").restore(abstract) for r in (run, finished.run))
    assert data == expected_data
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path


def error_line(result: subprocess.CompletedProcess) -> str:
    """The message of a command that ended with status 2, one line of stderr."""
    assert result.returncode == 2, result.stderr
    # another thread of Orbax's may be in the middle of a line of its own
    (line,) = re.findall("k25 train: error: .*", result.stderr)
    return line


# ---------------------------------------------------------------------------------------------------------- a whole run
def test_a_run_logs_every_step_and_learns(finished):
    rows = runs.rows(finished.run)
    assert [row["step"] for row in rows] == list(range(1, runs.STEPS + 1))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert all(row["bad"] == 0 and row["tokens_per_second"] > 0 for row in rows)
    assert Store(finished.run / "checkpoints").steps() == [
        runs.STEPS - 2 * runs.EVERY,
        runs.STEPS - runs.EVERY,
        runs.STEPS,
    ]
    info = json.loads((finished.run / "run.json").read_text())
    assert info["versions"]["jax"] == jax.__version__ and info["devices"] and info["revision"]


def test_the_losses_of_the_first_two_steps_are_golden(finished):
    """Text, documents with images and questions about images, through the whole stack: any change of it shows here."""
    first, second = runs.rows(finished.run)[:2]
    np.testing.assert_allclose([first["loss"], second["loss"]], GOLDEN, rtol=1e-5)
    assert first["media_tokens"] > 0 and second["media_tokens"] > 0


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    run = shutil.copytree(finished.run, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    again = train(finished, run, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout) == json.loads(finished.stdout) == runs.rows(run)[-1]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert_as_uninterrupted(finished, run)


def test_a_run_ends_with_the_last_token_of_its_budget(finished, tmp_path):
    """No step without a token is trained on, the last one that had some is saved, and started again it stays so."""
    run, budget = tmp_path / "run", ("data.vision_tokens=900", "train.log_every=50")
    for _ in range(2):
        done = train(finished, run, *budget)
        assert done.returncode == 0, done.stderr
        (row,) = runs.rows(run)
        assert 880 < row["vision_tokens"] <= 900 and row["tokens"] > 0 and row["text_tokens"] == 0
        assert 7 <= row["step"] <= 10 and Store(run / "checkpoints").steps() == [row["step"]]


# ------------------------------------------------------------------------------------------------------ interruptions
def stop_after(process, run, step: int, how: int) -> int:
    """Send a signal right after the metrics of `step` appear, so in the middle of the next; the exit status."""
    assert runs.wait_for(process, lambda: runs.step_of(run) >= step), process.communicate()
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    return process.returncode


def unfinished(run) -> list[pathlib.Path]:
    """Checkpoints that are, or were, being written."""
    return list((run / "checkpoints").glob("*tmp*"))


def newest(run) -> int:
    """The step of the newest complete checkpoint; 0 when there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def kill_while_writing(command, run) -> bool:
    """SIGKILL a run while a checkpoint is half-written; the folder that is left tells whether it was in time."""
    process, steps = runs.start(*command), runs.step_of(run)
    assert runs.wait_for(process, lambda: runs.step_of(run) != steps)  # older unfinished folders are gone by then
    assert runs.wait_for(process, lambda: unfinished(run)), "the run ended before a write was seen"
    process.kill()
    process.communicate()
    return bool(unfinished(run))


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_as_if_nothing_had_happened(finished, tmp_path):
    run = tmp_path / "run"
    command = ("train", f"--config={finished.file}", f"--workdir={run}")
    assert stop_after(runs.start(*command), run, 73, signal.SIGKILL) == -signal.SIGKILL
    kept, timings = newest(run), [row["step_seconds"] for row in runs.rows(run)]
    assert 0 < kept < len(timings)

    assert any(kill_while_writing(command, run) for _ in range(5)), "no write was hit in 5 tries"
    redone = [row["step_seconds"] for row in runs.rows(run)]
    assert redone[:kept] == timings[:kept] and redone[kept] != timings[kept]  # it went on from its last checkpoint

    step = runs.step_of(run)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        step = runs.step_of(run)
        assert stop_after(runs.start(*command), run, step + 25, number) == status
        assert not unfinished(run) and newest(run) == runs.step_of(run)  # the step in hand is saved

    last = train(finished, run)
    assert last.returncode == 0, last.stderr
    assert not unfinished(run)
    assert_as_uninterrupted(finished, run)


@pytest.mark.slow
def test_killed_at_random_moments(finished, tmp_path):
    run, rng = tmp_path / "run", np.random.default_rng(0)
    for _ in range(8):
        step = runs.step_of(run)
        process = runs.start("train", f"--config={finished.file}", f"--workdir={run}")
        runs.wait_for(process, lambda step=step: runs.step_of(run) < step or runs.step_of(run) > step)
        try:
            process.wait(float(rng.uniform(0, 0.5)))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    assert train(finished, run).returncode == 0
    assert_as_uninterrupted(finished, run)


# --------------------------------------------------------------------------------------------------------- the disk
@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 8 MB if this process may mount one, else any folder, and a way to fill the disk.

    Where nothing can be mounted, filling it is forbidding the process to write files of more than a few bytes.
    """
    folder, filler = tmp_path / "disk", tmp_path / "disk" / "filler"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0

    def fill(process):
        if not mounted:
            return resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))

    yield folder, fill, lambda: filler.unlink(missing_ok=True)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_name_and_costs_no_checkpoint(finished, small_disk):
    folder, fill, empty = small_disk
    run = folder / "run"
    process = runs.start("train", f"--config={finished.file}", f"--workdir={run}")
    assert runs.wait_for(process, lambda: runs.step_of(run) > 2 * runs.EVERY)
    fill(process)
    out, err = process.communicate(timeout=120)
    line = error_line(subprocess.CompletedProcess("", process.returncode, out, err))
    assert str(run) in line and "free" in line
    empty()
    assert Store(run / "checkpoints").steps()[-1] >= runs.EVERY
    again = train(finished, run)
    assert again.returncode == 0, again.stderr
    assert_as_uninterrupted(finished, run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(finished, tmp_path):
    run = shutil.copytree(finished.run, tmp_path / "run")
    newest = run / "checkpoints" / str(runs.STEPS)
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert str(newest) in error_line(train(finished, run))
    assert runs.step_of(run) == runs.STEPS  # nothing is lost by the attempt
    shutil.rmtree(newest)
    assert train(finished, run).returncode == 0
    assert_as_uninterrupted(finished, run)


def test_experiment_json_survives_a_write_that_fails(tmp_path, finished):
    """The file is replaced whole: a disk that is full leaves the old one."""
    script = """
        import resource, sys, pathlib
        from k25_jax.config import load_experiment
        from k25_jax.train.run import save_run
        experiment, run = load_experiment(sys.argv[1]), pathlib.Path(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            save_run(experiment, run)
        except OSError:
            sys.exit(3)
    """
    run = tmp_path / "run"
    save_run(load_experiment(str(finished.file)), run)
    before = (run / "experiment.json").read_bytes()
    command = [sys.executable, "-c", textwrap.dedent(script), str(finished.file), str(run)]
    assert subprocess.run(command, env=runs.environment(), cwd=runs.ROOT).returncode == 3
    assert (run / "experiment.json").read_bytes() == before and len(before) > 100


def test_another_model_in_the_folder_is_refused(finished, tmp_path):
    experiment = load_experiment(str(finished.file))
    save_run(experiment, tmp_path)
    save_run(experiment, tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        save_run(load_experiment(str(finished.file), ["model.text.d_model=32"]), tmp_path)


def test_no_git_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert revision() == "unknown"


def test_a_repository_around_an_installed_package_is_not_ours(monkeypatch, tmp_path):
    assert revision() != "unknown"
    monkeypatch.setattr("k25_jax.train.revision.ROOT", tmp_path)
    assert revision() == "unknown"


# ----------------------------------------------------------------------------------------------------- bad steps
POISONED = """
    import contextlib, sys
    import numpy as np
    from k25_jax.config import load_experiment
    from k25_jax.train import layout, loop, steplog

    class Poisoned:
        def __init__(self, pipeline):
            self.pipeline, self.close = pipeline, pipeline.close
            self.get_state, self.set_state = pipeline.get_state, pipeline.set_state

        def __next__(self):
            batch = next(self.pipeline)
            if self.get_state()["lanes"][0]["counts"]["batches"] in bad:
                return batch.replace(loss_weights_BL=np.full_like(batch.loss_weights_BL, np.inf))
            return batch

    bad, make_pipeline = eval(sys.argv[3]), layout.make_pipeline
    layout.make_pipeline = lambda *arguments: Poisoned(make_pipeline(*arguments))
    try:
        loop.train(load_experiment(sys.argv[1]), sys.argv[2])
    except steplog.BadSteps as error:
        print(error)
"""


def poisoned(finished, run, bad: str) -> str:
    """Train with batches whose weights are infinite; what is printed."""
    command = [sys.executable, "-c", textwrap.dedent(POISONED), str(finished.file), str(run), bad]
    result = subprocess.run(command, env=runs.environment(), cwd=runs.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bad_batches_are_skipped_and_too_many_in_a_row_end_the_run(finished, tmp_path):
    """Steps 3, 5, 6 are bad and the run goes on; 39 to 43 end it; the count survives the checkpoint of step 40."""
    bad = "{3, 5, 6, *range(39, 50)}"
    message = poisoned(finished, tmp_path, bad)
    for part in (str(tmp_path), "5 steps in a row", "step 43", "[20, 40]", "optim.peak_lr"):
        assert part in message
    rows = runs.rows(tmp_path)
    assert [row["bad"] for row in rows[:8]] == [0, 0, 1, 0, 1, 1, 0, 0]
    assert [row["bad_in_a_row"] for row in rows[:8]] == [0, 0, 1, 0, 1, 2, 0, 0]
    assert rows[2]["loss"] in ("nan", "inf") and np.isfinite(rows[3]["loss"])
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in runs.rows(finished.run)[:2]]
    assert rows[36]["loss"] < 0.8 * rows[0]["loss"] and [row["bad_in_a_row"] for row in rows[38:]] == [1, 2, 3, 4, 5]

    before = runs.untimed(tmp_path)
    assert "step 43" in poisoned(finished, tmp_path, bad)
    assert runs.untimed(tmp_path) == before
