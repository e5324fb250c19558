"""Shares, schedules, epochs, budgets, lanes, waste and leaks of the data, counted on what batches hold."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from k25_jax.config import ConfigError, DataConfig, SourceConfig, preset
from k25_jax.data import pipeline as pipelines
from k25_jax.data.mixture import Mixture, modality_of, realised, value_at
from k25_jax.data.packing import batch_stats
from k25_jax.data.pipeline import make_pipeline
from k25_jax.data.records import DataError, Source
from k25_jax.data.sources import open_source

MODEL = preset("tiny")


class Made(Source):
    """Records of a letter: texts of `least` to `most` bytes, of vision sources with an image of 2 to 8 patches a side."""

    def __init__(self, path):
        super().__init__()
        letter, kind, count, least, most = path.split("-")
        self.letter, self.kind, self.bounds, self.count = letter, kind, (int(least), int(most)), int(count)

    def __len__(self):
        return self.count

    def label(self, index):
        return f"{self.letter}{index}"

    def read(self, index):
        generator = np.random.default_rng([ord(self.letter), index])
        text = {"text": self.letter * int(generator.integers(*self.bounds))}
        if self.kind == "t":
            return text
        height, width = 28 * generator.integers(1, 5, 2)
        image = np.full((height, width, 3), generator.integers(256), np.uint8)
        return {"parts": [{"image": image}, text]}


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Sources by names such as a-t-100-20-90: letter, text or vision, records, bytes."""
    monkeypatch.setattr(pipelines, "open_source", lambda config: Made(config.path))


def config(*sources, **fields):
    """Sources as (path, weight) or (path, weight, max_epochs)."""
    opened = tuple(SourceConfig(path, "task", weight, max_epochs=sum(more)) for path, weight, *more in sources)
    return DataConfig(
        sources=opened, **{"batch_size": 4, "seq_len": 128, "packs": 1, "pack_patches": 64, "seed": 3} | fields
    )


def batches(data, number, steps=None, lanes=None, state=None):
    """(batches, the state after each of them)."""
    iterator = make_pipeline(data, MODEL, steps or number, lanes)
    if state is not None:
        iterator.set_state(state)
    found = [(next(iterator), iterator.get_state()) for _ in range(number)]
    iterator.close()
    return [batch for batch, _ in found], [state for _, state in found]


def tokens_of(batch, data):
    """Tokens of each source in a batch, by the letters in its documents: independent of the account."""
    out = np.zeros(len(data.sources), int)
    letters = [ord(source.path[0]) for source in data.sources]
    for tokens, segments in zip(batch.tokens_BL, batch.segments_BL, strict=True):
        for segment in range(1, segments.max() + 1):
            own = tokens[segments == segment]
            counts = [int((own == letter).sum()) for letter in letters]
            out[int(np.argmax(counts))] += len(own)
    return out


def counted(found, data):
    return np.array([tokens_of(batch, data) for batch in found])


TEXT, CODE = ("t-t-200-20-400", 3.0), ("c-t-200-100-900", 1.0)
IMAGES, SCANS = ("i-v-200-5-60", 2.0), ("s-v-200-20-90", 1.0)


# --------------------------------------------------------------------------------------------------------------- shares
@pytest.mark.parametrize("share, packs", [(0.1, 128), (0.2, 128), (0.5, 272)])
def test_shares_of_tokens_hold_over_any_window_and_waste_is_small(share, packs):
    data = config(TEXT, CODE, IMAGES, SCANS, vision_share=share, pack_patches=packs, batch_size=8)
    found, _ = batches(data, 260)
    got = counted(found, data)
    windows = np.cumsum(np.vstack([np.zeros(4), got]), axis=0)
    windows = windows[200:] - windows[:-200]
    vision = windows[:, 2:].sum(axis=1) / windows.sum(axis=1)
    assert np.abs(vision - share).max() < 0.005
    want = np.array([0.75 * (1 - share), 0.25 * (1 - share), share * 2 / 3, share / 3])
    assert np.abs(windows / windows.sum(axis=1, keepdims=True) - want).max() < 0.01
    stats = [batch_stats(batch) for batch in found]
    assert np.mean([one["waste_tokens"] for one in stats]) < 0.03
    assert np.mean([one["waste_patches"] for one in stats if one["clips"]]) < 0.05
    assert all(len(batch.vision.patches_PNC) == bool(one["clips"]) for batch, one in zip(found, stats, strict=True))


