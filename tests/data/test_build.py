"""`k25 data build` and `check`: what was built is what was given, whatever happened on the way."""

import base64
import collections
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runs
from benchmarks.corrupted_records import account
from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.build import build
from k25_jax.data.forms import prepare
from k25_jax.data.records import DataError
from k25_jax.data.sources import open_source
from k25_jax.data.statistics import Reader
from k25_jax.text.tokenizer import load_tokenizer

MODEL, TOKENIZER = preset("tiny"), load_tokenizer()
DATA = DataConfig(packs=2, pack_patches=256, seq_len=512)


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_source(folder: Path, count: int = 24) -> str:
    """Records of every form; each eighth is bad."""
    (folder / "a.png").write_bytes(png())
    frames = [Image.new("RGB", (48, 32), (40 * i, 0, 0)) for i in range(4)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    image = {"image_base64": base64.b64encode(png(1)).decode()}
    forms = [
        {"text": "plain é"},
        {"image": "a.png", "caption": "a picture", "url": "kept"},
        {"video": "a.gif", "text": "a video"},
        {**image, "ocr": "WORDS"},
        {"image": "a.png", "boxes": [{"label": "x", "box": [0, 0, 30, 20]}]},
        {**image, "elements": [{"type": "button", "text": "OK", "box": [0, 0, 30, 20]}]},
        {
            "messages": [
                {"role": "user", "content": [{"image": "a.png"}, image]},
                {"role": "assistant", "content": "it"},
            ]
        },
        {"image": "../a.png", "caption": "bad"},
    ]
    lines = [json.dumps(forms[i % 8]) for i in range(count)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def reader(*paths: str) -> Reader:
    return Reader(tuple(SourceConfig(str(path)) for path in paths), DATA, MODEL)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def examples(path: str) -> list:
    source = open_source(SourceConfig(str(path)))
    return [prepare(source[i], TOKENIZER, DATA, MODEL) for i in range(len(source))]


# ---------------------------------------------------------------------------------------------------------------- build
def test_what_was_built_is_what_was_given(tmp_path):
    path = write_source(tmp_path)
    manifest = build(reader(path, "digits:train:size=16,variants=1"), tmp_path / "out", shards=3, workers=2)
    source, task = open_source(SourceConfig(path)), open_source(SourceConfig("digits:train:size=16,variants=1"))
    given = [prepare(source[i], TOKENIZER, DATA, MODEL) for i in range(24) if i % 8 != 7]
    given += [prepare(task[i], TOKENIZER, DATA, MODEL) for i in range(len(task))]
    (tmp_path / "a.png").unlink()  # all media are inside
    (tmp_path / "a.gif").unlink()
    built = examples(tmp_path / "out")
    assert len(built) == len(given) == manifest["good"]
    for one, other in zip(built, given, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.loss_weights.tolist() == other.loss_weights.tolist()
        for mine, theirs in zip(one.clips, other.clips, strict=True):
            assert mine.grid == theirs.grid and np.array_equal(mine.patches, theirs.patches)
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(line["name"], line["reason"]) for line in lines] == [(f"{path}:{i + 1}", "path") for i in (7, 15, 23)]
    check_manifest(manifest, tmp_path / "out", given)


def check_manifest(manifest: dict, folder: Path, given: list):
    """Against a count by hand."""
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["modality"] == open_source(SourceConfig(str(folder))).modality == "vision"
    assert manifest["bad"] == {"path": 3} and manifest["records"] == len(given) + 3
    assert manifest["tokens"] == sum(len(example) for example in given)
    assert manifest["patches"] == sum(len(clip.patches) for example in given for clip in example.clips)
    assert manifest["loss_tokens"] == sum(int((example.loss_weights[1:] > 0).sum()) for example in given)
    assert sum(row["records"] for row in manifest["forms"].values()) == len(given)
    buckets = collections.Counter(str(1 << (len(example) - 1).bit_length()) for example in given)
    assert manifest["lengths"] == dict(buckets)
    found = digests(folder)
    assert {file["name"]: file["sha256"] for file in manifest["files"]}.items() <= found.items()
    assert sum(file["records"] for file in manifest["files"]) == len(given) and "unfinished" not in found


def test_a_build_of_text_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert build(reader(tmp_path / "a.jsonl"), tmp_path / "out", workers=1)["modality"] == "text"
    assert open_source(SourceConfig(str(tmp_path / "out"))).modality == "text"
    assert open_source(SourceConfig(str(tmp_path / "a.jsonl"))).modality == ""


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path, k25):
    path = write_source(tmp_path, 400)
    flags = [f"--source={path}", "--shards=40", "--workers=2", "--json"]
    assert k25("data", "build", *flags, f"--output={tmp_path / 'whole'}")[0] == 0
    flags.append(f"--output={tmp_path / 'killed'}")
    command = [sys.executable, "-m", "k25_jax.cli", "data", "build", *flags]
    child = subprocess.Popen(command, env=runs.environment(), cwd=runs.ROOT, start_new_session=True)
    unfinished = tmp_path / "killed" / "unfinished"
    while child.poll() is None and len(list(unfinished.glob("data*.json"))) < 3:
        time.sleep(0.005)
    child.kill()  # its workers are left, and end by themselves
    child.wait()
    before = {file.name for file in unfinished.glob("data*.json")}
    assert 3 <= len(before) < 40, "it was killed too late to say anything"
    status, _, err = k25("data", "build", *flags, "--shards=39")
    assert status == 2 and "unfinished build with other shards" in err
    status, out, err = k25("data", "build", *flags)
    assert status == 0, err
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").iterdir()}
    assert k25("data", "build", *flags)[:2] == (0, out)  # it is done: nothing is written again
    assert times == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").iterdir()}
    status, _, err = k25("data", "build", *flags, "--shards=7")
    assert status == 2 and "holds a data set of other sources" in err


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    path = write_source(tmp_path)
    monkeypatch.setattr("k25_jax.data.build._finish", lambda output, plan, count: {})
    build(reader(path), tmp_path / "out", shards=4, workers=1)
    unfinished = tmp_path / "out" / "unfinished"
    (unfinished / "data.array_record-00002-of-00004.json").unlink()
    (unfinished / "draft-2-12345").write_bytes(b"half of a shard")
    before = {file.name: file.stat().st_mtime_ns for file in unfinished.glob("data*")}
    build(reader(path), tmp_path / "out", shards=4, workers=1)
    after = {file.name: file.stat().st_mtime_ns for file in unfinished.glob("data*")}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"data.array_record-00002-of-00004", "data.array_record-00002-of-00004.json"}
    assert not list(unfinished.glob("draft-*"))
    (Path(path)).write_text('{"text": "another source"}\n' * 24)
    with pytest.raises(DataError, match="unfinished build with other sources"):
        build(reader(path), tmp_path / "out", shards=4)


