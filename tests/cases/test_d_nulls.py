"""null counts as absent, at every depth, in JSON and as the padding of Parquet's structs."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from given import GIF, PNG, coded, example, parquet_rows, prepared, refusal, same, text

from k25_jax.config import SourceConfig
from k25_jax.data.normalise import without_nulls
from k25_jax.data.sources import open_source

PICTURE = {"type": "image", "image_base64": coded(PNG)}


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TALK = {
    "tools": [
        tool("read", path={"type": "string", "description": "where"}),
        tool("add", a={"type": "integer"}, b={"type": "array", "items": {"type": "integer"}}),
    ],
    "messages": [
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "read", "arguments": {"path": "x"}}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c2", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
        {"role": "assistant", "content": "3", "weight": 1},
    ],
}


def padded(value, names=("image", "text", "weight", "name", "extra")):
    """With null fields in every mapping."""
    if isinstance(value, dict):
        return dict.fromkeys(names) | {key: padded(one, names) for key, one in value.items()}
    return [padded(one, names) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "record",
    [
        {"parts": [{"type": "text", "text": "see"}, PICTURE]},
        {"image_base64": coded(PNG), "caption": "a cat"},
        {"image_base64": coded(PNG), "caption": "a", "boxes": [{"label": "x", "box": [1, 2, 3, 4]}]},
        {"messages": [{"role": "user", "content": [PICTURE, {"text": "?"}]}, {"role": "assistant", "content": "yes"}]},
        TALK,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
)
def test_nulls_everywhere_change_nothing(record):
    assert same(example(padded(record)), example(record))
    assert without_nulls(padded(record)) == record


def test_parquet_pads_parts_and_messages(tmp_path):
    content = [{"type": "text", "text": "see"}, {"type": "image", "image": {"bytes": PNG, "path": None}}]
    film = [{"video": {"bytes": GIF, "path": None}}, {"text": "red"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    rows = [
        {"parts": content},
        {"parts": film},
        {"messages": [{"role": "user", "content": content}, answer]},
    ]
    for row, record in zip(rows, parquet_rows(tmp_path, rows), strict=True):
        assert None in record.data.values()  # pyarrow did pad them
        assert same(prepared(record), example(row))


def test_parquet_pads_tools_and_calls(tmp_path):
    (record,) = parquet_rows(tmp_path, [TALK])
    first = record.data["tools"][0]["function"]["parameters"]["properties"]
    assert first["a"] is None and record.data["messages"][1]["tool_calls"][0]["function"]["arguments"]["b"] is None
    assert same(prepared(record), example(TALK))
    assert "type add = (_: {\n  a: number,\n  b?: Array<number>\n})" in text(prepared(record))


def test_structs_of_nothing_but_nulls_and_maps(tmp_path):
    """As other writers pad: a struct that is there, with null fields; and properties as a map."""
    struct = {
        "properties": {"path": {"type": "string"}, "a": {"type": None, "items": {"type": None}}},
        "type": "object",
    }
    wanted = {**TALK, "tools": [tool("read", path={"type": "string"})]}
    wanted["tools"][0]["function"]["parameters"].pop("required")
    one = {"type": "function", "function": {"name": "read", "parameters": struct}}
    assert same(example({**TALK, "tools": [one, {"type": None, "function": None}]}), example(wanted))

    kind = pa.struct([("type", pa.string()), ("description", pa.string())])
    parameters = pa.struct([("type", pa.string()), ("properties", pa.map_(pa.string(), kind))])
    function = pa.struct([("name", pa.string()), ("parameters", parameters)])
    tools = pa.list_(pa.struct([("type", pa.string()), ("function", function)]))
    mapped = {"type": "object", "properties": [("path", {"type": "string", "description": None})]}
    given = [[{"type": "function", "function": {"name": "read", "parameters": mapped}}]]
    table = pa.table({"tools": pa.array(given, tools), "messages": pa.array([TALK["messages"]])})
    pa.parquet.write_table(table, tmp_path / "map.parquet")
    assert same(prepared(open_source(SourceConfig(str(tmp_path / "map.parquet")))[0]), example(wanted))


def test_nulls_that_are_values_stay():
    """Among the values of an enum, and in arguments that came as a JSON string."""
    unit = {"type": ["string", "null"], "enum": ["C", None]}
    call = {"function": {"name": "w", "arguments": '{"unit": null, "days": [1, null]}'}}
    data = {"tools": [tool("w", unit=unit)], "messages": [{"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]}]}  # fmt: skip
    shown = text(example(data))
    assert 'unit: "C" | None' in shown and '{"unit": null, "days": [1, null]}' in shown


def test_a_call_whose_arguments_are_null_has_none():
    for arguments in ({}, {"path": None}, None):
        call = {"id": None, "type": "function", "function": {"name": "read", "arguments": arguments}}
        data = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
        assert "read:0<|tool_call_argument_begin|>{}<|tool_call_end|>" in text(example(data)), arguments


def test_a_picture_that_is_null_inside_is_missing_and_no_text():
    """{"bytes": null, "path": null} beside a caption is a picture that was lost; in a part that is a text it is padding."""
    empty = {"bytes": None, "path": None}
    assert refusal({"image": empty, "text": "a cat"}).reason == "form"
    assert refusal({"parts": [{"type": "image", "image": empty}, {"text": "x"}]}).reason == "form"
    padded_part = {"type": "text", "text": "see", "image": empty}
    assert same(example({"parts": [padded_part, PICTURE]}), example({"parts": [{"text": "see"}, PICTURE]}))
    assert refusal({"text": None}).reason == refusal({"messages": None}).reason == "form"


def test_nulls_inside_a_field_that_is_json():
    record = {**TALK, "tools": json.dumps(padded(TALK["tools"])), "messages": json.dumps(padded(TALK["messages"]))}
    assert same(example(record), example(TALK))