def test_without_a_share_the_weights_decide_over_all_sources():
    data = config(TEXT, IMAGES, pack_patches=128)
    got = counted(batches(data, 60)[0], data).sum(axis=0)
    assert got / got.sum() == pytest.approx([0.6, 0.4], abs=0.02)


def test_value_at():
    steps = ((0.0, 1.0), (0.25, 3.0), (0.5, 0.0))
    assert [value_at(steps, p) for p in (0.0, 0.2, 0.25, 0.49, 0.5, 0.99)] == [1.0, 1.0, 3.0, 3.0, 0.0, 0.0]
    assert value_at(0.3, 0.7) == 0.3


def test_vision_comes_in_at_half_of_the_run_without_catching_up():
    data = config(TEXT, IMAGES, vision_share=((0.0, 0.0), (0.5, 0.2)))
    got = counted(batches(data, 120)[0], data)
    assert got[:60, 1].sum() == 0 and got[:60, 0].sum() > 0.97 * 60 * 512
    for part in (got[60:90], got[90:]):
        assert part[:, 1].sum() / part.sum() == pytest.approx(0.2, abs=0.02)


def test_weights_change_over_the_run():
    data = config(("t-t-200-20-90", ((0.0, 1.0), (0.5, 3.0))), ("c-t-200-20-90", 1.0))
    got = counted(batches(data, 100)[0], data)
    assert got[:50, 0].sum() / got[:50].sum() == pytest.approx(0.5, abs=0.05)
    assert got[50:, 0].sum() / got[50:].sum() == pytest.approx(0.75, abs=0.05)


def test_the_source_that_lacks_most_is_next():
    data = config(TEXT, CODE, IMAGES, vision_share=0.5)
    mixture = Mixture(data, ["text", "text", "vision"], steps=10)
    mixture.begin(0)
    assert mixture.targets == [0.375, 0.125, 0.5]
    given, generator = np.zeros(3), np.random.default_rng(0)
    for size in generator.integers(10, 900, 500).tolist():
        mixture.waiting = generator.integers(0, 1500, 3).tolist()  # what was read, and no batch has yet
        counted = given[:2] + mixture.waiting[:2]
        lacking = [0.75 * counted.sum() - counted[0], 0.25 * counted.sum() - counted[1]]
        source = mixture.next_source("text")
        assert source == int(np.argmax(lacking))
        given[source] += size
        mixture.hand_out(source, size)
    assert given[0] / given.sum() == pytest.approx(0.75, abs=0.01)


# ---------------------------------------------------------------------------------------------------- epochs and budgets
def test_a_source_gives_no_more_than_its_epochs_and_the_others_of_its_modality_take_over():
    small = ("c-t-20-30-60", 1.0, 2.0)
    data = config(("t-t-200-20-90", 1.0), small, IMAGES, vision_share=0.25, pack_patches=80)
    found, states = batches(data, 80)
    got = counted(found, data)
    expected = 2 * sum(len(Made(small[0]).read(i)["text"]) for i in range(20))
    seen = sum(int((batch.tokens_BL == ord("c")).sum()) for batch in found)
    assert (
        expected <= seen <= 1.03 * expected and got[-30:, 1].sum() == 0
    )  # where a text is cut, one token is seen twice
    assert states[-1]["lanes"][0]["mixture"]["gone"] == [False, True, False]
    assert got[-40:, 2].sum() / got[-40:].sum() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("lanes", [1, 2])
def test_budgets_are_met_and_then_batches_are_blank(lanes):
    """To the token by text, which is cut anywhere; by vision up to what is shorter than any document."""
    data = config(TEXT, IMAGES, vision_share=0.2, text_tokens=9001, vision_tokens=2203, lanes=lanes, packs=lanes)
    found, states = batches(data, 60)
    sizes = [int((batch.segments_BL > 0).sum()) for batch in found]
    last = max(i for i, size in enumerate(sizes) if size)
    total = np.sum([lane["mixture"]["total"] for lane in states[-1]["lanes"]], axis=0)
    assert 20 <= last < 50 and sum(sizes) == total.sum()
    assert counted(found, data).sum(axis=0).tolist() == total.tolist()
    assert total[0] == 9001 and 2203 - 16 * lanes < total[1] <= 2203
    for batch in found:  # no media block is torn
        begins, ends = (batch.tokens_BL == token for token in (MODEL.media_begin_id, MODEL.media_end_id))
        assert begins.sum() == ends.sum() == batch_stats(batch)["clips"]


