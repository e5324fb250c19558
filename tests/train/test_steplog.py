"""Metrics one step late: what is read when, counted and written; and when checkpoints are due."""

import numpy as np
import pytest

import runs
from k25_jax.config import TrainConfig, load_experiment
from k25_jax.report.metrics import read_metrics
from k25_jax.train.feed import Ready
from k25_jax.train.layout import mesh_of, open_data
from k25_jax.train.saving import Saving
from k25_jax.train.steplog import BadSteps, StepLog

LATE = ["train.log_every=3", "train.steps=8", "train.max_bad_steps=3"]


class Device:
    """Metrics of a step; whether somebody has waited for them."""

    def __init__(self, bad: bool = False):
        self.read, self._bad = False, bad

    def items(self):
        self.read = True
        return {"loss": np.float32(np.nan if self._bad else 2.0), "bad": np.int32(self._bad)}.items()


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a log; and what a step takes."""
    monkeypatch.setattr("k25_jax.train.steplog.jax.device_get", lambda metrics: metrics)
    experiment = load_experiment(str(runs.write_experiment(tmp_path)), LATE)
    mesh = mesh_of(experiment)
    pipeline = open_data(experiment, mesh)
    ready = Ready(None, {"tokens": 10}, pipeline.get_state(), 0.0, 0.0)
    pipeline.close()

    def log(start: int = 0, bad: int = 0) -> StepLog:
        return StepLog(experiment, mesh, tmp_path, start, bad)

    return log, ready, lambda: [row["step"] for row in read_metrics(tmp_path)]


def test_a_step_is_read_when_the_next_one_was_sent(opened):
    log, ready, steps = opened
    with log() as log:
        devices = {step: Device() for step in range(1, 9)}
        for step in range(1, 5):
            log.sent(step, devices[step], ready)
            assert [s for s in devices if devices[s].read] == list(range(1, step))
        assert steps() == [3]
        log.read()
        assert devices[4].read and steps() == [3]  # before a checkpoint or at a signal: as if the run had gone on
        log.sent(5, devices[5], ready)
        log.read(lambda: {"validation/loss": 1.5}, log_it=True)
        assert steps() == [3, 5]
        for step in (6, 7, 8):
            log.sent(step, devices[step], ready)
        log.finish()
        assert steps() == [3, 5, 6, 8]  # the last one too


def test_the_last_step_is_logged_once_though_it_was_read_before(opened):
    log, ready, steps = opened
    with log() as log:
        log.sent(8, Device(), ready)
        log.read()
        log.finish()
        log.finish()
    assert steps() == [8]


def test_bad_steps_are_counted_and_end_the_run_one_step_late(opened):
    log, ready, steps = opened
    with log(start=3, bad=1) as log:
        log.sent(4, Device(bad=True), ready)
        log.sent(5, Device(), ready)
        assert log.bad_in_a_row == 2
        log.read()
        assert log.bad_in_a_row == 0
        for step in (6, 7, 8):
            log.sent(step, Device(bad=True), ready)
        with pytest.raises(BadSteps, match="3 steps in a row up to step 8"):
            log.read()
    assert steps() == [4, 6, 7, 8]


def test_checkpoints_by_steps_and_by_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("k25_jax.train.saving.time.monotonic", lambda: now[0])
    saving, saved = Saving(TrainConfig(checkpoint_every=10, checkpoint_minutes=2.0)), []
    for step in range(1, 31):
        now[0] += 30.0 if step < 15 else 1.0
        if saving.decide(step, 0).save:
            saved.append(step)
    assert saved == [4, 8, 10, 14, 20, 30]  # every 2 minutes of 30 s a step, and every 10 steps
    by_steps = Saving(TrainConfig(checkpoint_every=10))
    assert [step for step in range(1, 31) if by_steps.decide(step, 0).save] == [10, 20, 30]
    assert by_steps.decide(31, 15) == (False, 15)
