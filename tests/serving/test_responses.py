"""Tokens to what an answer says, whole and piece by piece, for given sequences of tokens."""

import json

import numpy as np
import pytest

from benchmarks.serving import minute_model
from k25_jax.sampling.requests import FinishEvent, Request, TokenEvent
from k25_jax.serving.errors import ApiError
from k25_jax.serving.requests import Ask
from k25_jax.serving.responses import Answer
from k25_jax.text.stops import StopTexts
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.text.tool_calls import Call, parse
from k25_jax.text.turn import TurnForm

SERVED, TOKENIZER = minute_model(), load_tokenizer()
BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def call(name, arguments, index=0):
    return f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def asked(
    chat=True,
    mode="plain",
    reads_calls=True,
    call_id=None,
    n=1,
    stop=(),
    top=None,
    ids=False,
    usage=False,
    prompts=1,
    names=(),
):
    requests = [Request([1, 2, 3], n=n, stop=stop) for _ in range(prompts)]
    form = TurnForm(mode, reads_calls, call_id is not None) if chat else None
    return Ask(chat, requests, False, usage, top, ids, form, names, call_id=call_id)


def events(said, reason="stop", by=None, sample=0, version=0):
    tokens = TOKENIZER.encode(said, allow_special=True) if isinstance(said, str) else said
    return [TokenEvent(0, sample, token, -0.5, version) for token in tokens] + [FinishEvent(0, sample, reason, by)]


def whole(ask, given):
    answer = Answer(ask, SERVED)
    for event in given:
        answer.add(0, event)
    assert answer.finished
    return answer.body()


def streamed(ask, given, rng=None):
    """The chunks, put together as clients do it, with chunks asked for after every event or now and then."""
    answer, choices = Answer(ask, SERVED), {}
    for event in [*given, None]:
        if event is not None:
            answer.add(0, event)
        if event is not None and rng is not None and rng.random() < 0.5:
            continue
        for chunk in json.loads(json.dumps(answer.chunks())):
            for piece in chunk["choices"]:
                choice = choices.setdefault(piece["index"], {"message": {}, "token_ids": [], "tool_calls": {}})
                delta = piece["delta"]
                for name in ("reasoning_content", "content"):
                    choice["message"][name] = choice["message"].get(name, "") + delta.get(name, "")
                for part in delta.get("tool_calls", []):
                    old = choice["tool_calls"].setdefault(part["index"], part | {"function": {"arguments": ""}})
                    old["function"]["name"] = part["function"].get("name", old["function"].get("name"))
                    old["function"]["arguments"] += part["function"]["arguments"]
                choice["token_ids"] += piece.get("token_ids", [])
                choice["finish_reason"] = piece["finish_reason"]
    return choices


def message(said, reason="stop", **how):
    body = whole(asked(**how), events(said, reason))
    return body["choices"][0]["message"], body["choices"][0]["finish_reason"]


