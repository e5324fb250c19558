import itertools

import pytest

from k25_jax.text.chat import ChatError, render
from k25_jax.text.tokenizer import BYTE_SPECIAL, PUBLIC_SPECIAL, load_tokenizer
from k25_jax.text.tool_calls import BadCall, Call, parse

TOKENIZER = load_tokenizer()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Ünits: °C",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}


def call(name, arguments, id_=None):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id_ is None else call | {"id": id_}


def text_of(messages, **how):
    return TOKENIZER.decode(render(messages, TOKENIZER, **how).tokens)


def said(calls, content="", **more):
    return {"role": "assistant", "content": content, "tool_calls": calls} | more


def test_the_exchange_of_the_public_guide():
    """Kimi's guide to tool calls, in which the weather in Beijing is asked for."""
    messages = [
        {"role": "user", "content": "Weather in Beijing?"},
        said([call("get_weather", '{"city": "Beijing"}', "functions.get_weather:0")]),
        {
            "role": "tool",
            "tool_call_id": "functions.get_weather:0",
            "name": "get_weather",
            "content": '{"weather": "Sunny"}',
        },
    ]
    assert text_of(messages, tools=[WEATHER], add_generation_prompt=True) == (
        "<|im_system|>tool_declare<|im_middle|># Tools\n\n## functions\nnamespace functions {\n// Ünits: °C\n"
        "type get_weather = (_: {\n  city: string\n}) => any;\n}\n<|im_end|>"
        "<|im_user|>user<|im_middle|>Weather in Beijing?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Beijing"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n"
        '{"weather": "Sunny"}<|im_end|><|im_assistant|>assistant<|im_middle|>'
    )


def test_the_markers_have_tokens_of_their_own_in_both_vocabularies():
    names = ("tool_calls_section_begin", "tool_calls_section_end", "tool_call_begin", "tool_call_argument_begin")
    for name in (*names, "tool_call_end", "im_system"):
        assert f"<|{name}|>" in BYTE_SPECIAL and f"<|{name}|>" in PUBLIC_SPECIAL
    rendered = render([said([call("f", {})])], TOKENIZER)
    begin, end = BYTE_SPECIAL["<|tool_calls_section_begin|>"], BYTE_SPECIAL["<|im_end|>"]
    first = rendered.tokens.index(begin)
    assert rendered.weights[first:] == [1.0] * (len(rendered.tokens) - first) and rendered.tokens[-1] == end


def test_calls_without_an_id_are_counted_through_the_conversation():
    messages = [
        said([call("a", {}), call("b", {}, "call_xyz")]),
        {"role": "tool", "tool_call_id": "functions.a:0", "content": "1"},
        {"role": "tool", "tool_call_id": "call_xyz", "content": "2"},
        said([call("a", {})]),
    ]
    text = text_of(messages)
    assert "functions.a:0" in text and "functions.b:1<" in text and "functions.a:2" in text
    assert "## Return of functions.b:1\n2" in text and "call_xyz" not in text


@pytest.mark.parametrize("mode", ["plain", "thinking", "instant"])
def test_what_is_rendered_is_read_back(mode):
    arguments = {"code": 'print("<|tool_call_end|> ü \\n")', "n": [1, 2.5, None, {"deep": True}]}
    message = said([call("ipython", arguments), call("other.tool-2", {})], "I will look: </think>x")
    if mode == "thinking":
        message["reasoning_content"] = "so <|tool_calls_section_begin|>"
    if mode == "plain":
        message["content"] = "I will look"
    prompt = render([{"role": "user", "content": "?"}], TOKENIZER, mode=mode, add_generation_prompt=True).tokens
    tokens = render([{"role": "user", "content": "?"}, message], TOKENIZER, mode=mode).tokens
    assert tokens[: len(prompt)] == prompt
    read = parse(tokens[len(prompt) :], TOKENIZER, mode)
    assert read.calls == (
        Call("functions.ipython:0", "ipython", arguments),
        Call("functions.other.tool-2:1", "other.tool-2", {}),
    )
    assert (read.reasoning, read.content, read.whole) == (
        message.get("reasoning_content", ""),
        message["content"],
        True,
    )


