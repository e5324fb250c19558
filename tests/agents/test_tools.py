import numpy as np
import pytest

from k25_jax.agents.tools import IPython, check_arguments, declaration, reply, tool_for
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.text.conversation import Conversation
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.text.tool_calls import BadCall, Call

TOKENIZER = load_tokenizer()


class Adder:
    """A tool as others may write them."""

    name = "add"
    description = "Add two numbers."
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "integer"}},
        "required": ["a"],
    }

    def call(self, arguments):
        return Observation(str(arguments["a"] + arguments.get("b", 0)))


class Broken(Adder):
    name = "broken"

    def call(self, arguments):
        raise InfrastructureError("the disk is full")


TOOLS = [Adder(), Broken()]


def answer(call, tools):
    tool = tool_for(call, tools)
    observation = tool if isinstance(tool, Observation) else tool.call(call.arguments)
    return reply(call, observation), observation


def test_a_call_is_answered():
    message, observation = answer(Call("functions.add:0", "add", {"a": 1, "b": 2}), TOOLS)
    assert observation == Observation("3")
    assert message == {
        "role": "tool",
        "tool_call_id": "functions.add:0",
        "name": "add",
        "content": [{"type": "text", "text": "3"}],
    }


@pytest.mark.parametrize(
    "call, text",
    [
        (BadCall("unknown", "the id is wrong"), "Error: the id is wrong"),
        (Call("functions.sub:0", "sub", {}), "Error: there is no tool sub; there are: add, broken"),
        (Call("functions.add:0", "add", {}), "Error: the argument a is missing"),
        (Call("functions.add:0", "add", {"a": 1, "c": 2}), "Error: there is no argument c; there are: a, b"),
        (Call("functions.add:0", "add", {"a": "1"}), "Error: the argument a must be of type number, not str"),
        (
            Call("functions.add:0", "add", {"a": 1, "b": True}),
            "Error: the argument b must be of type integer, not bool",
        ),
    ],
)
def test_what_the_model_does_wrong_is_an_observation(call, text):
    message, observation = answer(call, TOOLS)
    assert (observation.text, observation.status) == (text, "error") and message["tool_call_id"] == call.id


def test_what_the_machine_does_wrong_is_an_exception():
    with pytest.raises(InfrastructureError, match="the disk is full"):
        answer(Call("functions.broken:0", "broken", {"a": 1}), TOOLS)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        ("string", "x", 1),
        ("integer", 1, 1.5),
        ("number", 1.5, "1"),
        ("boolean", True, 1),
        ("array", [1], {}),
        ("object", {}, []),
    ],
)
def test_types_of_arguments(kind, good, bad):
    schema = {"type": "object", "properties": {"x": {"type": kind}}}
    assert check_arguments({"x": good}, schema) == check_arguments({}, schema) == ""
    assert check_arguments({"x": bad}, schema).startswith(f"the argument x must be of type {kind}, not")


def test_a_conversation_with_ipython(sandbox):
    """From sampled tokens to the next prompt: a call with an image as its result, then one that cannot be read."""
    tool = IPython(sandbox)
    sandbox.put("in.png", np.zeros((4, 4, 3), np.uint8))
    conversation = Conversation(TOKENIZER, [declaration(tool)], "thinking", lambda part: [(None, part["image"])])
    conversation.add({"role": "user", "content": "Show me in.png."})
    calls = (
        '<|tool_call_begin|>functions.ipython:0<|tool_call_argument_begin|>{"code": "from PIL import Image\\n'
        "Image.open('in.png')\"}<|tool_call_end|>"
        "<|tool_call_begin|>functions.ipython:1<|tool_call_argument_begin|>{'code'<|tool_call_end|>"
    )
    section = f"I look.</think><|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>"
    start = len(conversation.prompt())
    sampled = TOKENIZER.encode(section, allow_special=True)
    said = conversation.say(sampled)
    for call in said.calls:
        message, _ = answer(call, [tool])
        conversation.add(message)
    rendered = conversation.rendered
    text = TOKENIZER.decode(conversation.prompt()[start + len(sampled) :])
    assert text.startswith(
        "<|im_system|>ipython<|im_middle|>## Return of functions.ipython:0\n[image 1]<|media_begin|>"
    )
    assert "## Return of functions.ipython:1\nError: the arguments are not JSON" in text and text.endswith("<think>")
    assert rendered.clips[0][:4] == b"\x89PNG" and rendered.tokens.count(BYTE_SPECIAL["<|media_pad|>"]) == 1
    taught = [token for token, weight in zip(rendered.tokens, rendered.weights, strict=True) if weight]
    assert taught == sampled
