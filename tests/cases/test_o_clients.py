"""What clients of the field send: taken, passed over where it cannot change an answer, or refused by name."""

import base64
import io
import json

import pytest
from PIL import Image

from benchmarks.serving import minute_model
from k25_jax.sampling.sample import SEEDS, fold_seed
from k25_jax.serving.errors import ApiError
from k25_jax.serving.requests import CHAT_NEUTRAL, IGNORED, NEUTRAL, chat_ask, completion_ask
from k25_jax.serving.thinking import EFFORTS
from k25_jax.text.chat import render
from k25_jax.text.tokenizer import load_tokenizer

SERVED, TOKENIZER = minute_model(), load_tokenizer()
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CACHE = {"cache_control": {"type": "ephemeral", "ttl": "5m"}}


def chat(**more):
    return chat_ask(json.dumps({"model": "minute", "messages": HI, "seed": 1, "max_tokens": 8} | more).encode(), SERVED)


def complete(**more):
    return completion_ask(json.dumps({"model": "minute", "prompt": "hi", "seed": 1} | more).encode(), SERVED)


def prompt(**more):
    return chat(**more).requests[0].tokens


def refused(ask=chat, **more) -> dict:
    with pytest.raises(ApiError) as found:
        ask(**more)
    return found.value.body()["error"]


# --------------------------------------------------------------------------------------------------------- data URLs
PNG = io.BytesIO()
Image.new("RGB", (28, 28), (9, 8, 250)).save(PNG, "PNG")
CODED = base64.b64encode(PNG.getvalue()).decode()
URLS = {
    "space behind the comma": f"data:image/png;base64, {CODED}",
    "lines": f"data:image/png;base64,{base64.encodebytes(PNG.getvalue()).decode()}",
    "no padding": f"data:image/png;base64,{CODED.rstrip('=')}",
    "url-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(PNG.getvalue()).decode()}",
    "capitals": f"DATA:IMAGE/PNG;charset=x;BASE64,{CODED}",
    "percent-encoded base64": "data:image/png;base64," + CODED.replace("=", "%3D").replace("+", "%2B"),
    "percent-encoded bytes": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG.getvalue()),
    "no type": f"data:;base64,{CODED}",
}


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize("plain", [True, False])
def test_data_urls_as_browsers_read_them(name, plain):
    due = {"url": f"data:image/png;base64,{CODED}"}
    given = URLS[name] if plain else {"url": URLS[name], "detail": "low", "format": "image/png"}
    asked = [
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": u}]}]) for u in (due, given)
    ]
    first, second = (ask.requests[0] for ask in asked)
    assert first.tokens == second.tokens and (first.clips[0].patches == second.clips[0].patches).all()


@pytest.mark.parametrize("url", ["data:image/png;base64,@@", "data:image/png;base64", "data:image/png;base64,A"])
def test_what_is_no_data_url_says_what_is(url):
    error = refused(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert error["param"] == "messages[0].content[0].image_url.url" and "data:image/png;base64,.." in error["message"]


# ------------------------------------------------------------------------------------------------------------- seeds
@pytest.mark.parametrize("ask", [chat, complete])
def test_seeds_of_64_bits(ask):
    seeds = [0, 1, -1, -2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, -(2**32), -(2**31), *SEEDS, SEEDS[1] - 1]
    drawn = [ask(seed=seed).requests[0].sampling.seed for seed in seeds]
    assert drawn == [ask(seed=seed).requests[0].sampling.seed for seed in seeds]
    assert len(set(drawn)) == len(seeds) and all(0 <= seed < 2**32 for seed in drawn)
    assert drawn[:2] == [0, 1] and drawn[5] == 2**32 - 1  # those that were taken before draw as before
    for seed in (2**63, -(2**63) - 1, 1e300):
        assert refused(ask, seed=seed)["param"] == "seed"


def test_folded_seeds_spread():
    for start in (-5000, 2**32, SEEDS[1] - 5000):
        assert len({fold_seed(seed) for seed in range(start, start + 5000)}) == 5000


# ---------------------------------------------------------------------------------------------------------- messages
CALL = {"id": "functions.find:0", "type": "function", "function": {"name": "find", "arguments": "{}"}}
KEEP = {"chat_template_kwargs": {"thinking": True, "keep_thinking": True}}


@pytest.mark.parametrize(
    "message, due",
    [
        ({"content": None, "reasoning_content": "hm"}, {"content": "", "reasoning_content": "hm"}),
        ({"reasoning_content": "hm"}, {"content": "", "reasoning_content": "hm"}),
        ({"content": "a", "reasoning": "hm"}, {"content": "a", "reasoning_content": "hm"}),
        ({"content": None, "reasoning": "hm", "reasoning_content": None}, {"content": "", "reasoning_content": "hm"}),
        ({"content": "a", "reasoning": "hm", "reasoning_content": "hm"}, {"content": "a", "reasoning_content": "hm"}),
        (
            {"content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "h"}, {"summary": "m"}]},
            {"content": "a", "reasoning_content": "hm"},
        ),
        (
            {"content": "a", "reasoning": "hm", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
            {"content": "a", "reasoning_content": "hm"},
        ),
        ({"content": None, "tool_calls": [CALL], "refusal": None}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [CALL], "reasoning": "hm"}, {"content": "", "tool_calls": [CALL], "reasoning_content": "hm"}),
        ({"content": [], "reasoning": "hm"}, {"content": "", "reasoning_content": "hm"}),
        ({"content": [], "tool_calls": []}, {"content": ""}),
        ({"content": "a", "reasoning": ""}, {"content": "a"}),
    ],
)
def test_what_an_assistant_said_and_thought(message, due):
    messages = [*HI, {"role": "assistant"} | message, *HI]
    rendered = [*HI, {"role": "assistant"} | due, *HI]
    assert prompt(messages=messages, **KEEP) == render(rendered, TOKENIZER, None, True, "thinking").tokens
    without = {name: value for name, value in due.items() if name != "reasoning_content"}
    assert (
        prompt(messages=messages) == render([*HI, {"role": "assistant"} | without, *HI], TOKENIZER, None, True).tokens
    )


@pytest.mark.parametrize(
    "message, param",
    [
        ({"role": "assistant"}, "content"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}, "reasoning"),
        ({"role": "assistant", "content": "a", "reasoning": ["b"]}, "reasoning"),
        (
            {"role": "assistant", "content": "a", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
            "reasoning_details[0]",
        ),
        ({"role": "user", "content": "a", "reasoning": "b"}, "reasoning_content"),
    ],
)
def test_what_is_missing_or_said_in_two_ways(message, param):
    assert refused(messages=[message, *HI])["param"] == f"messages[0].{param}"


# ------------------------------------------------------------------------------------------------- fields of the body
@pytest.mark.parametrize("name", IGNORED)
def test_fields_that_change_nothing(name):
    for value in ("x", True, {"a": 1}, 3):
        assert prompt(**{name: value}) == prompt()
        assert complete(**{name: value}).requests[0].sampling == complete().requests[0].sampling


def test_marks_for_a_cache_change_nothing_anywhere():
    text, tool = {"type": "text", "text": "hi"}, TOOL["function"]
    image = {"type": "image_url", "image_url": {"url": URLS["lines"]}}
    plain = [{"role": "system", "content": [text]}, {"role": "user", "content": [text, image]}]
    marked = [{**m, "content": [part | CACHE for part in m["content"]]} | CACHE for m in plain]
    tools = [TOOL | CACHE | {"function": tool | CACHE}]
    assert prompt(messages=marked, tools=tools, **CACHE) == prompt(messages=plain, tools=[TOOL])


def test_tools_without_a_form_in_typescript_are_declared_without_marks(caplog):
    odd = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"const": 1}}}}}
    tools = [odd | CACHE | {"function": odd["function"] | CACHE}]
    assert prompt(tools=tools) == prompt(tools=[odd]) and "cache_control" not in TOKENIZER.decode(prompt(tools=tools))


