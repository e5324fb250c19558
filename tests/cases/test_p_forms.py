"""Forms that others write: OpenAI's fine-tuning form, tools as JSON, base64 as browsers take it."""

import base64
import json

import pytest
from given import GIF, PNG, coded, example, learnt, refusal, same, text

URL = f"data:image/png;base64,{coded(PNG)}"
FUNCTION = {
    "name": "weather",
    "description": "x",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "tools",
    [
        json.dumps(TOOLS), [json.dumps(TOOLS[0])], [FUNCTION], json.dumps([FUNCTION]), [{"type": "function", **FUNCTION}],
        [{"type": "function", "function": {**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}}],
        json.dumps(TOOLS, indent=2), [{"function": FUNCTION, "type": None}],
    ],
    ids=range(8),
)  # fmt: skip
def test_tools_as_json(tools):
    wanted = example({"messages": MESSAGES, "tools": TOOLS})
    assert "type weather = (_: {" in text(wanted)
    assert same(example({"messages": MESSAGES, "tools": tools}), wanted)


@pytest.mark.parametrize(
    "tools", ["weather", "{", '"x"', "3", "{}", ["weather"], [["x"]], 5, {"a": 1}, [5], ['{"name": 5}']]
)
def test_tools_that_are_none(tools):
    problem = refusal({"messages": MESSAGES, "tools": tools})
    assert problem.reason == "form" and "tools" in str(problem)


def test_no_tools():
    for tools in ([], "[]", None, "null"):
        assert same(example({"messages": MESSAGES, "tools": tools}), example({"messages": MESSAGES})), tools


def test_messages_and_calls_as_json():
    call = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"a": "b"}'}}
    turn = {"role": "assistant", "tool_calls": [call]}
    wanted = example({"messages": [MESSAGES[0], turn], "tools": TOOLS})
    flat = {"name": "weather", "arguments": {"a": "b"}}
    for calls in (json.dumps([call]), [{**call, "function": flat}], [flat], json.dumps([flat])):
        given = {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": calls}], "tools": TOOLS}
        assert same(example(given), wanted), calls
        assert same(example({**given, "messages": json.dumps(given["messages"])}), wanted)
    assert same(example({"parts": json.dumps([{"text": "x"}])}), example({"text": "x"}))
    boxes = [{"label": "x", "box": [1, 2, 3, 4]}]
    picture = {"image_base64": coded(PNG)}
    assert same(example({**picture, "boxes": json.dumps(boxes)}), example({**picture, "boxes": boxes}))


def test_openais_fine_tuning_form():
    """https://platform.openai.com/docs/guides/fine-tuning: as it is written there, with pictures and tools."""
    image = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    given = {
        "messages": [
            {"role": "developer", "content": "be brief", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "what?"}, image]},
            {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
            {"role": "assistant", "content": "A cat.", "weight": 1},
        ],
        "tools": TOOLS,
        "parallel_tool_calls": False,
    }
    ours = json.loads(json.dumps(given).replace("developer", "system"))
    ours["messages"][1]["content"][1] = {"type": "image", "image_base64": coded(PNG)}
    found = example(given)
    assert same(found, example(ours)) and learnt(found) == "A cat.<|im_end|>" and len(found.clips) == 1
    assert "<|im_system|>system<|im_middle|>be brief" in text(found)


def test_reasoning_by_its_other_names():
    wanted = {"mode": "thinking", "messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "so"}]}
    for name in ("reasoning", "thinking"):
        given = {"mode": "thinking", "messages": [MESSAGES[0], {**MESSAGES[1], name: "so"}]}
        assert same(example(given), example(wanted))
        given["messages"][1]["reasoning_content"] = "other"
        assert "another reasoning_content" in str(refusal(given))


# --------------------------------------------------------------------------------------------------------------- base64
def spellings(data: bytes) -> dict[str, str]:
    plain, safe = coded(data), base64.urlsafe_b64encode(data).decode()
    return {
        "plain": plain, "wrapped": base64.encodebytes(data).decode(), "wrapped as MIME": "\r\n".join(_cut(plain, 76)),
        "without padding": plain.rstrip("="), "for URLs": safe, "for URLs, no padding": safe.rstrip("="),
        "with spaces": f" {plain}\t", "a data URL": f"data:image/png;base64,{plain}",
        "a data URL with a space": f"data:image/png;base64, {plain}", "capitals": f"DATA:image/PNG;BASE64,{plain}",
        "parameters": f"data:image/png;name=a.png;base64,{plain}", "in percent": f"data:;base64,{plain.replace('+', '%2B')}",
        "wrapped data URL": f"data:image/png;base64,\n{base64.encodebytes(data).decode()}",
    }  # fmt: skip


def _cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def test_base64_in_records():
    for kind, data in (("image", PNG), ("video", GIF)):
        for name, spelling in spellings(data).items():
            found = example({f"{kind}_base64": spelling, "text": "x"})
            assert same(found, example({kind: data, "text": "x"})), name


@pytest.mark.parametrize("given", ["!!!", "abcde", "a", "ab=c", "é", 7, 1.5, True, "data:x", "data:image/png;base64,!"])
def test_what_is_no_base64(given):
    for data in ({"image_base64": given, "text": "x"}, {"parts": [{"image_base64": given}, {"text": "x"}]}):
        problem = refusal(data)
        assert problem.reason == "base64" and "image_base64" in str(problem)