def test_corrupted_records_are_all_accounted_for(tmp_path):
    found = account(tmp_path, 600, seed=1, workers=2)
    assert found["unaccounted"] == 0 and found["clean_lost"] == []
    assert found["given"] == found["built"] + sum(found["bad"].values()) >= 600
    assert found["clean"] > 10 and found["built"] >= found["clean"]
    assert {"json", "utf-8", "form", "box", "image", "path", "missing", "base64"} <= set(found["bad"])
    assert found["unknown"] == []


# ---------------------------------------------------------------------------------------------------- the command line
def test_check_names_bad_records_and_says_so_with_its_status(tmp_path, k25):
    path = write_source(tmp_path)
    status, out, _ = k25("data", "check", f"--source={path}", "--workers=1")
    assert status == 1 and f"path: {path}:8: '../a.png' leads out of" in out and "12.50%" in out
    assert k25("data", "check", f"--source={path}", "--workers=1", "--allow=0.2")[0] == 0
    status, out, _ = k25("data", "check", f"--source={path}", "--workers=1", "--allow=0.1", "--json")
    found = json.loads(out)
    assert status == 1 and found["bad"] == {"path": 3} and len(found["first_bad"]) == 3 and not found["ok"]
    (tmp_path / "good.jsonl").write_text('{"text": "x"}\n')
    assert k25("data", "check", f"--source={tmp_path / 'good.jsonl'}", "--workers=1")[0] == 0


def test_build_from_the_command_line(tmp_path, k25):
    path = write_source(tmp_path)
    status, out, _ = k25("data", "build", f"--source={path}", f"--output={tmp_path / 'out'}", "--workers=1")
    assert status == 0 and "grounding" in out and "bad: path" in out and "bad.jsonl" in out
    (tmp_path / "bad.jsonl").write_text("{}\n[]\n")
    status, _, _ = k25(
        "data", "build", f"--source={tmp_path / 'bad.jsonl'}", f"--output={tmp_path / 'none'}", "--workers=1"
    )
    assert status == 1
    for flags, message in (
        (["check"], "give the path of a source, or --config"),
        (["check", f"--source={tmp_path / 'no.jsonl'}"], "there is nothing at"),
        (["build", f"--source={path}"], "--output"),
        (["check", f"--source={path}", "data.packs=1"], "overrides nothing without --config"),
    ):
        status, _, err = k25("data", *flags)
        assert status == 2 and message in err, err
