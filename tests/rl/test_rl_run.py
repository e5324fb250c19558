"""A small run of the stage rl from the base model, through the loop of pre-training."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest

import rollouts
import runs
from k25_jax.config import load_experiment
from k25_jax.report.run import write_run_report
from k25_jax.rl.batches import batch_of
from k25_jax.rl.ledger import Ledger, LedgerError
from k25_jax.rl.start import find_out
from k25_jax.train.layout import mesh_of
from k25_jax.train.loop import train
from k25_jax.train.rollouts import LearnerLogprobs
from k25_jax.train.run import restore_or_init


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("rl")
    train(load_experiment(str(rollouts.write_experiment(folder, every=5))), folder / "run")
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("k25-engine", "k25-feed", "k25-kernel-pool"))], (
        "all is closed"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def experiment(run):
    return load_experiment(str(run.parent / "small.py"))


class Fresh:
    """A store without checkpoints."""

    def steps(self):
        return []


@pytest.fixture(scope="module")
def start(run, experiment):
    """(the start model's parameters, the groups of the first batch)."""
    params = restore_or_init(experiment, Fresh(), None, mesh_of(experiment))[0].params
    ledger = Ledger(run / "rl")
    found = find_out(ledger, experiment.rl, experiment.data.seed, None, None)
    groups = [found.group(problem, ledger.group(name)) for name, problem in found.asked_in(0).items()]
    return params, groups


def test_each_batch_is_sampled_by_the_weights_after_the_last_update_of_the_one_before(run):
    records = rollouts.batches(run)
    assert [record["version"] for record in records] == [0, 2, 4, 6]
    ledger = Ledger(run / "rl")
    for record in records:
        assert len(record["groups"]) == rollouts.GROUPS
        for name in record["groups"]:
            traces = ledger.group(name)
            assert len(traces) == rollouts.SAMPLES and len({trace.id for trace in traces}) == rollouts.SAMPLES
            for trace in traces:
                for segment in trace.segments:
                    assert set(segment.versions[segment.sampled].tolist()) == {record["version"]}


def test_each_batch_is_consumed_twice_in_its_order(run):
    rows = runs.rows(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["batch"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["update_of_batch"] for row in rows] == [0, 1] * 4
    tokens = [record["sampled_tokens"] for record in rollouts.batches(run)]
    assert [row["tokens_sampled_so_far"] for row in rows] == np.repeat(np.cumsum(tokens), 2).tolist()
    assert [row["sampled_tokens"] for row in rows] == np.repeat(tokens, 2).tolist(), "those of the loss"


def test_the_learner_sees_what_the_sampler_saw(run):
    """Over the run, each batch's first update has ratios of 1; its second one has not."""
    rows = runs.rows(run)
    for row in rows[::2]:
        assert row["mismatch"] <= 1e-5 and row["mismatch_large"] <= 1e-4, row
    moved = [row for row, before in zip(rows[1::2], rows[::2], strict=True) if not before["skipped"]]
    assert moved and all(row["mismatch"] > 1e-4 for row in moved)
    assert all(row["skipped"] == (row["unequal_groups"] < 1) for row in rows)
    assert rows[-1]["skipped_updates"] == sum(row["skipped"] for row in rows)


def test_a_learner_whose_pictures_are_blank_is_told_at_once(experiment, start):
    """The mismatch of sampler and learner is a thousandth of a thousandth, and a learner who sees nothing shows."""
    params, groups = start
    if not any(trace.clips for group in groups for trace in group.traces):
        pytest.fail("the first batch of this seed has no picture: choose another seed")
    shown = [group for group in groups if any(trace.clips for trace in group.traces)]
    batch, _ = batch_of(shown, 0, experiment.rl, experiment.data, experiment.model)
    learner, sampled_BL = LearnerLogprobs(experiment, mesh_of(experiment)), batch.loss_weights_BL > 0
    off = lambda batch: np.abs(learner(params, batch) - batch.old_logprobs_BL)[sampled_BL].mean()  # noqa: E731
    blank = batch.replace(vision=batch.vision.replace(patches_PNC=np.zeros_like(batch.vision.patches_PNC)))
    assert off(batch) <= 1e-5 and off(blank) >= 100 * off(batch)


def test_metrics_say_what_the_traces_were_worth(run):
    row, ledger = runs.rows(run)[0], Ledger(run / "rl")
    traces = [trace for name in rollouts.batches(run)[0]["groups"] for trace in ledger.group(name)]
    assert row["reward"] == pytest.approx(np.mean([trace.rewards["outcome"] for trace in traces]))
    assert row["length"] == pytest.approx(np.mean([trace.length for trace in traces]))
    for trace in traces:
        task = trace.task.partition(":")[0]
        assert f"reward/{task}" in row and f"pass_rate/{task}" in row
    assert {"entropy", "clipped_low", "clipped_high", "sampling_seconds", "learning_seconds", "waiting_seconds"} <= set(
        row
    )
    assert [r["sampling_seconds"] > 0 for r in runs.rows(run)] == [True, False] * 4


def test_a_report_can_be_made_of_it(run):
    assert write_run_report(run).stat().st_size > 1000


def test_the_ledger_alone_gives_the_same_bits_again(run, experiment, tmp_path):
    """A run that finds all batches committed samples nothing, and ends with the same weights and means."""
    shutil.copytree(run / "rl", tmp_path / "again" / "rl")
    before = rollouts.committed(tmp_path / "again")
    train(experiment, tmp_path / "again")
    assert rollouts.committed(tmp_path / "again") == before
    assert rollouts.bits(tmp_path / "again") == rollouts.bits(run)
    assert rollouts.untimed(tmp_path / "again") == rollouts.untimed(run)


def test_a_run_that_goes_on_takes_up_the_batch_where_it_stopped(run, experiment, tmp_path):
    """Its last checkpoint but one lies within a batch."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert [int(folder.name) % 2 for folder in (tmp_path / "run" / "checkpoints").glob("[0-9]")] == [1]
    train(experiment, tmp_path / "run")
    assert rollouts.bits(tmp_path / "run") == rollouts.bits(run)
    assert rollouts.untimed(tmp_path / "run") == rollouts.untimed(run)


def test_another_configuration_or_model_does_not_go_on(run, experiment, tmp_path):
    shutil.copytree(run / "rl", tmp_path / "run" / "rl")
    other = dataclasses.replace(experiment, rl=dataclasses.replace(experiment.rl, samples=3))
    with pytest.raises(LedgerError, match="rl.samples=4, now it is 3"):
        train(other, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rl" / "batches")
    shutil.rmtree(tmp_path / "run" / "rl" / "groups")
    other = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, init_from=""))
    with pytest.raises(LedgerError, match="start.json is of the model"):
        train(other, tmp_path / "run")


def test_in_bfloat16_the_trainer_says_what_the_policy_was(run, experiment, tmp_path):
    """Its first update begins nearer to ratios of 1; what the engine had is corrected for, measured, kept for a resumption.

    Not at 1: in bfloat16 the program without gradients rounds otherwise than that of the training step.
    """
    rl = dataclasses.replace(experiment.rl, old_logprobs="trainer", estimate=0)
    settings = dataclasses.replace(experiment.train, compute_dtype="bfloat16", steps=2, checkpoint_every=1)
    other = dataclasses.replace(experiment, rl=rl, train=settings)
    train(other, tmp_path / "run")
    first, second = runs.rows(tmp_path / "run")
    assert 1e-4 < 2 * first["mismatch"] < first["engine_mismatch"] < 0.1
    assert first["engine_mismatch"] == second["engine_mismatch"] and 0 <= first["engine_corrected"] < 0.1
    ended = rollouts.bits(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    train(other, tmp_path / "run")
    assert rollouts.bits(tmp_path / "run") == ended