def test_a_vision_budget_that_no_document_can_meet_is_left_short():
    data = config(TEXT, ("i-v-50-1-2", 1.0), vision_share=0.2, text_tokens=4000, vision_tokens=1003)
    total = batches(data, 40)[1][-1]["lanes"][0]["mixture"]["total"]
    assert total[0] == 4000 and 1003 - 20 < total[1] <= 1003


def test_nothing_is_left_after_all_epochs_and_blank_batches_follow():
    data = config(("t-t-30-20-90", 1.0, 1.5), packs=0)
    found, _ = batches(data, 20)
    documents = sum(batch_stats(batch)["documents"] for batch in found)
    assert 45 <= documents < 60 and not found[-1].segments_BL.any()


def test_a_share_of_a_modality_without_a_source_is_refused():
    for fields, message in (
        (dict(vision_share=0.1), "no source of vision"),
        (dict(vision_share=0.0, vision_tokens=9), "no source of vision"),
    ):
        with pytest.raises(DataError, match=message):
            make_pipeline(config(TEXT, **fields), MODEL, 9)
    with pytest.raises(DataError, match="no source of text"):
        make_pipeline(config(IMAGES, vision_share=0.5), MODEL, 9)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(vision_share=1.5), r"must lie in \[0, 1.0\]"),
        (dict(vision_share=((0.1, 0.2),)), "must begin at progress 0.0"),
        (dict(vision_share=((0.0, 0.2), (0.5, 0.1), (0.5, 0.3))), "rise below 1"),
        (dict(lanes=3), "data.batch_size=4 must be a multiple of data.lanes=3"),
        (dict(lanes=4, packs=2), "data.packs=2 must be a multiple of data.lanes=4"),
        (dict(text_tokens=-1), "data.text_tokens=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(TEXT, **fields)


def test_modality_of_a_source(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(40)))
    assert modality_of(open_source(SourceConfig(str(file))), "auto") == "text"
    file.write_text(file.read_text() + json.dumps({"parts": [{"text": "x"}, {"image_base64": "AA=="}]}) + "\n")
    assert modality_of(open_source(SourceConfig(str(file))), "auto") == "vision"
    assert modality_of(open_source(SourceConfig(str(file))), "text") == "text"
    assert modality_of(Made("i-v-5-1-9"), "auto") == "vision"


