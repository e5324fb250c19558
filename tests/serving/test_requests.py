"""Bodies of OpenAI's API: what they become for the engine, and how the error names the field."""

import json

import pytest

from benchmarks.serving import CONFIG, minute_model
from k25_jax.sampling.sample import SampleConfig
from k25_jax.serving.errors import ApiError
from k25_jax.serving.requests import chat_ask, completion_ask
from k25_jax.text.chat import render
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer

SERVED, TOKENIZER = minute_model(), load_tokenizer()
HI = [{"role": "user", "content": "hi"}]
SEARCH = {"type": "function", "function": {"name": "search", "description": "find", "parameters": {"type": "object"}}}
READ = {"type": "function", "function": {"name": "read"}}
OFF = {"thinking": {"type": "disabled"}}


def chat(**more):
    return chat_ask(json.dumps({"model": "minute", "messages": HI, "seed": 1} | more).encode(), SERVED)


def complete(**more):
    return completion_ask(json.dumps({"model": "minute", "prompt": "hi", "seed": 1} | more).encode(), SERVED)


def test_a_chat_body_becomes_the_rendered_conversation_and_openais_defaults():
    ask = chat()
    (request,) = ask.requests
    assert request.tokens == render(HI, TOKENIZER, add_generation_prompt=True).tokens
    room = SERVED.max_length - len(request.tokens)
    assert request.sampling == SampleConfig(room, 1.0, 1.0, 1, CONFIG.eos_ids)  # its eos is <|im_end|>
    assert (request.n, request.stop, request.alternatives) == (1, (), 0)
    assert (ask.stream, ask.include_usage, ask.top_logprobs, ask.return_token_ids) == (False, False, None, False)


def test_everything_that_can_be_said():
    ask = chat(
        n=3, temperature=0.5, top_p=0.25, max_completion_tokens=7, stop=["a", "bc", "a"], stream=True, logprobs=True,
        top_logprobs=4, stream_options={"include_usage": True}, return_token_ids=True, user="me", frequency_penalty=0,
        logit_bias={}, response_format={"type": "text"}, tools=None, presence_penalty=None,
    )  # fmt: skip
    (request,) = ask.requests
    assert request.sampling == SampleConfig(7, 0.5, 0.25, 1, CONFIG.eos_ids)
    assert (request.n, request.stop, request.alternatives) == (3, ("a", "bc"), 4)
    assert (ask.stream, ask.include_usage, ask.top_logprobs, ask.return_token_ids) == (True, True, 4, True)
    assert chat(logprobs=True).top_logprobs == 0 and chat(ignore_eos=True).requests[0].sampling.stop_ids == ()
    assert chat(stop_token_ids=[9, 258, 9]).requests[0].sampling.stop_ids == (258, 9)


def test_without_a_seed_each_request_has_its_own():
    raw = json.dumps({"model": "minute", "messages": HI}).encode()
    assert len({chat_ask(raw, SERVED).requests[0].sampling.seed for _ in range(8)}) > 1


