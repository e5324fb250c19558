"""Shards of JSONL, and lines as people write them."""

import json
import os

import numpy as np
import pytest

from k25_jax.config import SourceConfig
from k25_jax.data import jsonl
from k25_jax.data.jsonl import Json
from k25_jax.data.records import DataError
from k25_jax.data.sources import open_source


def texts(path, kind="auto"):
    source = open_source(SourceConfig(str(path), kind=kind))
    return [source[i].data["text"] for i in range(len(source))]


def write(folder, names):
    """Shards of three records each."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3)))
    return [f"{name} {i}" for name in names for i in range(3)]


# --------------------------------------------------------------------------------------------------------------- shards
@pytest.mark.parametrize("endings", [["jsonl"], ["ndjson"], ["JSONL"], ["Ndjson"], ["jsonl", "NDJSON"]])
def test_a_folder_of_shards(tmp_path, endings):
    expected = write(tmp_path, [f"part-{i:05d}.{ending}" for i in range(4) for ending in endings])
    assert sorted(texts(tmp_path)) == sorted(expected) and sorted(texts(tmp_path, "jsonl")) == sorted(expected)
    assert texts(tmp_path) == sorted(expected)
    (tmp_path / "README.md").write_text("about them")
    (tmp_path / "photo.png").write_bytes(b"a record may name it")
    source = open_source(SourceConfig(str(tmp_path)))
    assert len(source) == len(expected) and source.left_out == {"other file": 1}


def test_patterns(tmp_path):
    names = [f"d{i}/e/part-{i}.jsonl" for i in range(3)]
    expected = write(tmp_path, [*names, "top.ndjson"])
    assert texts(tmp_path / "d*" / "e" / "*.jsonl") == expected[:9]
    assert texts(tmp_path / "**" / "*.jsonl") == expected[:9]
    assert texts(tmp_path / "d0" / "e" / "*") == expected[:3]
    assert texts(tmp_path / "to[op].*") == expected[9:]
    with pytest.raises(DataError, match=r"there is nothing at .*no-\*.jsonl"):
        open_source(SourceConfig(str(tmp_path / "no-*.jsonl")))
    with pytest.raises(DataError, match=r"to read part-.\.jsonl and the like, give .*/\*\*/\*\.jsonl"):
        (tmp_path / "top.ndjson").unlink()
        open_source(SourceConfig(str(tmp_path)))


def test_names_and_roots_are_those_of_the_shard(tmp_path):
    write(tmp_path, ["a.jsonl", "b/c.jsonl"])
    source = open_source(SourceConfig(str(tmp_path / "**" / "*.jsonl")))
    assert [source[i].name for i in (0, 5)] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b/c.jsonl:3"]
    assert source[5].root == tmp_path / "b"


def test_a_folder_of_pictures_with_captions_stays_one(tmp_path):
    write(tmp_path, ["log.jsonl"])
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption")
    source = open_source(SourceConfig(str(tmp_path)))
    assert len(source) == 1 and source.left_out == {"other file": 1}


def test_a_link_out_of_the_folder_a_pipe_and_a_device(tmp_path):
    write(tmp_path, ["a.jsonl", "in/b.jsonl"])
    (tmp_path / "in" / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(
        DataError, match=r"c\.jsonl is a link that leads out of the folder; name the files by a pattern"
    ):
        open_source(SourceConfig(str(tmp_path / "in")))
    assert len(open_source(SourceConfig(str(tmp_path / "in" / "*.jsonl")))) == 6
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.array_record").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"x\.array_record is a link that leads out of the folder"):
        open_source(SourceConfig(str(tmp_path / "records")))
    for name in (
        "pipe.array_record",
        "pipe.jsonl",
        "pipe.tar",
        "pipe.parquet",
        "pipe.json",
        "pipe.txt",
        "pipe.xyz",
        "pipe",
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="is no regular file|pipe.txt is not a folder"):
            open_source(SourceConfig(str(tmp_path / name)))
    with pytest.raises(DataError, match="is no regular file"):
        open_source(SourceConfig("/dev/zero"))


# ---------------------------------------------------------------------------------------------------------------- lines
@pytest.mark.parametrize("blank", [b"", b" ", b"   ", b"\t", b"\r", b" \t\r", b"\v\f", b" " * 5000])
@pytest.mark.parametrize("step", [2**20, 7, 1])
def test_blank_lines_are_passed_over(tmp_path, monkeypatch, blank, step):
    monkeypatch.setattr(jsonl, "STEP", step if len(blank) < 100 else 2**20)
    lines = [blank, b'{"text": "one"}', blank, blank, b'  {"text": "two"}  ', blank]
    for mark in (b"", b"\xef\xbb\xbf"):
        for tail in (b"", b"\n", b"\r\n"):
            (tmp_path / "a.jsonl").write_bytes(mark + b"\n".join(lines) + tail)
            source = open_source(SourceConfig(str(tmp_path / "a.jsonl")))
            assert [source[i].data for i in range(len(source))] == [{"text": "one"}, {"text": "two"}]
            assert [source[i].name.rpartition(":")[2] for i in range(2)] == ["2", "5"]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 64, 2**20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_against_splitlines(tmp_path, monkeypatch, step, mark, end):
    """Any file in any pieces."""
    monkeypatch.setattr(jsonl, "STEP", step)
    rng = np.random.default_rng(step)
    words = [b"", b" ", b"\t ", b"{}", b'{"a": 1}', b"x", b'  {"b": "\xc3\xa9"} ']
    for trial in range(30):
        lines = [words[i] for i in rng.integers(0, len(words), rng.integers(1, 12))]
        (tmp_path / "a.jsonl").write_bytes(mark + b"{}" + end + end.join(lines) + end * (trial % 2))
        source = open_source(SourceConfig(str(tmp_path / "a.jsonl")))
        expected = [(number, line) for number, line in enumerate([b"{}", *lines], 1) if line.strip()]
        assert [int(source[i].name.rpartition(":")[2]) for i in range(len(source))] == [
            number for number, _ in expected
        ]
        for i, (_, line) in enumerate(expected):
            found = source[i].data
            assert found.reason == "json" if line == b"x" else found == json.loads(line)


def test_nothing_but_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf  \n\t\n \r\n")
    with pytest.raises(DataError, match="a.jsonl holds no record .nothing was left out.; give a source that has some"):
        open_source(SourceConfig(str(tmp_path / "a.jsonl")))


# ---------------------------------------------------------------------------------------------------------- lists of JSON
@pytest.mark.parametrize("step", [1, 2, 3, 7, 2**20])
def test_elements_against_the_parser(tmp_path, monkeypatch, step):
    """Any list in any pieces: quotes, backslashes and brackets within strings too."""
    monkeypatch.setattr(jsonl, "STEP", step)
    rng = np.random.default_rng(step)
    strings = ["", "\\", '"', '\\"', "[", "]}", ",", "\\\\", '{"a": ["', "é\n", "x" * 20, '\\\\\\"']

    def value(depth=0):
        pick = rng.integers(0, 5 if depth < 3 else 3)
        if pick < 3:
            return [strings[rng.integers(len(strings))], int(rng.integers(9)), None][pick]
        size = rng.integers(0, 4)
        return [value(depth + 1) for _ in range(size)] if pick == 3 else {
            strings[rng.integers(len(strings))] + str(i): value(depth + 1) for i in range(size)}  # fmt: skip

    for trial in range(40):
        records = [{"r": value(), "n": i} for i in range(rng.integers(0, 5))]
        text = json.dumps(records, indent=[None, 2, "\t"][trial % 3], ensure_ascii=bool(trial % 2))
        (tmp_path / "a.json").write_bytes(
            b"\xef\xbb\xbf" * (trial % 2) + b" \n" * (trial % 3) + text.encode() + b"\n " * (trial % 2)
        )
        source = Json(str(tmp_path / "a.json"))
        assert [source[i].data for i in range(len(source))] == records
        assert [source[i].name for i in range(len(source))] == [f"{tmp_path}/a.json[{i}]" for i in range(len(records))]


@pytest.mark.parametrize("text, good, bad", [
    ('[{"text": "a"}, {"text": "b"', 1, ["json"]), ('[{"text": "a"}, {"te', 1, ["json"]), ('[{"text": "a"},]', 1, []),
    ('[{"text": "a"},,,{"text": "b"}, ]', 2, []),
    ('[{"text": "a"}, 5, "x", null, [1]]', 1, ["form"] * 4), ('[{"text": "a"} {"text": "b"}]', 0, ["json"]),
    ('{"text": "a"}', 1, []), ('{\n "text":\n "a"\n}', 1, []), ('{"text": "a"}\n{"text": "b"}\n', 2, []),
    ('{"text": "a"}\n\n{"text"\n', 1, ["json"]), ("[" * 3000 + "]" * 3000, 0, ["json|form"]), ('[{"text": "a}]', 0, ["json"]),
])  # fmt: skip
def test_lists_that_something_is_wrong_with(tmp_path, text, good, bad):
    (tmp_path / "a.json").write_text(text)
    source = open_source(SourceConfig(str(tmp_path / "a.json")))
    found = [source[i].data for i in range(len(source))]
    assert sum(isinstance(data, dict) for data in found) == good
    for expected, data in zip(bad, (data for data in found if not isinstance(data, dict)), strict=True):
        assert data.reason in expected


@pytest.mark.parametrize("text", ["", "[]", " [ \n ] ", "[" + "," * 3_000_000 + "]"])
def test_empty_lists(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="a.json (holds no record|is no JSON)"):
        open_source(SourceConfig(str(tmp_path / "a.json")))


@pytest.mark.parametrize("text", ['"text"', "5", "<html>", "\x1f\x8b", '[{"text": "a"}]\n[{"text": "b"}]'])
def test_what_is_no_list_of_records(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="is no JSON in UTF-8|goes on after its list"):
        open_source(SourceConfig(str(tmp_path / "a.json")))
