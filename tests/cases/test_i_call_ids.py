"""Ids of calls as models write them: what is declared decides, the id becomes ours, nothing of it is content."""

import json

import numpy as np
import pytest

from benchmarks.serving import minute_model
from k25_jax.sampling.requests import FinishEvent, Request, TokenEvent
from k25_jax.serving.requests import Ask
from k25_jax.serving.responses import Answer
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.text.tool_calls import LONGEST_ID, BadCall, Call, named, parse
from k25_jax.text.turn import TurnForm

SERVED, TOKENIZER = minute_model(), load_tokenizer()
NAMES = ("get_weather", "weather.get", "get", "mcp-files.read_file", "search2")
END = "<|im_end|>"


def one(id_, arguments="{}"):
    return f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls):
    return "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>"


def ask(names=NAMES, mode="plain"):
    return Ask(True, [Request([1, 2, 3])], False, False, None, False, TurnForm(mode, True), names)


def answer(said, names=NAMES, mode="plain", reason="stop"):
    """(content, [(id, name, arguments)], reason) of the whole answer."""
    whole = Answer(ask(names, mode), SERVED)
    for token in TOKENIZER.encode(said, allow_special=True):
        whole.add(0, TokenEvent(0, 0, token, -0.5, 0))
    whole.add(0, FinishEvent(0, 0, reason))
    choice = whole.body()["choices"][0]
    calls = [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls", [])
    ]
    return choice["message"]["content"] or "", calls, choice["finish_reason"]


def streamed(said, cuts, names=NAMES, mode="plain", reason="stop"):
    """The same of a stream, whose chunks are asked for where `cuts` is true."""
    stream, content, calls, end = Answer(ask(names, mode), SERVED), "", {}, None
    tokens = TOKENIZER.encode(said, allow_special=True)
    events = [*(TokenEvent(0, 0, token, -0.5, 0) for token in tokens), FinishEvent(0, 0, reason)]
    for number, event in enumerate(events):
        stream.add(0, event)
        if number < len(tokens) and not cuts[number % len(cuts)]:
            continue
        for chunk in stream.chunks():
            for piece in chunk["choices"]:
                content += piece["delta"].get("content", "")
                for part in piece["delta"].get("tool_calls", []):
                    if "id" in part:
                        assert part["index"] == len(calls)
                        calls[part["index"]] = [part["id"], part["function"]["name"], ""]
                    calls[part["index"]][2] += part["function"]["arguments"]
                end = piece["finish_reason"] or end
    return content, [tuple(call) for call in calls.values()], end


@pytest.mark.parametrize(
    "written, name",
    [
        ("functions.get_weather:0", "get_weather"),
        ("get_weather:0", "get_weather"),
        ("functions.get_weather", "get_weather"),
        ("get_weather", "get_weather"),
        (" functions.get_weather:0 \n", "get_weather"),
        ("functions. get_weather : 0", "get_weather"),
        ("functions get_weather:0", "get_weather"),
        ("functions:get_weather:0", "get_weather"),
        ("functions::get_weather", "get_weather"),
        ("functions/get_weather", "get_weather"),
        ("Functions.get_weather:1", "get_weather"),
        ("tools.get_weather:0", "get_weather"),
        ("default_api.get_weather:0", "get_weather"),
        ("a.b.c.get_weather:17", "get_weather"),
        ("get_weather:", "get_weather"),
        ("get_weather:call_1", "get_weather"),
        ("functions.get_weather:0:1", "get_weather"),
        ("functions.weather.get:3", "weather.get"),
        ("weather.get:3", "weather.get"),
        ("weather.get", "weather.get"),
        ("x.weather.get:0", "weather.get"),
        ("functions.get:0", "get"),
        ("sky.get:0", "get"),
        ("functions.mcp-files.read_file:0", "mcp-files.read_file"),
        ("mcp-files.read_file", "mcp-files.read_file"),
        ("search2:2", "search2"),
    ],
)
def test_an_id_stands_for_the_declared_tool_that_it_names(written, name):
    own = f"functions.{name}:"
    text = f"so{section(one(written, json.dumps({'x': 1})))}{END}"
    content, ((id_, called, arguments),), reason = answer(text)
    assert (content, called, arguments, reason) == ("so", name, '{"x": 1}', "tool_calls")
    assert id_ == (written if written.startswith(own) and written[len(own) :].isdigit() else own + "0")
    read = parse(text, TOKENIZER, names=NAMES)
    assert read.calls == (Call(id_, name, {"x": 1}),) and read.content == "so"


