import collections
import dataclasses
import io
import json
import logging
import re
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.lane import LOGGED
from k25_jax.data.packing import batch_stats
from k25_jax.data.pipeline import Preparer, check, counts, make_pipeline, records_of
from k25_jax.data.records import DataError, Record
from k25_jax.data.sources import open_source
from k25_jax.data.statistics import Counts, Reader
from k25_jax.text.tokenizer import load_tokenizer

MODEL = preset("tiny")
TOKENIZER = load_tokenizer()


def png(seed):
    file = io.BytesIO()
    generator = np.random.default_rng(seed)
    size = 28 * generator.integers(1, 4, 2)
    Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder, name, records):
    """A JSONL file; returns its path."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def texts(letter, count):
    """Records that name themselves: <a0>, <a1>, .. with 2 to 40 more letters."""
    generator = np.random.default_rng(ord(letter))
    return [{"text": f"<{letter}{i}>" + letter * int(generator.integers(2, 40))} for i in range(count)]


def mixed(folder, count=30):
    """Text, images, chat, long documents, and some records that cannot be used."""
    records = texts("t", count)
    for i in range(0, count, 3):
        (folder / f"{i}.png").write_bytes(png(i))
        records[i] = {"parts": [{"image": f"{i}.png"}, {"text": f"<i{i}>"}]}
    records[4] = {"text": "long " * 200}
    records[8] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<m8>"}]}
    records[10] = {"parts": [{"image": "0.png"}, {"text": "z" * 100}]}
    records[13] = "not json"
    records[17] = {"parts": [{"image": "missing.png"}, {"text": "x"}]}
    return records


def config(*paths, weights=None, **fields):
    sources = tuple(
        SourceConfig(path, weight=weight) for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)
    )
    return DataConfig(sources=sources, **{"batch_size": 3, "seq_len": 64, "packs": 2, "pack_patches": 64} | fields)


def documents(batch):
    """The text of every document in a batch."""
    out = []
    for tokens, segments in zip(batch.tokens_BL, batch.segments_BL, strict=True):
        for segment in range(1, segments.max() + 1):
            out.append(TOKENIZER.decode(tokens[segments == segment], skip_special=True))
    return out


def names(iterator, count, start="<"):
    """The first `count` names that documents begin with, in the order of the batches."""
    out = []
    while len(out) < count:
        whole = [text for text in documents(next(iterator)) if text.startswith(start) and ">" in text]
        out += [text[: text.index(">") + 1] for text in whole]
    return out


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.fixture
def pipeline():
    """make_pipeline, closed at the end."""
    opened = []

    def make(data, lanes=None):
        opened.append(make_pipeline(data, MODEL, 1000, lanes))
        return opened[-1]

    yield make
    for iterator in opened:
        iterator.close()


# --------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("shuffle", [True, False])
def test_resumed_equals_uninterrupted_at_every_batch(tmp_path, pipeline, shuffle):
    paths = write(tmp_path, "a.jsonl", mixed(tmp_path, 20)), write(tmp_path, "b.jsonl", texts("b", 7))
    data = config(*paths, weights=[3.0, 1.0], shuffle=shuffle)
    whole = pipeline(data)
    states, batches = [whole.get_state()], []
    for _ in range(30):
        batches.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    assert counts(whole)["records"] > 2 * 27  # past the end of the first epoch
    assert any(entry[2] for state in states for entry in state["lanes"][0]["waiting"])  # in the middle of a document
    resumed = pipeline(data)
    for i in reversed(range(30)):
        resumed.set_state(states[i])
        assert resumed.get_state() == states[i]
        for j in range(i, min(i + 2, 30)):
            assert_same(next(resumed), batches[j])
            assert resumed.get_state() == states[j + 1]


def test_state_is_that_of_the_batch_handed_out(tmp_path, pipeline):
    iterator = pipeline(config(write(tmp_path, "a.jsonl", texts("a", 40))))
    for number in range(1, 6):
        next(iterator)
        assert counts(iterator)["batches"] == number


def test_state_of_other_data_is_refused(tmp_path, pipeline):
    data = config(write(tmp_path, "a.jsonl", texts("a", 40)))
    state = pipeline(data).get_state()
    other = config(write(tmp_path, "b.jsonl", texts("b", 41)))
    lanes = dataclasses.replace(data, batch_size=4, lanes=2)
    for changed in (pipeline(other), pipeline(dataclasses.replace(data, seed=1)), pipeline(lanes, [0])):
        with pytest.raises(DataError, match="restore the sources, seed and data.lanes"):
            changed.set_state(state)
    with pytest.raises(DataError, match="of 1 lanes, not of 2"):
        pipeline(lanes).set_state(state)
    pipeline(dataclasses.replace(data, batch_size=5)).set_state(state)  # another shape is no other data


def test_record_that_changed_is_counted_not_fatal(tmp_path, pipeline):
    (tmp_path / "docs").mkdir()
    for i in range(6):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"{i}" * 150)
    data = config(str(tmp_path / "docs"), batch_size=1)
    iterator = pipeline(data)
    state = iterator.get_state()
    while not any(entry[2] for entry in state["lanes"][0]["waiting"]):
        next(iterator)
        state = iterator.get_state()
    for i in range(6):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"{i}" * 20)
    resumed = pipeline(data)
    resumed.set_state(state)
    next(resumed)
    assert counts(resumed)["skipped: changed"] >= 1


# ---------------------------------------------------------------------------------------------------- order and mixture
def test_same_seed_same_batches_other_seed_others(tmp_path, pipeline):
    data = config(write(tmp_path, "a.jsonl", mixed(tmp_path)))
    first, second = pipeline(data), pipeline(data)
    other = pipeline(dataclasses.replace(data, seed=1))
    different = False
    for _ in range(8):
        batch = next(first)
        assert_same(batch, next(second))
        different |= not np.array_equal(batch.tokens_BL, next(other).tokens_BL)
    assert different


def test_every_epoch_has_every_record_once_in_another_order(tmp_path, pipeline):
    """Examples may wait for later batches, so an epoch is whole only up to those. Conversations are not cut."""
    records = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text["text"]}]}
        for text in texts("a", 40)
    ]
    iterator, order = pipeline(config(write(tmp_path, "a.jsonl", records), batch_size=1, packs=0)), []
    while len(order) < 160:
        order += [name for text in documents(next(iterator)) for name in re.findall(r"<a\d+>", text)]
    seen = collections.Counter(order)
    assert set(seen) == {f"<a{i}>" for i in range(40)}
    assert max(seen.values()) - min(seen.values()) <= 2
    assert order[:40] != order[40:80]


def stream(data, lane, count, place=0):
    """The names of the first records that a lane reads of a source, before they are packed."""
    records = records_of(open_source(data.sources[place]), data, place, lane)
    return [records[i].data["text"].split(">")[0] for i in range(count)]


def test_order_without_shuffling(tmp_path):
    data = config(write(tmp_path, "a.jsonl", texts("a", 5)), shuffle=False, lanes=1)
    assert stream(data, 0, 20) == [f"<a{i % 5}" for i in range(20)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_lanes_are_disjoint_and_together_complete_in_every_epoch(tmp_path, lanes, shuffle):
    path = write(tmp_path, "a.jsonl", texts("a", 23))
    data = config(path, shuffle=shuffle, batch_size=lanes, packs=lanes, lanes=lanes)
    orders = []
    for epoch in range(3):
        parts = []
        for lane in range(lanes):
            size = len(range(lane, 23, lanes))
            parts += stream(data, lane, 3 * size)[epoch * size : (epoch + 1) * size]
        assert sorted(parts) == sorted(f"<a{i}" for i in range(23))
        orders.append(parts)
    assert (orders[0] != orders[1]) == shuffle and (orders[1] != orders[2]) == shuffle


def test_sources_are_shuffled_independently(tmp_path):
    paths = write(tmp_path, "a.jsonl", texts("a", 20)), write(tmp_path, "b.jsonl", texts("b", 20))
    numbers = [[name[2:] for name in stream(config(*paths, lanes=1), 0, 20, place)] for place in range(2)]
    assert sorted(numbers[0]) == sorted(numbers[1]) and numbers[0] != numbers[1]


def test_every_lane_reads_every_source(tmp_path, pipeline):
    paths = write(tmp_path, "a.jsonl", texts("a", 80)), write(tmp_path, "b.jsonl", texts("b", 80))
    data = config(*paths, batch_size=4, packs=0, lanes=2)
    found = [names(pipeline(data, [lane]), 12) for lane in range(2)]
    assert not set(found[0]) & set(found[1])
    assert {name[1] for name in found[0]} == {name[1] for name in found[1]} == {"a", "b"}


def test_a_source_smaller_than_the_lanes(tmp_path):
    data = config(write(tmp_path, "a.jsonl", texts("a", 3)), batch_size=4, packs=4, lanes=4)
    with pytest.raises(DataError, match="has 3 records for data.lanes=4"):
        make_pipeline(data, MODEL, 9)
    for lanes in ([4], [-1], []):
        with pytest.raises(DataError, match="must be some of the data.lanes=4"):
            make_pipeline(data, MODEL, 9, lanes)


# ---------------------------------------------------------------------------------------------------------- bad records
def test_bad_records_are_skipped_counted_and_named(tmp_path, pipeline, caplog):
    path = write(tmp_path, "a.jsonl", mixed(tmp_path))
    data = config(path, shuffle=False)
    iterator = pipeline(data)
    with caplog.at_level(logging.WARNING):
        while (found := counts(iterator))["records"] < 30:
            next(iterator)
    assert found["skipped: json"] == 1 and found["skipped: missing"] == 1 and found["truncated"] == 1
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{path}:14: skipped (json" in messages and "missing.png" in messages


def test_text_only_batches_drop_media(tmp_path, pipeline):
    iterator = pipeline(config(write(tmp_path, "a.jsonl", mixed(tmp_path)), packs=0))
    while counts(iterator)["records"] < 30:
        batch = next(iterator)
        assert (batch.media_BL == -1).all() and batch.vision.patches_PNC.shape[0] == 0
    assert counts(iterator)["skipped: media"] >= 10


def test_the_log_is_not_flooded(tmp_path, pipeline, caplog):
    path = write(tmp_path, "a.jsonl", ["bad"] * 50 + texts("a", 10))
    iterator = pipeline(config(path))
    with caplog.at_level(logging.WARNING):
        while counts(iterator).get("skipped: json", 0) < 50:
            next(iterator)
    assert sum("skipped (json" in record.getMessage() for record in caplog.records) == LOGGED


def test_nothing_but_bad_records_stops_with_an_error(tmp_path, pipeline):
    with pytest.raises(DataError, match="all of the last 19 records were skipped .*skipped: json"):
        next(pipeline(config(write(tmp_path, "a.jsonl", ["bad"] * 9))))


def test_one_good_record_in_a_light_source_is_found(tmp_path, pipeline):
    paths = write(tmp_path, "a.jsonl", ["bad"] * 20), write(tmp_path, "b.jsonl", ["bad"] * 30 + texts("b", 1))
    iterator = pipeline(config(*paths, weights=[1.0, 0.1], seq_len=16, batch_size=1))
    assert documents(next(iterator))[0].startswith("<b0>")


def test_what_cannot_be_learnt_or_packed_is_skipped(tmp_path, pipeline):
    (tmp_path / "a.png").write_bytes(png(1))
    image = {"image": "a.png"}
    user = [{"role": "user", "content": "only a question"}]
    records = [{"messages": user}, {"parts": [image] * 40 + [{"text": "x"}]}, *texts("a", 5)]
    iterator = pipeline(config(write(tmp_path, "a.jsonl", records), seq_len=2000, batch_size=1))
    next(iterator)
    assert counts(iterator)["skipped: empty"] >= 1 and counts(iterator)["skipped: patches"] >= 1


class Broken:
    """A library that fails as its documents do not say."""

    special = TOKENIZER.special

    def encode(self, text, allow_special=()):
        raise TypeError("expected something else")


class One:
    """A source of one record."""

    def label(self, index):
        return "text"

    def __getitem__(self, index):
        return Record("text", {"text": "x"})


def test_a_record_that_breaks_a_library_is_skipped():
    broken = {"parts": [{"text": "x"}, {"image": np.zeros((28, 28, 3), np.uint8).astype(object)}]}
    for record, tokenizer, reason in ((Record("broken", broken), TOKENIZER, "image"), (One()[0], Broken(), "unknown")):
        prepared = Preparer(tokenizer, config("x"), MODEL)(record)
        assert prepared.name == record.name and prepared.problem.reason == reason and prepared.example is None
    assert isinstance(prepared.problem.__cause__, TypeError)


@pytest.mark.parametrize(
    "name, value, fault",
    [
        ("make_example", None, TypeError),
        ("Writer", lambda tokenizer: None, AttributeError),
        ("form_of", ..., NameError),
    ],
)
def test_a_fault_of_our_own_code_is_no_bad_record(monkeypatch, name, value, fault):
    """It stops with its traceback, in training as in `k25 data check`."""
    reader = Reader((SourceConfig("digits:train"),), config("x"), MODEL)
    monkeypatch.setattr(f"k25_jax.data.forms.{name}", value)
    if value is ...:
        monkeypatch.delattr(f"k25_jax.data.forms.{name}")
    with pytest.raises(fault):
        Preparer(TOKENIZER, config("x"), MODEL)(One()[0])
    with pytest.raises(fault):
        reader.examine(0, One(), TOKENIZER, {}, Counts())


def test_sources_that_cannot_be_opened_stop_the_run(tmp_path, pipeline):
    for path, message in (
        ("digits:nowhere", "nowhere"),
        (str(tmp_path / "gone"), "gone"),
        (str(tmp_path), "no record"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(config(path))


# -------------------------------------------------------------------------------------------------------------- batches
def test_batches_of_a_task(pipeline):
    data = config("digits:train", batch_size=4, seq_len=128, packs=2, pack_patches=128)
    batch = next(pipeline(data))
    stats = batch_stats(batch)
    assert batch.tokens_BL.shape == (4, 128) and batch.vision.patches_PNC.shape == (2, 128, 588)
    assert stats["documents"] == stats["clips"] > 4 and stats["media_tokens"] == (batch.media_BL >= 0).sum()


def test_waste_is_small(tmp_path, pipeline):
    data = config(write(tmp_path, "a.jsonl", texts("a", 300)), batch_size=8, seq_len=128, packs=0)
    iterator = pipeline(data)
    waste = np.mean([batch_stats(next(iterator))["waste_tokens"] for _ in range(10)])
    assert waste < 0.08


def test_long_documents_fill_rows(tmp_path, pipeline):
    data = config(write(tmp_path, "a.jsonl", [{"text": "abcdefgh" * 500}]), batch_size=4, seq_len=64, packs=0)
    iterator = pipeline(data)
    stream = []
    for _ in range(10):
        batch = next(iterator)
        assert batch_stats(batch)["waste_tokens"] < 0.05
        for row in range(4):
            stream += documents(batch)[row : row + 1]
    assert stream[0] == ("abcdefgh" * 8)[:63]  # after [BOS]
    assert stream[1] == ("abcdefgh" * 16)[62:126]  # shares one token with the piece before


def test_closing_ends_the_threads(tmp_path):
    before = threading.active_count()
    iterator = make_pipeline(config(write(tmp_path, "a.jsonl", texts("a", 40))), MODEL, 9)
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    for thread in threading.enumerate():
        if "grain" in thread.name or "records" in thread.name:
            thread.join(timeout=10)
    assert threading.active_count() <= before


# --------------------------------------------------------------------------------------------------------------- checks
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"seq_len": 1}, "data.seq_len=1 must be at least 2"),
        ({"seed": -1}, "data.seed=-1"),
        ({"packs": -1}, "data.packs=-1"),
        ({"pack_patches": 66}, "data.pack_patches=66 must be a multiple of 4"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(DataError, match=message):
        check(dataclasses.replace(config("x"), **fields), MODEL, TOKENIZER)


def test_model_and_tokenizer_must_agree():
    with pytest.raises(DataError, match=r"model\.media_begin_id=163602, but <\|media_begin\|> is 261"):
        check(config("x"), preset("k25_1t"), TOKENIZER)
    small = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, vocab_size=256))
    with pytest.raises(DataError, match="277 tokens, model.text.vocab_size=256"):
        check(config("x"), small, TOKENIZER)
