"""Stop texts count in what an answer says; the name of a special token in one is that token, wherever it comes."""

import json
import types

import numpy as np
import pytest

from benchmarks.serving import minute_model
from k25_jax.cli import build_parser
from k25_jax.sampling.console import Console
from k25_jax.sampling.prompt import Prompt
from k25_jax.sampling.requests import FinishEvent, Request, TokenEvent
from k25_jax.sampling.sequences import Sequence
from k25_jax.serving.requests import chat_ask, completion_ask
from k25_jax.serving.responses import Answer
from k25_jax.text.stops import StopTexts
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.text.turn import TurnForm
from saying import drawn

SERVED, TOKENIZER = minute_model(), load_tokenizer()
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
TOOL = {"type": "function", "function": {"name": "find"}}
CALL = f"{SECTION}<|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>{{}}<|tool_call_end|>{SECTION_END}"
THINKING = {"thinking": {"type": "enabled"}}


def chat(**more):
    body = {"model": "minute", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "seed": 1}
    return chat_ask(json.dumps(body | more).encode(), SERVED)


def complete(**more):
    body = {"model": "minute", "prompt": "hi", "max_tokens": 200, "seed": 1}
    return completion_ask(json.dumps(body | more).encode(), SERVED)


def whole(ask, *said):
    answer = Answer(ask, SERVED)
    for sample, text in enumerate(said):
        for event in drawn(ask.requests[0], text, sample):
            answer.add(0, event)
    assert answer.finished
    return answer.body()


def streamed(ask, said, rng):
    """(thinking, content, reason) of a stream whose chunks are asked for now and then."""
    answer, out = Answer(ask, SERVED), {"reasoning_content": "", "content": "", "text": "", "reason": None}
    for event in [*drawn(ask.requests[0], said), None]:
        if event is not None:
            answer.add(0, event)
            if rng.random() < 0.5:
                continue
        for chunk in answer.chunks():
            for choice in chunk["choices"]:
                for name, text in choice.get("delta", {"text": choice.get("text", "")}).items():
                    out[name] = out.get(name, "") + text if isinstance(text, str) else text
                out["reason"] = choice["finish_reason"] or out["reason"]
    return out


def outcome(body):
    choice = body["choices"][0]
    message = choice["message"]
    return message.get("reasoning_content", ""), message["content"], choice["finish_reason"]


@pytest.mark.parametrize(
    "more, said, due",
    [
        (THINKING, "so STOP and</think>one STOP two", ("so STOP and", "one ", "stop")),
        (THINKING, "so STOP and</think>one<|im_end|>", ("so STOP and", "one", "stop")),
        (THINKING, "so STO</think>P one<|im_end|>", ("so STO", "P one", "stop")),
        (THINKING, "only STOP thoughts<|im_end|>", ("only STOP thoughts", "", "stop")),
        (THINKING, "<think>ST</think>OP STO", ("ST", "OP STO", "length")),
        ({}, "<think>STOP</think>a STOP", ("STOP", "a ", "stop")),
        ({}, "aSTOPb", ("", "a", "stop")),
        ({}, "aST</think>OPb", ("", "a", "stop")),  # no thinking: the mark is no text
        ({"thinking": {"type": "disabled"}}, "aSTOP", ("", "a", "stop")),
    ],
)
def test_thinking_is_not_searched(more, said, due):
    ask = chat(stop=["STOP"], **more)
    assert outcome(whole(ask, said)) == due
    for seed in range(4):
        got = streamed(ask, said, np.random.default_rng(seed))
        assert (got["reasoning_content"], got["content"], got["reason"]) == due


def test_usage_counts_what_was_drawn_and_thought():
    body = whole(chat(stop=["STOP"], logprobs=True, return_token_ids=True, **THINKING), "a STOP</think>b STOP c")
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len("a STOP") + 1
    assert body["usage"]["completion_tokens"] == len("a STOP") + 1 + len("b STOP")
    choice = body["choices"][0]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == body["usage"]["completion_tokens"]


def test_each_of_several_answers_has_its_own_place():
    body = whole(chat(stop=["x"], n=3, **THINKING), "x</think>axb", "xx</think>", "</think>bcx")
    found = [(c["message"].get("reasoning_content", ""), c["message"]["content"]) for c in body["choices"]]
    assert found == [("x", "a"), ("xx", ""), ("", "bc")]


@pytest.mark.parametrize("stop", ["find", "functions", "{}", ":0", "tool_call"])
def test_calls_are_not_searched(stop):
    ask = chat(stop=stop, tools=[TOOL])
    body = whole(ask, f"so{CALL}<|im_end|>")
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find" and body["choices"][0]["finish_reason"] == "tool_calls"
    assert outcome(whole(ask, f"a {stop} b"))[1:] == ("a ", "stop")
    assert outcome(whole(ask, f"{CALL}a {stop} b"))[1:] == ("a ", "stop")  # content again