SAID = {
    "content": ("plain", "hello<|im_end|>"),
    "thinking": ("thinking", "hm, é</think>hello<|im_end|>"),
    "thinking that was opened again": ("thinking", "<think>hm</think>hello<|im_end|>"),
    "thinking by its own will": ("plain", "<think>hm</think>hello<|im_end|>"),
    "thinking cut off": ("thinking", "hm"),
    "instant": ("instant", "hello<|im_end|>"),
    "one call": ("plain", f"so{BEGIN}{call('a', '{}')}{END}<|im_end|>"),
    "calls and thoughts": (
        "thinking", f"hm</think>so{BEGIN}{call('a', '{}')}{call('b.c', json.dumps({'x': 'é'}), 1)}{END}<|im_end|>",
    ),
    "a call out of a thought": ("thinking", f"hm{BEGIN}{call('a-b', '{}', 7)}{END}<|im_end|>"),
    "lines between": ("plain", f"{BEGIN}\n{call('a', '{}')}\n{call('b', '{}', 1)}\n{END}<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_an_answer_says_what_the_reader_of_whole_turns_finds(name):
    mode, said = SAID[name]
    turn = parse(said, TOKENIZER, mode)
    spoken, reason = message(said, mode=mode)
    assert spoken.get("reasoning_content", "") == turn.reasoning and (spoken["content"] or "") == turn.content
    found = spoken.get("tool_calls", [])
    assert all(isinstance(one, Call) for one in turn.calls) and len(found) == len(turn.calls)
    for one, due in zip(found, turn.calls, strict=True):
        assert one["id"] == due.id and one["type"] == "function" and one["function"]["name"] == due.name
        assert json.loads(one["function"]["arguments"]) == due.arguments
    assert reason == ("tool_calls" if turn.calls else "stop")


@pytest.mark.parametrize("name", SAID)
def test_the_pieces_of_a_stream_are_the_whole(name):
    mode, said = SAID[name]
    for seed in (None, 0, 1):
        ask, given = asked(mode=mode, ids=True), events(said)
        (choice,) = streamed(ask, given, None if seed is None else np.random.default_rng(seed)).values()
        body = whole(ask, given)["choices"][0]
        assert choice["message"].get("content", "") == (body["message"]["content"] or "")
        assert choice["message"].get("reasoning_content", "") == body["message"].get("reasoning_content", "")
        calls = [choice["tool_calls"][index] for index in sorted(choice["tool_calls"])]
        assert [{k: c[k] for k in ("id", "type", "function")} for c in calls] == body["message"].get("tool_calls", [])
        assert choice["token_ids"] == body["token_ids"] and choice["finish_reason"] == body["finish_reason"]


@pytest.mark.parametrize(
    "said, content, calls",
    [
        (f"a{BEGIN}stray{call('b', '{}')}{END}c", "astrayc", 1),
        (f"{BEGIN}<|tool_call_begin|>search<|tool_call_argument_begin|>{{}}<|tool_call_end|>{END}", "search{}", 0),
        (f"{BEGIN}<|tool_call_begin|>functions.a:0<|tool_call_end|>{END}", "functions.a:0", 0),
        (f"{BEGIN}<|tool_call_begin|>functions.a", "functions.a", 0),
        (f"{BEGIN}{BEGIN}{END}{END}", "", 0),
        ("<|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>{}<|tool_call_end|>", "functions.a:0{}", 0),
    ],
)
def test_what_is_no_call_stays_content(said, content, calls):
    spoken, reason = message(said)
    assert (spoken["content"] or "") == content and len(spoken.get("tool_calls", [])) == calls
    assert reason == ("tool_calls" if calls else "stop")


def test_arguments_are_handed_on_as_they_were_written():
    for arguments in ('{"a":  1}', "{", ' \n{"b": 2} ', '{"a": NaN}'):
        spoken, _ = message(f"{BEGIN}{call('f', arguments)}{END}")
        assert spoken["tool_calls"][0]["function"]["arguments"] == arguments and spoken["content"] is None


def test_a_call_that_is_cut_off_is_no_reason_to_call():
    spoken, reason = message(
        f"{BEGIN}{call('f', '{}')}<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>[1", "length"
    )
    assert [one["function"]["arguments"] for one in spoken["tool_calls"]] == ["{}", "[1"] and reason == "length"


def test_without_tools_there_are_no_calls():
    spoken, reason = message(f"a{BEGIN}{call('f', '{}')}{END}", reads_calls=False)
    assert spoken == {"role": "assistant", "content": "afunctions.f:0{}"} and reason == "stop"


def test_a_call_that_the_prompt_began_goes_on():
    ask = asked(call_id="functions.f:2")
    body = whole(ask, events('{"x": 1}<|tool_call_end|>'))["choices"][0]
    expected = {"id": "functions.f:2", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert body["message"]["tool_calls"] == [expected] and body["finish_reason"] == "tool_calls"
    (choice,) = streamed(ask, events('{"x": 1}<|tool_call_end|>')).values()
    assert (
        choice["tool_calls"][0]["function"] == expected["function"] and choice["tool_calls"][0]["id"] == expected["id"]
    )


# ---------------------------------------------------------------------------------------------------------- stop texts
def test_stop_texts_cut_as_a_search_in_the_whole_text_would():
    """Against brute force: random texts over few letters, random stop texts, tokens of one byte each and special ones."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        letters = list("abé") + ["</think>"]
        said = "".join(rng.choice(letters, rng.integers(0, 12)))
        stops = ["".join(rng.choice(list("abé"), rng.integers(1, 4))) for _ in range(rng.integers(0, 3))]
        tokens, text = TOKENIZER.encode(said, allow_special=True), said.replace("</think>", "")
        reader, out, seen = StopTexts(TOKENIZER, stops), "", []
        for count, token in enumerate(tokens, 1):
            out += "".join(piece for _, piece in reader.push(token))
            seen.append((count, out))
            if reader.found:
                break
        out += "".join(piece for _, piece in reader.flush())
        places = [text.find(stop) for stop in stops if stop in text]
        first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
        if first is None:
            assert out == text and not reader.found
        else:  # the engine ends at the first token with which some stop text is whole
            whole_by_then = text[:first]
            assert (
                reader.found and out == whole_by_then[: min(whole_by_then.find(s) for s in stops if s in whole_by_then)]
            )
            assert min(places) <= len(out)
        assert all(text.startswith(shown) for _, shown in seen)  # nothing is shown that is taken back


def test_a_stop_text_ends_the_text_but_its_tokens_count():
    body = whole(asked(stop=("lo w",), ids=True, top=0), events("hello wo", by="lo w"))
    choice = body["choices"][0]
    assert choice["message"]["content"] == "hel" and choice["finish_reason"] == "stop"
    assert TOKENIZER.decode(choice["token_ids"]) == "hello wo" and body["usage"]["completion_tokens"] == 8
    assert len(choice["logprobs"]["content"]) == 8


def test_a_stop_text_within_a_call_is_no_call():
    spoken = whole(asked(stop=("!",)), events(f"{BEGIN}{call('f', '{}')}!", by="!"))["choices"][0]
    assert spoken["finish_reason"] == "stop"


# ------------------------------------------------------------------------------------------------- numbers and failures
def test_log_probabilities_in_both_forms():
    token = TokenEvent(0, 0, 0xC3, -1.5, 0, ((104, -0.25), (0xC3, -1.5)))
    given = [TokenEvent(0, 0, 104, -0.25, 0, ((104, -0.25), (105, -2.0))), token, FinishEvent(0, 0, "length")]
    first, second = whole(asked(top=2), given)["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("h", -0.25, [104])
    assert [(one["token"], one["logprob"]) for one in first["top_logprobs"]] == [("h", -0.25), ("i", -2.0)]
    assert second["bytes"] == [0xC3] and second["token"] == "\ufffd"
    old = whole(asked(chat=False, top=2), given)["choices"][0]["logprobs"]
    assert old["tokens"] == ["h", "bytes:\\xc3"] and old["token_logprobs"] == [-0.25, -1.5]
    assert old["top_logprobs"] == [{"h": -0.25, "i": -2.0}, {"h": -0.25, "bytes:\\xc3": -1.5}]
    assert old["text_offset"] == [0, 1]
    assert whole(asked(), given)["choices"][0]["logprobs"] is None


def test_usage_and_versions():
    given = [*events("hm", version=3)[:-1], *events("</think>yes<|im_end|>", version=4)]
    body = whole(asked(mode="thinking"), given)
    assert body["choices"][0]["policy_versions"] == [[3, 2], [4, 5]]
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 3},
    }  # fmt: skip


def test_choices_of_several_prompts_and_samples():
    answer = Answer(asked(chat=False, n=2, prompts=2), SERVED)
    for number in (1, 0):
        for sample in (1, 0):
            for event in events(f"{number}{sample}", sample=sample):
                answer.add(number, event)
    body = answer.body()
    assert [(one["index"], one["text"]) for one in body["choices"]] == [(0, "00"), (1, "01"), (2, "10"), (3, "11")]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}


def test_the_last_chunk_has_the_usage_if_it_was_asked_for():
    for usage in (False, True):
        answer, chunks = Answer(asked(usage=usage), SERVED), []
        for event in events("ab"):
            answer.add(0, event)
            chunks += answer.chunks()
        assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * len(chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert ("usage" in chunks[0]) == usage
        last = chunks[-1]
        assert (last["choices"] == []) == usage and bool(last.get("usage")) == usage
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_what_fails_is_an_error():
    for reason, words in (("error", "no finite"), ("abort", "ended before")):
        answer = Answer(asked(), SERVED)
        with pytest.raises(ApiError, match=words) as found:
            answer.add(0, FinishEvent(0, 0, reason, error="no finite value" * (reason == "error")))
        assert found.value.status == 500
