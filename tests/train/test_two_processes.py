"""`k25 train` in two real processes: killed, stopped, broken, resumed. One device each, connected over loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.train.state import abstract_state

STEPS, EVERY = 10, 3
OVERRIDES = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "data.packs=2", "data.lanes=2")


def start(file, run, *more: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen:
    """`k25 train` by the launcher, in a process group of its own; `wrapper` comes before the command of each process."""
    train = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={file}", f"--workdir={run}", *OVERRIDES, *more]
    command = [sys.executable, "launch/local.py", "--processes=2", "--", *wrapper, *train]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=runs.environment(), cwd=runs.ROOT)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that the launcher has started, in their order."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return sorted(map(int, file.read().split()))


@pytest.fixture(scope="module")
def undisturbed():
    """`file`, an experiment, and `run`, where two processes took it to its end."""

    def train(folder) -> str:
        done = finish(start(runs.write_experiment(folder), folder / "run", "--json"))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    folder, stdout = runs.once("two", train)
    return types.SimpleNamespace(file=folder / "minute.py", run=folder / "run", stdout=stdout)


def test_process_0_alone_writes_and_prints(undisturbed):
    assert json.loads(undisturbed.stdout) == runs.rows(undisturbed.run)[-1]
    assert [row["step"] for row in runs.rows(undisturbed.run)] == list(range(1, STEPS + 1))
    assert json.loads((undisturbed.run / "run.json").read_text())["processes"] == 2
    both = Store(undisturbed.run / "checkpoints")
    _, data = both.restore(abstract_state(load_experiment(str(undisturbed.file))))
    lanes = [state["identity"]["lane"] for state in data["pipelines"]]
    assert lanes == [[0, 2], [1, 2]] and runs.rows(undisturbed.run)[-1]["documents"] >= 2


def test_one_is_killed_the_other_says_so_and_both_resume_exactly(undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(undisturbed.file, run)
    assert runs.wait_for(process, lambda: runs.step_of(run) >= EVERY + 2), finish(process)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = finish(process)
    assert killed.returncode == 128 + signal.SIGKILL
    assert "process 0: process 1 has died" in killed.stderr and "Start all processes again" in killed.stderr
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert newest < STEPS and f"the run goes on after step {newest}\n" in killed.stderr
    assert "launch/local.py: process 1 was ended by SIGKILL" in killed.stderr

    again = finish(start(undisturbed.file, run))
    assert again.returncode == 0, again.stderr[-3000:]
    assert runs.untimed(run) == runs.untimed(undisturbed.run)
    abstract = abstract_state(load_experiment(str(undisturbed.file)))
    (state, data), (want, want_data) = (Store(r / "checkpoints").restore(abstract) for r in (run, undisturbed.run))
    assert data == want_data
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(want), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path


def test_one_process_goes_on_with_the_data_of_two(undisturbed, tmp_path):
    """From a checkpoint in the middle, with two lanes, the same documents come in every step."""
    run = shutil.copytree(undisturbed.run, tmp_path / "run")
    for step in range(2 * EVERY + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    alone = runs.k25("train", f"--config={undisturbed.file}", f"--workdir={run}", *OVERRIDES)
    assert alone.returncode == 0, alone.stderr
    both = [runs.untimed(folder) for folder in (run, undisturbed.run)]
    same = ("step", "tokens", "documents", "clips", "media_tokens", "text_tokens", "vision_tokens")
    assert [[row[name] for name in same] for row in both[0]] == [[row[name] for name in same] for row in both[1]]
    np.testing.assert_allclose([row["loss"] for row in both[0]], [row["loss"] for row in both[1]], rtol=1e-4)


@pytest.mark.slow
def test_both_validate_and_save_by_the_clock_of_the_first(undisturbed, tmp_path):
    run, more = tmp_path / "run", ("data.validation.one_in=3", "train.eval_every=2", "train.steps=4")
    times = ("train.checkpoint_minutes=1e-6", "train.checkpoint_every=100", "train.keep=9", "profile.start=3")
    later_in_1 = ("sh", "-c", '[ $JAX_PROCESS_ID = 0 ] || set -- "$@" train.checkpoint_minutes=99.0; exec "$@"', "sh")
    more += (*times, "profile.everywhere=True", "profile.steps=1")
    done = finish(start(undisturbed.file, run, *more, wrapper=later_in_1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert Store(run / "checkpoints").steps() == [1, 2, 3, 4]
    assert ["validation/loss" in row for row in runs.rows(run)] == [False, True, False, True]
    assert all(list((run / "profile" / f"process_{index}").rglob("*.xplane.pb")) for index in range(2))


@pytest.mark.slow
def test_a_signal_to_one_saves_the_step_in_hand_of_both(undisturbed, tmp_path):
    """As when one host of a pod is to be maintained; in the middle, between checkpoints. Then both go on."""
    run, more = tmp_path / "run", ("train.steps=400", "train.checkpoint_every=1000")
    process = start(undisturbed.file, run, *more)
    assert runs.wait_for(process, lambda: runs.step_of(run) >= 2), finish(process)
    os.kill(children(process)[1], signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    (step,) = Store(run / "checkpoints").steps()
    assert runs.step_of(run) == step < 400 and f"stopped; step {step} is saved in {run}" in done.stderr
    assert "Traceback" not in done.stderr and "has died" not in done.stderr
    again = finish(start(undisturbed.file, run, f"train.steps={step + 2}"))
    assert again.returncode == 0 and [row["step"] for row in runs.rows(run)] == list(range(1, step + 3))


def test_data_in_other_lanes_is_refused(undisturbed):
    more = runs.k25("train", f"--config={undisturbed.file}", f"--workdir={undisturbed.run}", *OVERRIDES, "data.lanes=1")
    assert more.returncode == 2 and "the data was read in data.lanes=2, now in 1; set as many" in more.stderr


def test_too_few_lanes_are_refused(undisturbed, tmp_path):
    done = finish(start(undisturbed.file, tmp_path / "run", "data.lanes=1"))
    assert done.returncode == 2 and "data.lanes=1 must be a multiple of the 2 processes that read" in done.stderr


def test_an_error_in_one_ends_both(undisturbed, tmp_path):
    only_1 = (
        "sh",
        "-c",
        '[ $JAX_PROCESS_ID = 0 ] || set -- "$@" "data.sources=[{\'path\':\'no.jsonl\'}]"; exec "$@"',
        "sh",
    )
    done = finish(start(undisturbed.file, tmp_path / "run", wrapper=only_1))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "[1] k25 train: error: process 1: data.sources: there is nothing at no.jsonl" in done.stderr
    assert "process 0: process 1 failed (DataError: data.sources: there is nothing at no.jsonl" in done.stderr


def test_ctrl_c_ends_both(undisturbed, tmp_path):
    process = start(undisturbed.file, tmp_path / "run")
    assert runs.wait_for(process, (tmp_path / "run" / "run.json").exists)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stderr
