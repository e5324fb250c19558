"""What a newcomer brings to `k25 data` and is told."""

import json
import re

import pytest
from given import PNG, coded, example, refusal, same, write_jsonl, write_media
from PIL import Image

import runs
from k25_jax.data.examples import EXAMPLES


# ----------------------------------------------------------------------------------------------------------------- help
def test_the_help_shows_a_record_of_each_form_that_is_one(tmp_path, k25):
    status, out, _ = k25("data", "--help")
    assert status == 0 and "only what the assistant says is learnt" in " ".join(out.split())
    shown = dict(re.findall(r"^  ([a-z-]+) +(\{.*\})$", out, re.MULTILINE))
    assert {form: json.loads(record) for form, record in shown.items()} == EXAMPLES
    path = write_jsonl(write_media(tmp_path), *EXAMPLES.values())
    status, out, _ = k25("data", "check", path, "--workers=1", "--json")
    assert status == 0 and json.loads(out)["forms"].keys() == EXAMPLES.keys()


# ---------------------------------------------------------------------------------------------------------------- paths
@pytest.fixture
def read(monkeypatch):
    """What the commands would read, and the overrides that they were given."""
    seen = []

    def reader(args):
        seen.append((args.source, args.overrides))
        raise KeyboardInterrupt

    monkeypatch.setattr("k25_jax.data.console._reader", reader)
    monkeypatch.setattr("k25_jax.cli.checks.data", lambda args: None)  # that they are there
    return seen


@pytest.mark.parametrize("action", ["check", "build", "inspect"])
@pytest.mark.parametrize(
    "flags, sources",
    [
        (["a"], ["a"]), (["a", "b"], ["a", "b"]), (["--source=a"], ["a"]), (["--source", "a", "b"], ["a", "b"]),
        (["a", "--workers=1", "b"], ["a", "b"]), (["--workers", "1", "a"], ["a"]),
        (["digits:train:size=16"], ["digits:train:size=16"]),
        (["./x.y=1.jsonl"], ["./x.y=1.jsonl"]), ([], []),
    ],
    ids=str,
)  # fmt: skip
def test_sources_by_their_paths(k25, read, action, flags, sources):
    output = ["--output=o"] if action != "check" else []
    assert k25("data", action, *flags, *output)[0] == 130 and read == [(sources, [])]
    config = ["--config=x.py", "data.packs=1", "--config.data.seq_len=64"]
    assert k25("data", action, *output, *config, *flags)[0] == 130
    assert read[1][0] == sources and sorted(read[1][1]) == ["data.packs=1", "data.seq_len=64"]


def test_a_flag_that_there_is_not_is_named(k25, read):
    status, _, err = k25("data", "check", "a", "--sorce=b")
    assert status == 2 and "--sorce" in err and not read


def test_build_and_check_of_a_path(tmp_path, k25):
    path = write_jsonl(tmp_path, {"text": "a"})
    assert k25("data", "build", path, "--output", tmp_path / "out", "--workers=1")[0] == 0
    status, out, _ = k25("data", "check", tmp_path / "out", "--workers=1")
    assert status == 0 and "ok: 0.00%" in out
    status, _, err = k25("data", "check")
    assert status == 2 and "give the path of a source" in err


# ------------------------------------------------------------------------------------------------------------- messages
def test_a_bad_record_is_named_once(tmp_path, k25):
    """The name of the record, then what is wrong, with the name of a file in it at most once."""
    (tmp_path / "broken.png").write_bytes(PNG[:60])
    (tmp_path / "broken.txt").write_text("a picture")
    broken = {"image": "broken.png", "text": "x"}
    inside = {"image_base64": coded(PNG[:60]), "text": "x"}
    lines = write_jsonl(
        tmp_path, broken, {"image": "none.png", "text": "x"}, inside, {"video": "broken.png", "text": "x"}
    )
    for source in (lines, tmp_path):
        _, out, _ = k25("data", "check", source, "--workers=1")
        named = [line for line in out.splitlines() if re.match(r"(image|video|missing): ", line)]
        assert len(named) == (4 if source == lines else 1)
        for line in named:
            assert line.count("broken.png") <= 1 and line.count("none.png") <= 1 and line.count("data.jsonl") <= 1, line
            assert "{}" not in line


def test_a_warning_comes_once(tmp_path):
    """A source is opened for every pass over it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    (tmp_path / "a.md").write_text("a text")
    done = runs.k25("data", "build", str(tmp_path), f"--output={tmp_path / 'out'}")
    assert done.returncode == 0 and done.stderr.count("alone.png") == 1


# ------------------------------------------------------------------------------------------------- LLaVA's and ShareGPT's
def test_llava_and_sharegpt(tmp_path):
    """https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md: a record as it is there."""
    root = write_media(tmp_path)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    given = {"id": "997bb945", "image": "cat.png", "conversations": turns}
    question = {"role": "user", "content": [{"image": PNG}, {"text": "\nWhat is it?"}]}
    ours = {"messages": [question, {"role": "assistant", "content": "A cat."}]}
    assert same(example(given, root), example(ours))
    told = {"system": "Be brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    ours = {"messages": [{"role": role, "content": content} for role, content in
                         (("system", "Be brief."), ("user", "q"), ("assistant", "a"))]}  # fmt: skip
    assert same(example(told), example(ours))
    first = {"conversations": [{"from": "system", "value": "Be brief."}, *told["conversations"]]}
    assert same(example(first), example(ours)) and same(example({**ours, "system": ""}), example(ours))
    assert same(example({"conversations": ours["messages"]}), example(ours))


@pytest.mark.parametrize(
    "turn", [{"from": "function_call", "value": "{}"}, {"from": 5, "value": "x"}, {"from": ["gpt"], "value": "x"},
             {"from": "gpt"},
             {"value": "x"}, {"from": "gpt", "value": 5}, 5, {"from": "observation", "value": "x"}]
)  # fmt: skip
def test_turns_that_are_none(turn):
    problem = refusal({"conversations": [{"from": "human", "value": "q"}, turn]})
    assert problem.reason == "form" and "[1]" in str(problem)


# ---------------------------------------------------------------------------------------------------------------- picture
def test_the_sheet_of_six_rows_is_read_at_once(tmp_path, k25):
    records = [{"image_base64": coded(PNG), "text": "word " * 300}, {"text": "word\n" * 300}] * 40
    path = write_jsonl(tmp_path, *records)
    assert k25("data", "inspect", path, f"--output={tmp_path}", "--workers=1", "--records=4")[0] == 0
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width == 1680 and image.height < 1500


def test_what_was_left_out_is_said_by_check_and_kept_by_build(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "alone.png")
    (folder / "a.md").write_text("a text")
    checked = runs.k25("data", "check", str(folder), "--json")
    assert sum(json.loads(checked.stdout)["left_out"].values()) == 1
    assert "left out" in runs.k25("data", "check", str(folder)).stdout
    built = runs.k25("data", "build", str(folder), f"--output={tmp_path / 'out'}", "--json")
    assert json.loads(built.stdout)["left_out"] == json.loads(checked.stdout)["left_out"]