@pytest.mark.parametrize(
    "written", ["", "weather", "get_weathers:0", "forget:0", "call_9f3e", "functions.", "get-weather", "xget_weather"]
)
def test_what_names_no_declared_tool_is_no_call(written):
    text = f"so{section(one(written))}{END}"
    assert answer(text) == (f"so{written}{{}}", [], "stop")
    (bad,) = parse(text, TOKENIZER, names=NAMES).calls
    assert isinstance(bad, BadCall) and bad.id == (written or "unknown") and "functions.NAME:INDEX" in bad.error


def test_an_undeclared_name_in_our_form_is_a_call_as_before():
    """Whoever makes the calls says that there is no such tool."""
    assert answer(section(one("functions.other:0")) + END)[1] == [("functions.other:0", "other", "{}")]
    assert parse(section(one("functions.other:0")), TOKENIZER, names=NAMES).calls[0].name == "other"
    assert named("functions.other:0") == "other" and named("other:0") is None


def test_a_long_id_is_no_call():
    assert named("x." * LONGEST_ID + "get", NAMES) is None
    assert named("functions." + "x" * 500 + ":0", NAMES) == "x" * 500


def test_the_given_cases_leave_no_content_and_finish_as_calls():
    for written in ("get_weather:0", "functions.get_weather"):
        for mode, before in (("plain", ""), ("thinking", "hm</think>"), ("thinking", "hm")):
            found = answer(before + section(one(written, '{"city": "Paris"}')) + END, mode=mode)
            assert found == ("", [("functions.get_weather:0", "get_weather", '{"city": "Paris"}')], "tool_calls")


def test_streams_are_the_whole_whatever_the_tokens():
    """Random turns of marks and texts, cut anywhere: a stream says what the whole answer says, which never fails."""
    rng = np.random.default_rng(8)
    marks = [name for name in BYTE_SPECIAL if "tool" in name or "think" in name]
    texts = ["get_weather:0", "functions.get", "functions.get:0", "{}", " ", '{"a": "é"}', "x", "so", "functions.x:1"]
    for _ in range(500):
        said = "".join(rng.choice(marks if rng.random() < 0.6 else texts) for _ in range(rng.integers(1, 14)))
        mode, reason = rng.choice(["plain", "thinking", "instant"]), rng.choice(["stop", "length"])
        whole = answer(said, mode=mode, reason=reason)
        for _ in range(2):
            assert streamed(said, rng.random(5) < 0.5, mode=mode, reason=reason) == whole
        ids = [id_ for id_, _, _ in whole[1]]
        assert len(set(ids)) == len(ids)
        parse(said, TOKENIZER, mode, NAMES)


def test_whole_calls_are_those_that_the_reader_of_turns_finds():
    rng = np.random.default_rng(9)
    written = ["get_weather:0", "functions.get", "get:0", "functions.get:0", "functions.get:0", "x.y", "functions.z:4"]
    for _ in range(300):
        ids = [str(rng.choice(written)) for _ in range(rng.integers(1, 6))]
        said = section(*(one(id_, rng.choice(["", '{"a": 1}'])) for id_ in ids)) + END
        calls = [call for call in parse(said, TOKENIZER, names=NAMES).calls if isinstance(call, Call)]
        found = [(id_, name, json.loads(arguments)) for id_, name, arguments in answer(said)[1]]
        assert found == [(call.id, call.name, call.arguments) for call in calls]