def test_completions_take_texts_and_ids_alone_or_in_lists():
    text = TOKENIZER.encode("hi")
    for prompt, tokens in (
        ("hi", [text]), ([1, 2], [[1, 2]]), (["hi", "<|im_end|>"], [text, [258]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ):  # fmt: skip
        asked = complete(prompt=prompt, logprobs=2).requests
        assert [request.tokens for request in asked] == tokens
        assert {request.sampling for request in asked} == {SampleConfig(16, 1.0, 1.0, 1, CONFIG.eos_ids)}
        assert {request.alternatives for request in asked} == {2}


@pytest.mark.parametrize(
    "more, mode, ends",
    [
        ({}, "plain", ["<|im_middle|>"]),
        ({"chat_template_kwargs": {"thinking": True}}, "thinking", ["<think>"]),
        ({"thinking": {"type": "enabled"}}, "thinking", ["<think>"]),
        ({"chat_template_kwargs": {"thinking": False}}, "instant", ["<think>", "</think>"]),
        (OFF | {"chat_template_kwargs": {"thinking": False}}, "instant", ["<think>", "</think>"]),
    ],
)
def test_thinking_is_switched(more, mode, ends):
    ask = chat(**more)
    assert ask.form.mode == mode
    assert ask.requests[0].tokens[-len(ends) :] == [BYTE_SPECIAL[name] for name in ends]


def test_the_thinking_of_earlier_turns_goes_unless_it_is_to_stay():
    messages = [*HI, {"role": "assistant", "content": "b", "reasoning_content": "xyz"}, *HI]
    thinking = {"thinking": True}
    kept = chat(messages=messages, chat_template_kwargs=thinking | {"keep_thinking": True}).requests[0].tokens
    dropped = chat(messages=messages, chat_template_kwargs=thinking).requests[0].tokens
    plain = chat(messages=messages).requests[0].tokens
    assert kept == render(messages, TOKENIZER, None, True, "thinking").tokens
    assert dropped == render(messages, TOKENIZER, None, True, "thinking", keep_thinking=False).tokens
    assert b"xyz" in bytes(t for t in kept if t < 256)
    assert not any(b"xyz" in bytes(t for t in tokens if t < 256) for tokens in (dropped, plain))


def test_tools_are_declared_and_their_calls_and_results_rendered():
    call = {"id": "functions.search:0", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    messages = [*HI, answer, {"role": "tool", "tool_call_id": call["id"], "content": "found"}]
    ask = chat(messages=messages, tools=[SEARCH, READ])
    kept = [*HI, {"role": "assistant", "tool_calls": [call]}, messages[2]]
    assert ask.requests[0].tokens == render(kept, TOKENIZER, None, True, tools=[SEARCH, READ]).tokens
    assert ask.form.reads_calls and ask.names == ["search", "read"] and ask.call_id is None
    without = chat(messages=messages, tools=[SEARCH], tool_choice="none")
    assert not without.form.reads_calls and without.requests[0].tokens == render(kept, TOKENIZER, None, True).tokens


def test_a_tool_that_must_be_called_is_begun_in_the_prompt_and_called_once():
    call = {"id": "functions.read:0", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "x", "content": ""}]
    named = {"type": "function", "function": {"name": "search"}}
    for tools, choice in (([READ, SEARCH], named), ([SEARCH], "required")):
        ask = chat(messages=messages, tools=tools, tool_choice=choice, **OFF)
        assert ask.call_id == "functions.search:1"
        end = "<|tool_calls_section_begin|><|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>"
        whole = "<think></think>" + end
        assert TOKENIZER.decode(ask.requests[0].tokens).endswith(whole)
        assert BYTE_SPECIAL["<|tool_call_end|>"] in ask.requests[0].sampling.stop_ids
    single = chat(tools=[SEARCH], parallel_tool_calls=False).requests[0].sampling.stop_ids
    assert BYTE_SPECIAL["<|tool_call_end|>"] in single


def part(**fields):
    return {"messages": [{"role": "user", "content": [fields]}]}


CHAT_MISTAKES = {
    "no model": ({"model": None}, "model"),
    "another model": ({"model": "gpt"}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages of the wrong type": ({"messages": "hi"}, "messages"),
    "a message of the wrong type": ({"messages": ["hi"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "an unknown role": ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content of the wrong type": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    "an unknown field of a message": ({"messages": [HI[0] | {"mood": "x"}]}, "messages[0].mood"),
    "a result without its call": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
    "a call without a function": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0]",
    ),
    "a part of another kind": (part(type="input_audio", input_audio={}), "messages[0].content[0].type"),
    "a part without its text": (part(type="text"), "messages[0].content[0].text"),
    "an image without address": (part(type="image_url", image_url={}), "messages[0].content[0].image_url.url"),
    "an image from elsewhere": (
        part(type="image_url", image_url={"url": "http://127.0.0.1/a.png"}), "messages[0].content[0].image_url.url",
    ),
    "an image that is none": (
        part(type="image_url", image_url="data:image/png;base64,AAAA"), "messages[0].content[0].image_url",
    ),
    "a video that is none": (
        part(type="video_url", video_url={"url": "data:video/mp4;base64,AAAA"}), "messages[0].content[0].video_url.url",
    ),
    "an unknown field": ({"temprature": 1}, "temprature"),
    "a field that is not supported": ({"frequency_penalty": 1}, "frequency_penalty"),
    "JSON on demand": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a temperature of the wrong type": ({"temperature": "hot"}, "temperature"),
    "a truth value for a number": ({"n": True}, "n"),
    "too hot": ({"temperature": 2.5}, "temperature"),
    "no probability at all": ({"top_p": 0}, "top_p"),
    "more than all": ({"top_p": 1.5}, "top_p"),
    "too many answers": ({"n": 9}, "n"),
    "a fraction of an answer": ({"n": 1.5}, "n"),
    "no token": ({"max_tokens": 0}, "max_tokens"),
    "a huge number": ({"max_tokens": 10**400}, "max_tokens"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "a longer answer than there is room for": ({"max_tokens": 380}, "messages"),
    "a seed of 65 bits": ({"seed": 2**63}, "seed"),
    "an empty stop text": ({"stop": ""}, "stop"),
    "a stop token that is none": ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    "too many stop tokens": ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
    "stop texts that are none": ({"stop": [1]}, "stop"),
    "too many stop texts": ({"stop": list("abcdefghijklmnopq")}, "stop"),
    "a long prompt": ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
    "likeliest tokens without log-probabilities": ({"top_logprobs": 3}, "top_logprobs"),
    "too many likeliest tokens": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "an unknown option": ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    "contradictory thinking": (OFF | {"chat_template_kwargs": {"thinking": True}}, "thinking"),
    "thinking of an unknown kind": ({"thinking": {"type": "deep"}}, "thinking.type"),
    "an unknown argument of the template": ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs.think"),
    "a tool that is none": ({"tools": ["search"]}, "tools[0]"),
    "a tool of another kind": ({"tools": [{"type": "browser"}]}, "tools[0].type"),
    "a tool without a function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "a tool with an odd name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    "a choice without tools": ({"tool_choice": "auto"}, "tool_choice"),
    "an unknown choice": ({"tools": [SEARCH], "tool_choice": "always"} | OFF, "tool_choice"),
    "a tool that is not there": (
        {"tools": [SEARCH], "tool_choice": {"type": "function", "function": {"name": "read"}}} | OFF, "tool_choice",
    ),
    "any of two tools": ({"tools": [SEARCH, READ], "tool_choice": "required"} | OFF, "tool_choice"),
    "a call before any thought": (
        {"tools": [SEARCH], "tool_choice": "required", "thinking": {"type": "enabled"}}, "tool_choice",
    ),
}  # fmt: skip
COMPLETION_MISTAKES = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "too many prompts": ({"prompt": ["a"] * 9}, "prompt"),
    "a prompt of the wrong type": ({"prompt": ["a", 3]}, "prompt[1]"),
    "an empty one of several": ({"prompt": [[1], []]}, "prompt[1]"),
    "a negative id": ({"prompt": [1, -2]}, "prompt"),
    "a place for an image": ({"prompt": [1, 264]}, "prompt"),
    "too many answers to several prompts": ({"prompt": ["a"] * 4, "n": 3}, "n"),
    "an echo": ({"echo": True}, "echo"),
    "the best of several": ({"best_of": 3}, "best_of"),
    "text behind": ({"suffix": "x"}, "suffix"),
    "too many log-probabilities": ({"logprobs": 6}, "logprobs"),
    "a truth value for log-probabilities": ({"logprobs": True}, "logprobs"),
    "messages for a completion": ({"messages": HI}, "messages"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", [*CHAT_MISTAKES, *COMPLETION_MISTAKES])
def test_a_mistake_names_its_field(mistake):
    ask, table = (chat, CHAT_MISTAKES) if mistake in CHAT_MISTAKES else (complete, COMPLETION_MISTAKES)
    more, param = table[mistake]
    with pytest.raises(ApiError) as found:
        ask(**more)
    error = found.value.body()["error"]
    assert error["param"] == param and error["type"] == (
        "not_found_error" if found.value.status == 404 else "invalid_request_error"
    )
    assert found.value.status == (404 if more.get("model") == "gpt" else 400)
    assert error["message"].startswith(param) or param in ("model", "messages", "prompt", "tools[0].type")


def test_messages_about_large_things_are_short():
    for more in ({"x" * 10**6: 1}, {"temperature": "y" * 10**6}, {"model": "z" * 10**6}, {"n": 10**4000}):
        with pytest.raises(ApiError) as found:
            chat(**more)
        assert len(json.dumps(found.value.body())) < 600


def test_an_unknown_field_comes_with_the_nearest_one():
    with pytest.raises(ApiError, match="'temperature'"):
        chat(temprature=1)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"n": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_not_json_is_said_to_be_none(raw):
    for ask in (chat_ask, completion_ask):
        with pytest.raises(ApiError, match="the body") as found:
            ask(raw, SERVED)
        assert found.value.body()["error"]["code"] == "invalid_json" and found.value.status == 400