@pytest.mark.parametrize("name", [*NEUTRAL, *CHAT_NEUTRAL])
def test_fields_that_would_change_the_answer_are_refused_by_name(name):
    allowed = (NEUTRAL | CHAT_NEUTRAL)[name]
    for value in allowed if isinstance(allowed, tuple) else (allowed,):
        assert prompt(**{name: value}) == prompt()
    error = refused(**{name: "odd"})
    assert error["param"] == name and f"{name} is not supported; leave it out" in error["message"]


def test_json_on_demand_stays_refused():
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}):
        error = refused(response_format=form)
        assert error["param"] == "response_format" and 'send {"type": "text"}' in error["message"]


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_tools_are_taken_with_a_note(strict):
    ask = chat(tools=[{"type": "function", "function": TOOL["function"] | {"strict": strict}}])
    assert ask.requests[0].tokens == prompt(tools=[TOOL])
    assert bool(ask.notes) is bool(strict) and all("not constrained" in note for note in ask.notes)


# ---------------------------------------------------------------------------------------------------------- thinking
ON, OFF = "thinking", "instant"


@pytest.mark.parametrize(
    "more, mode",
    [
        *(({"reasoning_effort": effort}, ON if on else OFF) for effort, on in EFFORTS.items()),
        *(({"reasoning": {"effort": effort}}, ON if on else OFF) for effort, on in EFFORTS.items()),
        ({"reasoning": {"enabled": True}}, ON),
        ({"reasoning": {"enabled": False, "exclude": False}}, OFF),
        ({"reasoning": {}}, "plain"),
        ({"reasoning": None, "reasoning_effort": None, "thinking": None}, "plain"),
        ({"thinking": {"type": "enabled", "keep": "all"}}, ON),
        ({"thinking": {"type": "disabled", "keep": None}}, OFF),
        ({"thinking": True}, ON),
        ({"thinking": False, "reasoning_effort": "none"}, OFF),
        ({"enable_thinking": True, "reasoning_effort": "high"}, ON),
        ({"chat_template_kwargs": {"enable_thinking": False}}, OFF),
    ],
)
def test_thinking_is_switched_by_all_its_names(more, mode):
    assert chat(**more).form.mode == mode


def test_thinking_is_kept():
    messages = [*HI, {"role": "assistant", "content": "b", "reasoning": "xyz"}, *HI]
    kept = prompt(messages=messages, **KEEP)
    for keep in ("all", True):
        assert prompt(messages=messages, thinking={"type": "enabled", "keep": keep}) == kept
    for keep in ("none", False, None):
        dropped = prompt(messages=messages, thinking={"type": "enabled", "keep": keep})
        assert dropped == prompt(messages=messages, thinking=True) != kept


@pytest.mark.parametrize(
    "more, param",
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
        ({"reasoning": {"exclude": True}}, "reasoning.exclude"),
        ({"reasoning": {"mood": 1}}, "reasoning.mood"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "keep": "some"}}, "thinking.keep"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "thinking"),
        ({"reasoning_effort": "none", "reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"thinking": {"keep": "all"}, "chat_template_kwargs": {"keep_thinking": False}}, "thinking.keep"),
    ],
)
def test_thinking_that_cannot_be_had_is_refused(more, param):
    error = refused(**more)
    assert error["param"] == param and error["message"].startswith(param)