# ---------------------------------------------------------------------------------------------------------------- lanes
def test_the_rows_are_the_same_whatever_number_of_hosts_reads_them():
    data = config(TEXT, CODE, IMAGES, vision_share=0.2, lanes=4, batch_size=8, packs=4)
    whole, states = batches(data, 12)
    for hosts in (2, 4):
        parts = [batches(data, 12, lanes=range(h * 4 // hosts, (h + 1) * 4 // hosts)) for h in range(hosts)]
        for name in ("tokens_BL", "targets_BL", "loss_weights_BL", "segments_BL", "positions_BL"):
            for step, batch in enumerate(whole):
                rows = np.concatenate([getattr(found[step], name) for found, _ in parts])
                assert np.array_equal(getattr(batch, name), rows), (hosts, name, step)
        for step, state in enumerate(states):
            assert [lane for _, seen in parts for lane in seen[step]["lanes"]] == state["lanes"]


def test_a_run_of_one_host_goes_on_on_four_and_back():
    data = config(TEXT, CODE, IMAGES, vision_share=0.2, lanes=4, batch_size=8, packs=4)
    whole, states = batches(data, 16)
    state = json.loads(json.dumps(states[7]))["lanes"]
    parts = [batches(data, 4, 16, [lane], {"lanes": [state[lane]]}) for lane in range(4)]
    for step in range(4):
        rows = np.concatenate([found[step].tokens_BL for found, _ in parts])
        assert np.array_equal(whole[8 + step].tokens_BL, rows)
    state = {"lanes": [seen[3]["lanes"][0] for _, seen in parts]}
    assert state == states[11]
    again, _ = batches(data, 4, 16, state=state)
    for ours, want in zip(again, whole[12:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True))


def test_no_document_waits_for_ever():
    data = config(TEXT, CODE, IMAGES, SCANS, vision_share=0.3, pack_patches=96)
    _, states = batches(data, 150)
    waits = [max(entry[3] for entry in state["lanes"][0]["waiting"]) for state in states]
    assert max(waits) <= 24


def test_packs_that_do_not_go_with_the_share_are_named(caplog):
    batches(config(TEXT, IMAGES, vision_share=0.4, pack_patches=64, batch_size=8), 100)
    assert "less vision is read than asked for" in caplog.text and "asks for about data.packs=" in caplog.text
    caplog.clear()
    batches(config(TEXT, IMAGES, vision_share=0.1, pack_patches=64), 100)
    assert "asks for about" not in caplog.text


def test_metrics_of_the_mixture():
    data = config(TEXT, IMAGES, vision_share=0.2, lanes=2, packs=2)
    found, states = batches(data, 40)
    got, figures = counted(found, data).sum(axis=0), realised(states[-1]["lanes"], data)
    assert (figures["text_tokens"], figures["vision_tokens"]) == tuple(got)
    assert figures["mixture/vision"] == pytest.approx(got[1] / got.sum()) and figures["mixture/vision_target"] == 0.2
    read = sum(lane["streams"][1] for lane in states[-1]["lanes"])
    assert figures["epochs/1_i_v_200_5_60"] == read / 200
    assert figures["mixture/0_t_t_200_20_400"] == pytest.approx(got[0] / got.sum())


# ---------------------------------------------------------------------------------------------------------------- leaks
def contents(batch):
    """Of each document: all arrays in its place, and for each of its media tokens the pixels that it shows."""
    group, out = MODEL.vision.group, []
    slots = batch.vision.slots_PN.shape[1]
    for row, segments in enumerate(batch.segments_BL):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            arrays = [getattr(batch, name)[row, own] for name in ("tokens_BL", "targets_BL", "loss_weights_BL")]
            arrays += [batch.positions_BL[row, own], batch.media_BL[row, own]]
            for feature in batch.media_BL[row, own & (batch.media_BL[row] >= 0)]:
                pack, token = divmod(int(feature), slots // group)
                of_token = batch.vision.slots_PN[pack] // group == token
                arrays += [a[pack, of_token] for a in jax.tree.leaves(batch.vision)]
            out.append([a.tobytes() for a in arrays])
    return out


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_changed_document_or_image_changes_no_other(monkeypatch, changed):
    """Same sizes, other letters and pixels: only the documents that come from this record differ, in every array."""
    data = dataclasses.replace(config(TEXT, IMAGES, vision_share=0.4, batch_size=8), shuffle=False)
    before, states = batches(data, 3)
    read = Made.read

    def other(self, index):
        record = read(self, index)
        if index != changed:
            return record
        if self.kind == "t":
            return {"text": record["text"].upper()}
        image, text = record["parts"]
        return {"parts": [{"image": image["image"] ^ 255}, {"text": text["text"].upper()}]}

    monkeypatch.setattr(Made, "read", other)
    after, again = batches(data, 3)
    assert again == states
    differing = []
    for old, new in zip(before, after, strict=True):
        for a, b in zip(contents(old), contents(new), strict=True):
            if a != b:
                differing.append(np.frombuffer(b[0], np.int32))
                assert a[3:5] == b[3:5]  # its positions, and which features it reads
                assert {ord("T"), ord("I")} & set(differing[-1].tolist())
        assert np.array_equal(old.segments_BL, new.segments_BL)
    letters = [chr(letter) for one in differing for letter in set(one.tolist()) & {ord("T"), ord("I")}]
    assert "I" in letters or "T" in letters
    untouched = [
        a == b
        for old, new in zip(before, after, strict=True)
        for a, b in zip(contents(old), contents(new), strict=True)
    ]
    assert sum(untouched) == len(untouched) - len(differing) and sum(untouched) > 20