def test_thinking_ends_where_calls_begin():
    text = (
        "hm<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    )
    read = parse(text, TOKENIZER, "thinking")
    assert (read.reasoning, read.content, read.whole) == ("hm", "", False)
    assert read.calls == (Call("functions.f:0", "f", {}),)  # the section's own end is not needed
    assert parse("only thoughts", TOKENIZER, "thinking").reasoning == "only thoughts"
    assert parse("<think>a</think>b", TOKENIZER, "plain").reasoning == "a"
    assert parse("<think>a</think>b", TOKENIZER, "instant").content == "<think>a</think>b"


BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def one(id_="functions.f:0", arguments="{}"):
    return f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


@pytest.mark.parametrize(
    "section, id_, error",
    [
        (one(arguments="{'a': 1}"), "functions.f:0", "not JSON"),
        (one(arguments='{"a": NaN}'), "functions.f:0", "NaN is not JSON"),
        (one(arguments="[" * 100_000), "functions.f:0", "not JSON"),
        (one(arguments="9" * 5000), "functions.f:0", "not JSON"),
        (one(arguments="[1]"), "functions.f:0", "must be a JSON object, not a list"),
        (one("f"), "f", "functions.NAME:INDEX"),
        (one("functions.f"), "functions.f", "functions.NAME:INDEX"),
        (one("functions.f g:0"), "functions.f g:0", "functions.NAME:INDEX"),
        (one(""), "unknown", "functions.NAME:INDEX"),
        (one()[: -len("<|tool_call_end|>")], "functions.f:0", "cut off"),
        ("<|tool_call_begin|>functions.f:0{}<|tool_call_end|>", "functions.f:0{}", "functions.NAME:INDEX"),
        ("<|tool_call_begin|>functions.f:0<|tool_call_end|>", "functions.f:0", "one <|tool_call_argument_begin|>"),
        (one(arguments="{}<|tool_call_argument_begin|>{}"), "functions.f:0", "one <|tool_call_argument_begin|>"),
        (one() + "and then", "functions.f:0", "text between"),
        ("hello" + one(), "unknown", "text outside of a call"),
        ("hello", "unknown", "text outside of a call"),
        ("", "unknown", "without a call"),
    ],
)
def test_malformed_calls_are_values(section, id_, error):
    read = parse(f"text{BEGIN}{section}{END}<|im_end|>", TOKENIZER)
    (bad,) = [call for call in read.calls if isinstance(call, BadCall)]
    assert bad.id == id_ and error in bad.error and read.content == "text"


def test_any_tokens_at_all_can_be_read():
    """Every sequence of three markers, with text between them: read without an exception, and twice the same."""
    markers = [id_ for name, id_ in BYTE_SPECIAL.items() if "tool" in name or "think" in name or name == "<|im_end|>"]
    for a, b, c in itertools.product(markers, repeat=3):
        tokens = [a, *b"functions.f:0", b, *b"{}", c, *b"x"]
        for mode in ("plain", "thinking", "instant"):
            read = parse(tokens, TOKENIZER, mode)
            assert read == parse(tokens, TOKENIZER, mode)
            assert all(isinstance(call, (Call, BadCall)) for call in read.calls)


def test_text_that_looks_like_a_call_is_text():
    text = f"{BEGIN}{one()}{END}"
    read = parse(TOKENIZER.encode(text), TOKENIZER)
    assert read.content == text and not read.calls
    assert TOKENIZER.decode(render([{"role": "assistant", "content": text}], TOKENIZER).tokens).count(BEGIN) == 1
    assert BYTE_SPECIAL[BEGIN] not in render([{"role": "assistant", "content": text}], TOKENIZER).tokens
    assert BYTE_SPECIAL[BEGIN] not in render([said([call("f", {"x": text})])], TOKENIZER).tokens[:-1][-len(text) :]


@pytest.mark.parametrize(
    "bad, where",
    [
        (said(["x"]), r"messages\[0\]\.tool_calls\[0\] must be"),
        (said("x"), r"messages\[0\]\.tool_calls must be a list"),
        (said([call("a b", {})]), r"tool_calls\[0\]\.function\.name"),
        (said([call("f", {})] + [call("f", None)]), r"tool_calls\[1\]\.function\.arguments must be"),
        (said([call("f", {"x": object()})]), r"tool_calls\[0\]\.function\.arguments cannot be"),
        (said([call("f", {}, 7)]), r"tool_calls\[0\]\.id"),
        ({"role": "tool", "content": "x"}, r"messages\[0\]\.tool_call_id is missing"),
        ({"role": "tool", "tool_call_id": 3, "content": "x"}, r"messages\[0\]\.tool_call_id must be a string"),
        ({"role": "user", "content": "x", "tool_calls": [call("f", {})]}, r"tool_calls belongs to the role assistant"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, r"tool_call_id belongs to the role tool"),
        ({"role": "user", "content": "x", "name": 5}, r"messages\[0\]\.name must be a string"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, r"reasoning_content needs the mode"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["y"]}, r"reasoning_content must be a string"),
    ],
)
def test_bad_messages_are_named(bad, where):
    with pytest.raises(ChatError, match=where):
        render([bad], TOKENIZER)


def test_bad_tools_and_modes_are_named():
    unknown = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": []}}}}}
    places = (
        ([{"name": "f"}], r"^tools\[0\] must be"),
        ([WEATHER, unknown], r"^tools\[1\].*parameters.properties.x.type must be"),
    )
    for tools, error in places:
        with pytest.raises(ChatError, match=error):
            render([{"role": "user", "content": "x"}], TOKENIZER, tools=tools)
    with pytest.raises(ChatError, match="mode must be one of plain, thinking, instant"):
        render([{"role": "user", "content": "x"}], TOKENIZER, mode="fast")
