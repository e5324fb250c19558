"""A source that waits for weights, and is given up meanwhile."""

import threading

import pytest

import rollouts
from k25_jax.config import ConfigError, load_experiment
from k25_jax.rl.sampler import Cancelled
from k25_jax.train.feed import Feed
from k25_jax.train.layout import mesh_of
from k25_jax.train.rollouts import open_source


@pytest.fixture
def experiment(tmp_path):
    return load_experiment(str(rollouts.write_experiment(tmp_path)))


def test_who_waits_for_weights_is_let_go(experiment, tmp_path):
    source, ended = open_source(experiment, mesh_of(experiment), tmp_path), []

    def wait():
        try:
            next(source)
        except Cancelled as end:
            ended.append(end)

    thread = threading.Thread(target=wait)
    thread.start()
    source.publish(7, None)  # not those that it waits for
    thread.join(0.2)
    assert thread.is_alive()
    source.cancel()
    thread.join(30)
    assert not thread.is_alive() and ended
    with pytest.raises(Cancelled):
        next(source)
    source.close()


def test_a_feed_that_is_closed_while_its_batch_waits_ends(experiment, tmp_path):
    """So does a run that a signal ends between two steps."""
    mesh = mesh_of(experiment)
    feed = Feed(open_source(experiment, mesh, tmp_path), experiment, mesh)
    batches = feed.batches(0, 2)
    taker = threading.Thread(target=lambda: pytest.raises(Cancelled, next, batches))
    taker.start()
    closer = threading.Thread(target=feed.close)
    closer.start()
    for thread in (closer, taker):
        thread.join(30)
        assert not thread.is_alive()


def test_stages_of_a_pipeline_in_another_order_are_refused(experiment, tmp_path):
    import dataclasses

    mesh = mesh_of(experiment)
    other = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, pipe=2, repeats=2))
    with pytest.raises(ConfigError, match="mesh.repeats=2.*set it to 1"):
        open_source(other, mesh, tmp_path)
