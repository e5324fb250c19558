"""Traces on disk: what was damaged or made up is an error that names it, and never something else than what was saved."""

import dataclasses
import json
import random

import numpy as np
import pytest

from k25_jax.agents.trace import ENDINGS, Segment, Trace, TraceError, clip_key, from_json, load, save, to_json
from k25_jax.vision.patchpack import Clip


def clip(seed: int, rows: int = 2) -> Clip:
    patches = np.random.default_rng(seed).integers(0, 255, (rows * 2, 12)).astype(np.uint8)
    return Clip(patches, (1, rows, 2), f"picture {seed}")


def segment(length: int = 9, clips=(), **more) -> Segment:
    """Every third token is sampled; log-probabilities of all sizes."""
    sampled = np.arange(length) % 3 == 2
    draw = np.random.default_rng(length)
    logprobs = np.where(sampled, -np.exp(draw.normal(0, 20, length)), np.nan).astype(np.float32)
    tokens = draw.integers(0, 2**31, length).astype(np.int32)
    keys = tuple(clip_key(one) for one in clips)
    return Segment(tokens, sampled, logprobs, np.where(sampled, 4, -1).astype(np.int32), keys, **more)


def trace(**more) -> Trace:
    clips = [clip(0), clip(1, 4)]
    parts = (
        segment(9, clips),
        segment(30, clips[:1], agent="sub", parent=0, stage=1, trainable=False, reason="answer"),
    )
    given = {"id": "a#1", "group": "a", "task": "t", "seed": 2**62, "segments": parts, "ending": "answer"}
    given |= {"clips": {clip_key(one): one for one in clips}, "rewards": {"outcome": 1 / 3}, "answer": "ü\u2028\ud800"}
    return Trace(**given | more)


def test_a_tree_of_segments_comes_back_bit_by_bit(tmp_path):
    save(tmp_path, "two", [trace(), trace(id="a#2", segments=(), ending="infrastructure", problem="no disk")])
    one, two = load(tmp_path, "two")
    assert to_json(one) == to_json(trace()) and one.answer == trace().answer and (one.valid, two.valid) == (True, False)
    for new, old in zip(one.segments, trace().segments, strict=True):
        for name in ("tokens", "sampled", "logprobs", "versions"):
            assert getattr(new, name).tobytes() == getattr(old, name).tobytes()
    assert (one.length, one.segments[0].length, one.segments[1].turns) == (3, 3, 10)
    assert len(list((tmp_path / "clips").iterdir())) == 2


def test_a_clip_that_is_there_is_not_written_again(tmp_path):
    save(tmp_path, "one", [trace()])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "clips").iterdir()}
    save(tmp_path, "two", [trace()])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "clips").iterdir()} == before


@pytest.mark.parametrize(
    "more, match",
    [
        ({"ending": "bored"}, "ending='bored' is none of answer, turns"),
        ({"ending": ""}, "ending='' is none of"),
        ({"clips": {}}, "segment 0 shows [0-9a-f]{32}, which is not among its clips"),
        ({"rewards": {"r": 1.5}}, r"the reward r=1.5 does not lie in \[0, 1\]"),
        ({"rewards": {"r": float("nan")}}, "the reward r=nan does not lie in"),
        ({"segments": (segment(parent=0),)}, "segment 0 names 0 as its parent, which is not before it"),
        ({"segments": (segment(), segment(parent=2))}, "segment 1 names 2 as its parent"),
    ],
)
def test_what_does_not_hold_together_is_no_trace(more, match):
    with pytest.raises(TraceError, match=match):
        trace(**more)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sampled_token_has_a_finite_log_probability_and_no_other(value):
    good = segment()
    for place, wrong in ((2, value), (0, -1.0)):
        logprobs = good.logprobs.copy()
        logprobs[place] = wrong
        with pytest.raises(
            TraceError, match="main: sampled tokens must have a finite log-probability, and others none"
        ):
            dataclasses.replace(good, logprobs=logprobs)
    with pytest.raises(TraceError, match=r"main: versions is int64\[9\], not int32\[9\]"):
        dataclasses.replace(good, versions=good.versions.astype(np.int64))


def test_only_what_the_model_did_may_be_trained_on():
    valid = {ending for ending in ENDINGS if trace(ending=ending).valid}
    assert set(ENDINGS) - valid == {"cancelled", "infrastructure"}