def test_without_tools_a_section_is_content():
    assert outcome(whole(chat(stop="find"), CALL)) == ("", "functions.", "stop")


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("name", ["<|im_end|>", "[EOS]", "<|im_user|>", "[EOT]", "<|media_end|>"])
def test_the_name_of_a_special_token_is_that_token(ask, name):
    """Also where it is not an end token, and where end tokens are to be passed over."""
    asked = ask(stop=[name], ignore_eos=True)
    assert BYTE_SPECIAL[name] in asked.requests[0].sampling.stop_ids
    body = whole(asked, f"hello{name}more")
    choice = body["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert (text, choice["finish_reason"]) == ("hello", "stop") and body["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    "stop, said, text",
    [
        ("\n<|im_end|>", "a\nb\n<|im_end|>c", "a\nb"),
        ("<|im_end|>\n", "a<|im_end|>b<|im_end|>\nc", "ab"),
        ("<|im_end|>\n<|im_user|>user", "a<|im_end|>\n<|im_user|>user<|im_middle|>", "a"),
        ("<|im_end|><|im_user|>", "a<|im_end|>b<|im_end|><|im_user|>", "ab"),
        ("b<|im_end|>", "a<|im_end|>bb<|im_end|>", "ab"),
        ("</think>", "a</think>b", "a"),
    ],
)
def test_a_special_token_within_a_stop_text(stop, said, text):
    body = whole(complete(stop=["never", stop], ignore_eos=True), said)
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (text, "stop")
    for seed in range(4):
        got = streamed(complete(stop=stop, ignore_eos=True), said, np.random.default_rng(seed))
        assert (got["text"], got["reason"]) == (text, "stop")


def test_a_name_that_the_model_spells_is_found_as_text():
    said = TOKENIZER.encode("a<|im_end|>b")  # ordinary tokens
    request = complete(stop=["<|im_end|>"]).requests[0]
    sequence = Sequence(0, 0, 0, request, [], StopTexts(TOKENIZER, request.stop, request.form), list(request.tokens))
    reasons = [sequence.accept(token, -1.0) for token in said[:11]]
    assert reasons[-1] == ("stop", "<|im_end|>") and not any(reason for reason, _ in reasons[:-1])


def test_parts_of_the_names_of_special_tokens_match_no_token():
    body = whole(complete(stop=["|>", "im_end", "think", ">"], ignore_eos=True), "a<|im_end|></think>b<|im_user|>c>")
    assert body["choices"][0]["text"] == "abc"


def test_a_special_token_counts_in_thinking_too():
    """It cannot come up in prose, so whoever names it means its place."""
    assert outcome(whole(chat(stop=["</think>"], **THINKING), "hm</think>said")) == ("hm", "", "stop")
    assert outcome(whole(chat(stop=["m</think>"], **THINKING), "hmm</think>said")) == ("hm", "", "stop")
    body = whole(chat(stop=["m</think>"], **THINKING), "hmm</think>said")
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


def test_a_stop_token_behind_a_call_leaves_the_call():
    body = whole(chat(stop=["<|tool_call_end|>"], tools=[TOOL]), CALL)
    assert body["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "find", "arguments": "{}"}


def brute(said, stops, thinking):
    """Where the answer ends, by a search in whole texts: (thinking, content so far)."""
    thought, mark, content = said.partition("</think>") if thinking else ("", "x", said)
    if not mark:
        return thought, ""
    for count in range(len(content) + 1):
        places = [content[:count].find(stop) for stop in stops if stop in content[:count]]
        if places:
            return thought, content[: min(places)]
    return thought, content


def test_against_a_search_in_whole_texts():
    rng = np.random.default_rng(3)
    for _ in range(600):
        letters, thinking = "abcé", bool(rng.integers(2))
        said = "".join(rng.choice(list(letters), rng.integers(0, 10)))
        place = rng.integers(0, len(said) + 1)
        said = said[:place] + "</think>" * thinking + said[place:]
        stops = ["".join(rng.choice(list(letters), rng.integers(1, 4))) for _ in range(rng.integers(1, 4))]
        reader, units = StopTexts(TOKENIZER, stops, TurnForm("thinking" if thinking else "instant")), []
        for token in TOKENIZER.encode(said, allow_special=True):
            units += reader.push(token)
            if reader.found:
                break
        units += reader.flush()
        assert "".join(text for _, text in units) == "".join(brute(said, stops, thinking))


def test_half_a_character_does_not_go_on_behind_a_mark():
    ask = chat(**THINKING)
    answer = Answer(ask, SERVED)
    for token in (0xC3, BYTE_SPECIAL["</think>"], 0xA9, ord("b")):
        answer.add(0, TokenEvent(0, 0, token, -1.0, 0))
    answer.add(0, FinishEvent(0, 0, "length"))
    assert outcome(answer.body()) == ("\ufffd", "\ufffdb", "length")


def test_a_request_without_a_form_is_a_text_from_end_to_end():
    assert Request([1], stop=("a",)).form is None and complete(stop="a").requests[0].form is None
    assert chat(stop="a", tools=[TOOL]).requests[0].form == TurnForm("plain", True)


@pytest.mark.parametrize(
    "form, said, text",
    [
        (TurnForm("thinking"), "a STOP</think>b STOP c", "a STOP</think>b "),
        (TurnForm("plain"), "<think>STOP</think>b STOP c", "<think>STOP</think>b "),
        (TurnForm("thinking"), "a\n</think>b<|im_user|>c", "a\n</think>b"),
        (None, "a STOP</think>b", "a "),
        (None, "a<|im_user|>b", "a"),
    ],
)
def test_the_command_line_has_the_same_rule(form, said, text, monkeypatch):
    console, shown = Console.__new__(Console), []
    console.args = build_parser().parse_args(["generate", "--checkpoint=x", "--stop=STOP", "--stop=<|im_user|>"])
    console.model = types.SimpleNamespace(tokenizer=TOKENIZER)
    tokens = TOKENIZER.encode(said, allow_special=True)
    events = [TokenEvent(0, 0, token, -1.0, 0) for token in tokens]
    monkeypatch.setattr(Console, "events", lambda self, request: iter(events))
    answer = console.answer(Prompt([1], []), (BYTE_SPECIAL["<|im_end|>"],), shown.append, form)
    assert answer["text"] == "".join(shown) == text and answer["tokens"] == tokens[: len(answer["tokens"])]
    assert len(answer["tokens"]) < len(tokens)
