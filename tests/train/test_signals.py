"""Signals at random moments of a real `k25 train`, from its start on, and of a sweep: nothing is lost, nothing differs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.folders import complete_steps
from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.train.state import abstract_state

MOMENTS = 20
LONG = ("--config.train.steps=3000", "--config.train.checkpoint_every=250")


def start(file: pathlib.Path, run: pathlib.Path, *more: str) -> subprocess.Popen:
    """`k25 train` that compiles anew."""
    command = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={file}", f"--workdir={run}", *LONG, *more]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    variables |= {"PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu", "K25_NO_CACHE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables, cwd=runs.ROOT)


def assert_equal(file, run: pathlib.Path, other: pathlib.Path):
    """All metrics but the timings, the data's state and every bit of the model's and the optimizer's."""
    assert runs.untimed(run) == runs.untimed(other)
    abstract = abstract_state(load_experiment(str(file)))
    (state, data), (expected, expected_data) = (Store(r / "checkpoints").restore(abstract) for r in (run, other))
    assert data == expected_data
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


def worked(process: subprocess.Popen) -> float:
    """Seconds that the process has had of a processor, however busy the machine is."""
    times = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def last_saved(run: pathlib.Path) -> int:
    return max(complete_steps(run / "checkpoints"), default=0)


@pytest.mark.slow
def test_twenty_random_moments(tmp_path):
    file, rng = runs.write_experiment(tmp_path), np.random.default_rng(int(time.time()))
    undisturbed, run, table = tmp_path / "undisturbed", tmp_path / "run", []
    process = start(file, undisturbed)
    assert runs.wait_for(process, lambda: runs.step_of(undisturbed) >= 1)
    first_step = worked(process)
    assert process.communicate(timeout=900) and process.returncode == 0
    for number in range(MOMENTS):
        how = (signal.SIGTERM, signal.SIGINT)[number % 2]
        before, process = last_saved(run), start(file, run)
        moment = float(rng.uniform(0, first_step)) if number % 3 else first_step + float(rng.uniform(0, 2))
        assert runs.wait_for(process, lambda process=process, moment=moment: worked(process) >= moment), "ended already"
        process.send_signal(how)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        seconds, at_once = time.monotonic() - began, "ended by" in err or process.returncode < 0
        table.append((how.name, round(moment, 2), round(seconds, 2), process.returncode, before, last_saved(run)))
        print(*table[-1], sep="\t")
        assert "Traceback" not in err or moment < 0.5, err  # Python itself was starting
        assert process.returncode in (128 + how, -how, 1 if moment < 0.5 else 128 + how), err
        assert seconds < (2 if at_once else 30), table[-1]
        if at_once or moment < 0.5:
            assert last_saved(run) == before
        else:
            assert last_saved(run) == runs.step_of(run) > before, err
            assert f"step {last_saved(run)} is saved" in err
    process = start(file, run)
    process.communicate(timeout=900)
    assert process.returncode == 0
    assert_equal(file, run, undisturbed)
    assert {row[3] for row in table} >= {130, 143} and any(row[5] > row[4] for row in table)


SWEEP = """

def get_hyper():
    return [dict(name=name, overrides=(f"train.seed={seed}",)) for seed, name in enumerate(("first", "second"))]
"""


@pytest.mark.slow
def test_a_sweep_that_is_stopped_saves_its_runs_and_goes_on(tmp_path):
    file, folder = runs.write_experiment(tmp_path), tmp_path / "runs"
    file.write_text(file.read_text() + SWEEP)
    command = ("sweep", f"--config={file}", f"--workdir={folder}", "--config.train.checkpoint_every=400")
    process = runs.start(*command)
    assert runs.wait_for(process, lambda: runs.step_of(folder / "first") >= 5), process.communicate()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    saved = last_saved(folder / "first")
    assert process.returncode == 143, err
    assert saved >= 5 and runs.step_of(folder / "first") == saved and not (folder / "second").exists()
    assert f"first: stopped, goes on after step {saved} when the sweep is started again" in err
    assert f"step {saved} is saved" in (folder / "first" / "log.txt").read_text()
    done = runs.k25(*command, "--only=first")
    assert done.returncode == 0 and "first: done" in done.stderr
    assert runs.step_of(folder / "first") == runs.STEPS
