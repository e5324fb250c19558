"""A run with validations, a profile and checkpoints by minutes: what they say, that resuming changes nothing, the report."""

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.models.k25 import forward
from k25_jax.report.run import write_run_report
from k25_jax.train.layout import mesh_of
from k25_jax.train.loop import train
from k25_jax.train.state import abstract_state
from k25_jax.train.validation import held_out

CHANGES = ["train.steps=7", "train.eval_every=3", "train.checkpoint_every=3", "train.log_every=2", "train.keep=5"]
CHANGES += ["data.validation.one_in=4", "data.validation.batches=2", "optim.name=muonclip", "train.max_bad_steps=2"]
CHANGES += ["profile.start=5", "profile.steps=2"]


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`experiment`, `folder` of a run that nobody disturbed, `rows` of its metrics, `said` in its log."""
    folder, said = tmp_path_factory.mktemp("validation"), []
    experiment = load_experiment(str(runs.write_experiment(folder)), CHANGES)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("k25_jax.train.profiling")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    train(experiment, folder / "run")
    logger.removeHandler(handler)
    return types.SimpleNamespace(
        experiment=experiment, folder=folder / "run", rows=runs.rows(folder / "run"), said=said
    )


def test_the_loss_is_that_of_the_held_out_tokens_at_that_step(run):
    """Computed anew, from whole logits, with the weights of the checkpoints."""
    validated = {row["step"]: row for row in run.rows if "validation/loss" in row}
    assert list(validated) == [3, 6, 7] and [row["step"] for row in run.rows] == [2, 3, 4, 6, 7]
    experiment = run.experiment
    pipeline = make_pipeline(held_out(experiment.data), experiment.model, experiment.train.steps, held_out=True)
    batches = [next(pipeline) for _ in range(2)]
    pipeline.close()
    store = Store(run.folder / "checkpoints")
    for step, row in validated.items():
        state, _ = store.restore(abstract_state(experiment, mesh_of(experiment)), step)
        total = weight = 0.0
        for batch in batches:
            logits_BLV = np.asarray(
                jax.jit(forward, static_argnums=2)(state.params, batch, experiment.model), np.float64
            )
            normaliser_BL = np.log(np.exp(logits_BLV).sum(axis=-1))
            target_BL = np.take_along_axis(logits_BLV, batch.targets_BL[..., None], axis=-1)[..., 0]
            total += ((normaliser_BL - target_BL) * batch.loss_weights_BL).sum()
            weight += batch.loss_weights_BL.sum()
        np.testing.assert_allclose(row["validation/loss"], total / weight, rtol=1e-4)
        assert row["validation/target_weight"] == weight > 0
    store.close()


def test_killed_with_a_step_in_flight_it_goes_on_as_if_nothing_had_happened(run, tmp_path):
    """Killed when the metrics of step 4 are written, while the devices are at work on step 5 and batch 6 is made."""

    def kill(step, _):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(run.experiment, tmp_path / "run", kill)
    train(run.experiment, tmp_path / "run")
    assert runs.untimed(tmp_path / "run") == runs.untimed(run.folder)
    abstract = abstract_state(run.experiment, mesh_of(run.experiment))
    (state, data), (want, want_data) = (
        Store(r / "checkpoints").restore(abstract) for r in (tmp_path / "run", run.folder)
    )
    assert data == want_data
    jax.tree.map(np.testing.assert_array_equal, state, want)


def test_rates_and_norms_are_logged(run):
    for row in run.rows:
        rate = min(1.0, row["step"] / 2) * run.experiment.optim.peak_lr
        decayed = run.experiment.optim.decay_steps > run.experiment.train.steps
        assert decayed or row["learning_rate"] == pytest.approx(rate, rel=1e-5)
        parts = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert len(parts) == 10
        assert row["grad_norm"] == pytest.approx(np.sqrt(np.square(parts).sum()), rel=1e-4)
        for part in ("embed", "experts", "attention", "vision", "head"):
            assert row[f"update_norm/{part}"] > 0


def test_the_profile_is_of_its_steps(run):
    assert run.said[0] == "profile: begins with step 5, to end with step 6"
    assert run.said[1].startswith("profile: ended with step 6, is in ") and len(run.said) == 2
    (trace,) = (run.folder / "profile" / "process_0").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_profile_of_steps_that_are_done_is_none(run, caplog):
    train(run.experiment, run.folder)
    assert "profile.start=5 is before step 8" in caplog.text
    assert len(list((run.folder / "profile").rglob("*.xplane.pb"))) == 1


def test_the_report_draws_them(run):
    page = write_run_report(run.folder).read_text()
    for title in ("Learning rate", "Gradient norm by part of the model", "Norm of the update by part of the model"):
        assert title in page


def test_sources_of_their_own_and_the_end_of_schedules(run):
    data = run.experiment.data
    source = dataclasses.replace(data.sources[0], weight=((0.0, 1.0), (0.5, 3.0)), max_epochs=2.0)
    gone = dataclasses.replace(source, weight=((0.0, 1.0), (0.5, 0.0)))
    data = dataclasses.replace(data, sources=(source, gone), vision_share=((0.0, 0.5), (0.5, 0.2)), text_tokens=100)
    found = held_out(data)
    assert [(s.weight, s.max_epochs) for s in found.sources] == [(3.0, 0.0)]
    assert found.vision_share == 0.2 and found.text_tokens == 0 and found.validation.one_in == 4
    own = dataclasses.replace(data.validation, sources=(source,), one_in=0)
    found = held_out(dataclasses.replace(data, validation=own))
    assert [s.weight for s in found.sources] == [3.0] and found.vision_share is None and not found.validation.one_in
