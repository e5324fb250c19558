"""Batches one step ahead: what belongs to the batch in hand, and no more work than that."""

import threading
import time

import jax
import numpy as np
import pytest

import runs
from k25_jax.config import load_experiment
from k25_jax.parallel import hosts
from k25_jax.train.feed import Feed
from k25_jax.train.layout import mesh_of, open_data


class Counted:
    """A pipeline that says how many batches were taken of it, and in which threads."""

    def __init__(self, pipeline, fails_at: int = 0):
        self.pipeline, self.fails_at, self.taken, self.threads = pipeline, fails_at, 0, set()

    def __next__(self):
        self.threads.add(threading.current_thread())
        if self.taken + 1 == self.fails_at:
            raise OSError("the disk is gone")
        batch = next(self.pipeline)
        self.taken += 1
        return batch

    def __getattr__(self, name):
        return getattr(self.pipeline, name)


@pytest.fixture
def experiment(tmp_path):
    return load_experiment(str(runs.write_experiment(tmp_path)))


def opened(experiment, fails_at: int = 0) -> Feed:
    mesh = mesh_of(experiment, jax.devices()[:1])
    return Feed(Counted(open_data(experiment, mesh), fails_at), experiment, mesh)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_next_batch_is_made_and_placed_meanwhile_and_only_that_one(experiment, monkeypatch):
    feed = opened(experiment)
    made = []
    placed = hosts.placed
    monkeypatch.setattr(hosts, "placed", lambda plan: made.append(plan) or placed(plan))
    for step, _ in feed.batches(3, 7):
        wait_until(lambda step=step: len(made) == min(step - 3 + 1, 4))
        time.sleep(0.05)
        assert feed.pipeline.taken == len(made) == min(step - 3 + 1, 4)
    assert step == 7 and threading.main_thread() not in feed.pipeline.threads
    feed.close()


def test_the_state_is_that_of_the_batch_in_hand_whatever_was_read_ahead(experiment):
    feed = opened(experiment)
    for step, ready in feed.batches(0, 5):
        wait_until(lambda step=step: feed.pipeline.taken == min(step + 1, 5))
        if step == 2:
            state = ready.data_state
        if step == 3:
            third = jax.device_get(ready.batch)
    feed.close()
    again = opened(experiment)
    again.pipeline.set_state(state)
    _, ready = next(iter(again.batches(2, 3)))
    for got, want in zip(jax.tree.leaves(ready.batch), jax.tree.leaves(third), strict=True):
        np.testing.assert_array_equal(got, want)
    again.close()


def test_an_error_of_the_data_comes_with_the_step_that_needed_it(experiment):
    feed, steps = opened(experiment, fails_at=3), []
    with pytest.raises(OSError, match="the disk is gone"):
        for step, _ in feed.batches(0, 9):
            steps.append(step)
    assert steps == [1, 2]
    feed.close()
