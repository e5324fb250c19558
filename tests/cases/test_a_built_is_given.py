"""What training reads is what `k25 data build` writes: every field that a reader knows goes through."""

import copy
import dataclasses
import datetime
import decimal
import json

import numpy as np
import pytest
from given import DATA, MODEL, PNG, TOKENIZER, coded, example, gif, prepared, same, text, write_jsonl, write_media

from k25_jax.config import SourceConfig
from k25_jax.data.attach import MEDIUM_FIELDS
from k25_jax.data.build import build, contained
from k25_jax.data.examples import EXAMPLES
from k25_jax.data.forms import form_of, prepare
from k25_jax.data.normalise import canonical
from k25_jax.data.records import Record
from k25_jax.data.sources import open_source
from k25_jax.data.statistics import Reader

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "unit": {"enum": ["C", "F", None]}},
            "required": ["town"],
        },
    },
}
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(PNG)}", "detail": "low"}}
CALLS = {
    "tools": [TOOL],
    "mode": "thinking",
    "messages": [
        {"role": "system", "name": "rules", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, IMAGE, {"type": "image", "image": "cat.png"}]},
        {
            "role": "assistant",
            "name": "k2",
            "content": None,
            "reasoning_content": "let me look",
            "weight": 0.5,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": null}'}},
                {"id": "call_2", "function": {"name": "weather", "arguments": {"town": "Rome"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_2", "content": [{"text": "sun"}, {"video": "clip.mp4"}]},
        {"role": "assistant", "content": "bad", "reasoning_content": "no", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "Sun.", "reasoning_content": "yes"},
    ],
}
FULL = {  # every field that a form has
    "text": {"text": "plain", "weight": 0.5},
    "pair": {"image": "cat.png", "caption": "a cat", "weight": 2},
    "video-text": {"video": {"path": "clip.mp4"}, "text": "jumps", "weight": 0.25},
    "ocr": {"image_base64": coded(PNG), "ocr": "STOP", "weight": 3},
    "grounding": {**EXAMPLES["grounding"], "caption": "pets", "weight": 0.5},
    "screen": {**EXAMPLES["screen"], "caption": "a form", "weight": 0.5},
    "interleaved": {
        "parts": [{"text": "a"}, {"type": "image", "image": "dog.png"}, {"video": "clip.mp4"}],
        "weight": 0.5,
    },
    "conversation": {**CALLS, "weight": 0.5},
}
ELSEWHERE = [  # in the spellings of others
    {"messages": CALLS["messages"], "tools": json.dumps([TOOL]), "mode": "thinking"},
    {"messages": json.dumps(CALLS["messages"]), "tools": [json.dumps(TOOL)], "mode": "instant"},
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
     "image": "cat.png", "system": "be brief"},
    {"images": ["cat.png", "dog.png"], "text": "<image> or <image>?"},
    {"image_path": "cat.png", "text": "a cat", "image_url": "http://x/cat.png"},
]  # fmt: skip
META = {"id": 7, "source": "web", "url": "http://x/y", "license": "CC0", "score": 0.5, "tags": ["a"], "image_id": "x7"}


def test_the_forms_are_all_here():
    assert FULL.keys() == EXAMPLES.keys()
    for examples in (FULL, EXAMPLES):
        assert all(form_of(canonical(Record("r", data)).data) == form for form, data in examples.items())


@pytest.mark.parametrize(
    "data", [*FULL.values(), *EXAMPLES.values(), *ELSEWHERE], ids=range(len(FULL) * 2 + len(ELSEWHERE))
)
def test_a_record_and_what_is_built_of_it_are_one_example(tmp_path, data):
    record = Record("r", copy.deepcopy(data) | META, write_media(tmp_path))
    built = contained(record)
    assert record.data == data | META, "the given record was changed"
    assert same(prepared(record), prepared(built)), text(prepared(built))
    assert contained(built).data == built.data  # built again: the same
    assert canonical(canonical(record)) == canonical(record)
    assert META.items() <= built.data.items()  # nothing was left out
    assert {name for name in data if name.startswith("image_url")} <= {name[:9] for name in built.data}
    assert canonical(record).data.keys() - set(MEDIUM_FIELDS) <= built.data.keys()


@pytest.mark.parametrize("field", ["tools", "mode", "weight"])
def test_these_fields_matter(tmp_path, field):
    """Else the comparison above would not see that one of them is dropped."""
    root = write_media(tmp_path)
    data = {key: value for key, value in FULL["conversation"].items() if key != field}
    if field == "mode":
        data["mode"] = "instant"
    assert not same(example(FULL["conversation"], root), example(data, root))


def test_through_the_files(tmp_path):
    """A source, the data set built of it, and one built of that."""
    records = [*FULL.values(), *EXAMPLES.values(), *ELSEWHERE]
    file = write_jsonl(write_media(tmp_path), *records)
    given, path = open_source(SourceConfig(str(file))), str(file)
    for name in ("once", "twice"):
        manifest = build(Reader((SourceConfig(path),), DATA, MODEL), tmp_path / name, workers=1)
        assert manifest["good"] == len(records) and manifest["bad"] == {}
        path = str(tmp_path / name)
        built = open_source(SourceConfig(path))
        assert all(same(prepared(given[i]), prepared(built[i])) for i in range(len(records)))
        assert built[0].data["from"] == f"{file}:1"  # where it was first


def test_metadata_of_any_type_is_kept():
    """Dates and decimals, as Parquet has them, become text."""
    meta = {
        "date": datetime.date(2024, 1, 2),
        "price": decimal.Decimal("1.50"),
        "nested": [{"a": None, "b": [1, None]}],
    }
    built = contained(Record("r", {"text": "x", **meta})).data
    assert built == {"from": "r", "text": "x", "date": "2024-01-02", "price": "1.50", "nested": [{"b": [1, None]}]}


def test_media_are_inside(tmp_path):
    root = write_media(tmp_path)
    built = contained(Record("r", FULL["conversation"], root)).data
    assert "cat.png" not in json.dumps(built) and "clip.mp4" not in json.dumps(built)
    assert coded(gif()) in json.dumps(built)


@pytest.mark.parametrize("fps", [1.0, 2.0, 5.0])
def test_media_in_memory(fps):
    """Pixels of pictures and frames of videos, as rendered tasks have them; of the frames several are the same."""
    frames = np.random.default_rng(0).integers(0, 256, (7, 37, 51, 3), dtype=np.uint8)
    frames[3:5] = frames[2]
    data = dataclasses.replace(DATA, video_fps=fps)
    for given in (
        {"image": frames[0], "text": "x"},
        {"video": frames, "text": "x"},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": frames[:1]}, {"image": frames[1]}]},
                      {"role": "assistant", "content": "x"}]},
    ):  # fmt: skip
        record = Record("r", given)
        built = contained(record, fps)
        assert same(prepare(record, TOKENIZER, data, MODEL), prepare(built, TOKENIZER, data, MODEL))


def test_a_task_of_videos_is_built():
    """Every record of it, as training reads it."""
    task = open_source(SourceConfig("motion:train"))
    for index in range(4):
        assert same(prepared(task[index]), prepared(contained(task[index], DATA.video_fps)))
