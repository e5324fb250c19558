"""What is in the calls that models write: no two have one id, and none has empty arguments."""

import pytest
from test_i_call_ids import END, NAMES, answer, one, section, streamed

from k25_jax.text.conversation import Conversation
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.text.tool_calls import Call, CallIds, parse

TOKENIZER = load_tokenizer()


def calls_of(said, names=NAMES):
    whole, read = answer(said, names)[1], parse(said, TOKENIZER, names=names).calls
    assert [(id_, name) for id_, name, _ in whole] == [(call.id, call.name) for call in read if isinstance(call, Call)]
    return [id_ for id_, _, _ in whole]


def test_no_two_calls_have_one_id():
    twice = section(one("functions.get:0"), one("functions.get:0"), one("functions.get:0"), one("get"))
    assert calls_of(twice) == ["functions.get:0", "functions.get:1", "functions.get:2", "functions.get:3"]
    mixed = section(one("functions.get:1"), one("get"), one("functions.get:1"), one("functions.get:0"))
    found = calls_of(mixed)
    assert len(set(found)) == 4 and found[0] == "functions.get:1" and found[3] == "functions.get:0"
    others = section(one("functions.get:0"), one("functions.search2:0"))
    assert calls_of(others) == ["functions.get:0", "functions.search2:0"]


def test_ids_of_earlier_turns_are_taken():
    ids = CallIds()
    ids.next("get", "functions.get:0")
    ids.next("get", "call_1")
    assert ids.copy().read("functions.get:0", NAMES) == ("functions.get:2", "get")
    assert ids.copy().read("functions.get:7", NAMES) == ("functions.get:7", "get")
    assert ids.read("get", NAMES) == ("functions.get:2", "get") and ids.count == 3


def test_a_conversation_has_ids_of_its_own_through_its_turns():
    tools = [{"type": "function", "function": {"name": name}} for name in NAMES]
    conversation = Conversation(TOKENIZER, tools, "plain")
    ids = []
    for written in ("get_weather:0", "functions.get_weather:0", "functions.get_weather"):
        conversation.add({"role": "user", "content": "?"})
        conversation.prompt()
        (call,) = conversation.say(TOKENIZER.encode(section(one(written)) + END, allow_special=True)).calls
        conversation.add({"role": "tool", "tool_call_id": call.id, "content": "x"})
        ids.append(call.id)
    assert ids == [f"functions.get_weather:{number}" for number in range(3)]
    text = TOKENIZER.decode(conversation.rendered.tokens)
    assert [f"## Return of {id_}\n" in text for id_ in ids] == [True] * 3


@pytest.mark.parametrize("blank", ["", " ", "\n \t"])
def test_empty_arguments_are_an_empty_object(blank):
    said = section(one("functions.get:0", blank), one("search2", blank)) + END
    assert [arguments for _, _, arguments in answer(said)[1]] == ["{}", "{}"]
    assert streamed(said, [True]) == answer(said)
    assert parse(said, TOKENIZER, names=NAMES).calls == (
        Call("functions.get:0", "get", {}), Call("functions.search2:1", "search2", {}),
    )  # fmt: skip
    cut = section(one("functions.get:0", blank)).split("<|tool_call_end|>")[0]
    assert answer(cut, reason="length")[1:] == ([("functions.get:0", "get", "")], "length")
    assert answer(cut + END)[1:] == ([("functions.get:0", "get", "{}")], "tool_calls")
