"""Held-out records: two parts that are the whole, the same ones whatever the lanes, and none of them in training."""

import numpy as np
import pytest

import runs
from k25_jax.config import ConfigError, load_experiment
from k25_jax.data.holdout import Part
from k25_jax.data.pipeline import make_pipeline
from k25_jax.data.records import DataError, Record, Source


class Numbers(Source):
    """Records that are their numbers."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return Record(str(index), {"text": str(index)}, None)


def records(part: Part) -> list[int]:
    return [int(part[i].name) for i in range(len(part))]


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("one_in", [2, 3, 10])
def test_the_two_parts_are_the_whole(count, one_in):
    training, held_out = (records(Part(Numbers(count), one_in, 5, held)) for held in (False, True))
    assert sorted(training + held_out) == list(range(count))
    assert len(held_out) == count // one_in
    assert training == sorted(training) and held_out == sorted(held_out)


def test_the_draw_is_seeded_and_even():
    places = np.array(records(Part(Numbers(30_000), 10, 1, True))) % 10
    assert np.bincount(places, minlength=10).min() > 240  # of 300 expected
    assert (places != np.array(records(Part(Numbers(30_000), 10, 2, True))) % 10).mean() > 0.8


def handed_out(experiment, held_out: bool, lanes: range | None, batches: int) -> set[int]:
    """The numbers of the texts "a line of text, number i" that some batches hold."""
    pipeline = make_pipeline(experiment.data, experiment.model, 100, lanes, held_out)
    rows = [next(pipeline).tokens_BL for _ in range(batches)]
    pipeline.close()
    # what is no byte ends a text; the end of a row may only cut it
    text = b"\0".join(bytes(np.where(row < 256, row, 10).astype(np.uint8)) for row in np.concatenate(rows))
    return {number for number in range(12) if f"number {number}\n".encode() in text}


def test_training_never_sees_what_is_held_out(tmp_path):
    file = str(runs.write_experiment(tmp_path))
    lanes = ["data.lanes=2", "data.packs=2"]
    experiment = load_experiment(file, ["data.validation.one_in=4", *lanes])
    seen, held = (handed_out(experiment, held_out, None, 40) for held_out in (False, True))
    numbers = records(Part(Numbers(36), 4, experiment.data.seed, True))
    expected = {number // 3 for number in numbers if number % 3 == 0}  # a text is the first of three records
    assert expected and held == expected and not seen & held and seen | held == set(range(12))
    of_two = [handed_out(experiment, True, range(lane, lane + 1), 40) for lane in range(2)]
    assert of_two[0] | of_two[1] == held


def test_too_few_records_are_refused(tmp_path):
    file = str(runs.write_experiment(tmp_path))
    experiment = load_experiment(file, ["data.validation.one_in=20", "data.lanes=2", "data.packs=2"])
    with pytest.raises(
        DataError, match=r"data.validation.one_in=20 leaves .* 1 for validation, fewer than data.lanes=2"
    ):
        make_pipeline(experiment.data, experiment.model, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.validation.one_in=1"], "one_in=1 must be at least 2"),
        (["data.validation.one_in=4", "data.validation.sources=[{'path': 'x'}]"], "exclude each other"),
        (["train.eval_every=5"], "train.eval_every=5 needs data to validate on"),
        (["data.validation.batches=0"], "batches=0 must be positive"),
        (["data.validation.on_in=4"], "did you mean 'one_in'"),
        (["train.checkpoint_minutes=-1"], "checkpoint_minutes=-1.0 must not be negative"),
        (["profile.start=-1"], "profile.start=-1 must not be negative"),
    ],
)
def test_configurations_that_cannot_be_meant(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(str(runs.write_experiment(tmp_path)), changes)