WRONG = {
    "a token that is none": ("tokens", [1, "x"]), "a token between two": ("tokens", [1, 1.5]),
    "a token of 40 bits": ("tokens", [2**40]), "tokens in tokens": ("tokens", [[1, 2]]), "no tokens": ("tokens", None),
    "a place behind the end": ("sampled", [2, 5, 9]), "a place before the beginning": ("sampled", [-1, 2, 5]),
    "a place twice": ("sampled", [2, 2, 5]), "a place too few": ("sampled", [2, 5]),
    "NaN": ("logprobs", [-1, float("nan"), -2]),
    "infinity": ("logprobs", [-1, float("-inf"), -2]), "a number too few": ("logprobs", [-1.0]),
    "a log-probability in words": ("logprobs", ["low", -1, -1]), "half a version": ("versions", [0.5, 1, 2]),
    "clips that are none": ("clips", 5), "another field": ("colour", "red"), "a name that is none": ("agent", 7),
    "trainable by a word": ("trainable", "yes"), "a parent by name": ("parent", "main"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_record_that_was_made_up_is_an_error(case):
    name, value = WRONG[case]
    record = to_json(trace())
    record["segments"][0][name] = value
    with pytest.raises(TraceError):
        from_json(record, trace().clips)


@pytest.mark.parametrize(
    "change",
    [{"seed": "1"}, {"id": None}, {"segments": 5}, {"segments": [5]}, {"rewards": 5}, {"rewards": {"r": "1"}}, {"more": 1},
     {"answer": 3}, {"task": []}],
)  # fmt: skip
def test_so_is_a_whole_of_another_form(change):
    with pytest.raises(TraceError):
        from_json(to_json(trace()) | change, trace().clips)
    for record in (None, [], "x", {}):
        with pytest.raises(TraceError):
            from_json(record, {})


@pytest.mark.parametrize(
    "key", ["../../secret", "/etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "\n", "", 5, None, ["a"]]
)
def test_a_name_of_a_clip_that_leaves_the_folder_is_not_opened(key, tmp_path):
    save(tmp_path, "one", [trace()])
    record = to_json(trace())
    record["segments"][1]["clips"] = [key]
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    np.savez(tmp_path / "secret.npz", patches=clip(0).patches, grid=(1, 2, 2), merge=(2, 2), source="")
    with pytest.raises(TraceError, match="is no name of a clip"):
        load(tmp_path, "one")


def test_a_clip_that_is_gone_or_another_is_named(tmp_path):
    save(tmp_path, "one", [trace()])
    one, two = sorted((tmp_path / "clips").iterdir())
    two.write_bytes(one.read_bytes())
    with pytest.raises(TraceError, match=f"{two.name}: holds another clip than its name says"):
        load(tmp_path, "one")
    two.unlink()
    with pytest.raises(TraceError, match=f"{two.name}: .*No such file"):
        load(tmp_path, "one")
    with pytest.raises(TraceError, match="none.jsonl: .*No such file"):
        load(tmp_path, "none")


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "\udcff", '{"segments": [{"clips": [1e999]}]}', "null", "1"])
def test_lines_that_are_no_records_are_errors(text, tmp_path):
    (tmp_path / "one.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TraceError):
        load(tmp_path, "one")


def test_damaged_files_are_what_was_saved_or_an_error(tmp_path):
    """Bytes changed, cut and put in at random, in the lines and in the clips."""
    save(tmp_path, "one", [trace()])
    files, rng, good, errors = (
        [tmp_path / "one.jsonl", *(tmp_path / "clips").iterdir()],
        random.Random(0),
        to_json(trace()),
        0,
    )
    patches = {key: one.patches.tobytes() for key, one in trace().clips.items()}
    for _ in range(150):
        file = rng.choice(files)
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        damaged = rng.choice([
            whole[:place], whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :],
            whole[:place] + rng.randbytes(3) + whole[place:], whole[:place] + whole[place + 5 :],
        ])  # fmt: skip
        file.write_bytes(damaged)
        try:
            for found in load(tmp_path, "one"):
                if file.suffix == ".npz":  # a line of JSON has no check sum: there another trace may stand
                    assert to_json(found) == good
                    assert {key: one.patches.tobytes() for key, one in found.clips.items()} == patches
        except TraceError:
            errors += 1
        file.write_bytes(whole)
    assert errors > 75
