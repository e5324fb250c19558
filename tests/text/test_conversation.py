"""Turns that are appended against whole lists of messages, and both against a Jinja template of the public form."""

import jinja2
import numpy as np
import pytest

from k25_jax.text.chat import ChatError, render
from k25_jax.text.conversation import Conversation
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.text.tool_calls import BadCall, Call

TOKENIZER = load_tokenizer()
END = BYTE_SPECIAL["<|im_end|>"]

# The public template's form, in our own words: strings put together, knowing nothing of tokens.
TEMPLATE = """
{%- macro body(m) -%}
{%- if m.content is string -%}{{ m.content }}
{%- else -%}{%- for part in m.content or [] -%}
{{- part.text if part.type == 'text' else '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>' -}}
{%- endfor -%}{%- endif -%}
{%- if m.tool_calls -%}<|tool_calls_section_begin|>
{%- for c in m.tool_calls -%}
<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>{%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools }}<|im_end|>{%- endif -%}
{%- set last = namespace(answer=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set last.answer = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set kind = m.role if m.role in ('user', 'assistant') else 'system' -%}
<|im_{{ kind }}|>{{ m.name or m.role }}<|im_middle|>
{%- if m.role == 'assistant' -%}
{%- set kept = thinking and (keep or loop.index0 > last.answer) -%}
<think>{{ m.reasoning_content if kept }}</think>
{%- elif m.role == 'tool' -%}
{{- '## Return of ' + m.tool_call_id + '\n' -}}
{%- endif -%}
{{- body(m) -}}<|im_end|>
{%- endfor -%}
{%- if prompt -%}<|im_assistant|>assistant<|im_middle|><think>{{ '' if thinking else '</think>' }}{%- endif -%}
"""

TOOL = {"type": "function", "function": {"name": "ipython", "parameters": {"type": "object"}}}
DECLARED = "# Tools\n\n## functions\nnamespace functions {\ntype ipython = (_: {}) => any;\n}\n"


def calls(*ids):
    return [
        {"id": id_, "type": "function", "function": {"name": "ipython", "arguments": '{"code": "1+1"}'}} for id_ in ids
    ]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image", "image": "in.png"}]},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "first ü",
        "tool_calls": calls("functions.ipython:0", "functions.ipython:1"),
    },
    {"role": "tool", "tool_call_id": "functions.ipython:0", "name": "ipython", "content": "2"},
    {
        "role": "tool",
        "tool_call_id": "functions.ipython:1",
        "content": [{"type": "text", "text": "plot: "}, {"type": "image", "image": "out.png"}],
    },
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "second",
        "tool_calls": calls("functions.ipython:2"),
    },
    {"role": "tool", "tool_call_id": "functions.ipython:2", "content": ""},
    {"role": "assistant", "content": "A cat.", "reasoning_content": "third"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "", "reasoning_content": "fourth", "tool_calls": calls("functions.ipython:3")},
    {"role": "tool", "tool_call_id": "functions.ipython:3", "content": "yes"},
]


def load_media(part):
    return [(None, f"clip of {part['image']}")]


def by_jinja(messages, thinking, keep, prompt=False):
    template = jinja2.Environment(undefined=jinja2.ChainableUndefined).from_string(TEMPLATE)
    return template.render(messages=messages, thinking=thinking, keep=keep, prompt=prompt, tools=DECLARED)


@pytest.mark.parametrize("mode", ["thinking", "instant"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("length", range(1, len(MESSAGES) + 1))
def test_rendering_is_the_template(length, keep, mode):
    messages = MESSAGES[:length]
    how = dict(mode=mode, tools=[TOOL], keep_thinking=keep, add_generation_prompt=True)
    rendered = render(messages, TOKENIZER, load_media, **how)
    assert TOKENIZER.decode(rendered.tokens) == by_jinja(messages, mode == "thinking", keep, prompt=True)
    images = sum("image" in part for m in messages if isinstance(m["content"], list) for part in m["content"])
    assert rendered.tokens.count(BYTE_SPECIAL["<|media_pad|>"]) == len(rendered.clips) == images


def taught(rendered):
    return TOKENIZER.decode(t for t, weight in zip(rendered.tokens, rendered.weights, strict=True) if weight)


def test_thinking_that_is_left_out_is_not_taught_against():
    final = MESSAGES[:8]
    section = taught(render([MESSAGES[2] | {"content": ""}], TOKENIZER, mode="instant")).removesuffix("<|im_end|>")
    assert taught(render(final, TOKENIZER, load_media, mode="thinking")).startswith(f"first ü</think>I look.{section}")
    assert taught(render(final, TOKENIZER, load_media, mode="thinking")).endswith("third</think>A cat.<|im_end|>")
    assert taught(render(final, TOKENIZER, load_media, mode="thinking", keep_thinking=False)) == ""
    plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert taught(render(plain, TOKENIZER, mode="thinking", keep_thinking=False)) == "</think>y<|im_end|>"
    assert taught(render(plain, TOKENIZER, mode="instant")) == "y<|im_end|>"  # its thinking is in the prompt


@pytest.mark.parametrize("mode", ["thinking", "instant"])
def test_appending_turn_by_turn_is_rendering_the_list(mode):
    """Assistant turns come as sampled tokens; each prompt begins with all tokens before it."""
    conversation = Conversation(TOKENIZER, [TOOL], mode, load_media)
    before = []
    for index, message in enumerate(MESSAGES):
        if message["role"] == "assistant":
            prompt = conversation.prompt()
            assert prompt[: len(before)] == before and conversation.prompt() == prompt
            so_far = render(MESSAGES[: index + 1], TOKENIZER, load_media, mode=mode, tools=[TOOL])
            assert so_far.tokens[: len(prompt)] == prompt
            said = conversation.say(so_far.tokens[len(prompt) :])
            assert said.content == (message["content"] or "") and said.whole
            assert said.reasoning == (message["reasoning_content"] if mode == "thinking" else "")
            wanted = [call["id"] for call in message.get("tool_calls", [])]
            assert said.calls == tuple(Call(id_, "ipython", {"code": "1+1"}) for id_ in wanted)
        else:
            conversation.add(message)
        whole = render(MESSAGES[: index + 1], TOKENIZER, load_media, mode=mode, tools=[TOOL])
        assert conversation.rendered == whole
        before = list(conversation.rendered.tokens)


def test_sampled_tokens_are_kept_as_they_are():
    """The bytes of one character come as tokens that encoding would never give, and stay."""
    conversation = Conversation(TOKENIZER, mode="plain")
    conversation.add({"role": "user", "content": "x"})
    start = len(conversation.prompt())
    sampled = np.array([0xFF, BYTE_SPECIAL["[UNK]"], 0xC3, BYTE_SPECIAL["<think>"], END], np.int32)
    said = conversation.say(sampled)
    assert conversation.rendered.tokens[start:] == sampled.tolist()
    assert conversation.rendered.weights[start:] == [1.0] * 5 and said.whole
    conversation.add({"role": "user", "content": "y"})
    assert conversation.rendered.tokens[start : start + 5] == sampled.tolist()


@pytest.mark.parametrize("sampled", [[], [65, 66], [65, BYTE_SPECIAL["<|media_pad|>"], 66, END]])
def test_a_turn_that_was_cut_off_is_closed_without_being_taught(sampled):
    conversation = Conversation(TOKENIZER, mode="plain")
    conversation.add({"role": "user", "content": "x"})
    start = len(conversation.prompt())
    said = conversation.say(sampled)
    kept = [token for token in sampled[:2] if token < 256]
    assert conversation.rendered.tokens[start:] == [*kept, END] and not said.whole
    assert conversation.rendered.weights[start:] == [1.0] * len(kept) + [0.0]


def test_calls_that_were_sampled_count():
    conversation = Conversation(TOKENIZER, [TOOL], "plain")
    conversation.add({"role": "user", "content": "x"})
    conversation.prompt()
    said = conversation.say(TOKENIZER.encode("<|tool_calls_section_begin|>oh<|im_end|>", allow_special=True))
    assert isinstance(said.calls[0], BadCall)
    unnamed = [{"function": {"name": "f", "arguments": {}}}]
    conversation.add({"role": "assistant", "content": "", "tool_calls": unnamed})
    assert "functions.f:1" in TOKENIZER.decode(conversation.rendered.tokens)


def test_a_turn_that_fails_leaves_nothing_behind():
    conversation = Conversation(TOKENIZER)
    conversation.add({"role": "user", "content": "x"})
    before = (list(conversation.rendered.tokens), list(conversation.rendered.weights))
    with pytest.raises(ChatError, match=r"turn 1.content\[1\]: image cannot be read here"):
        conversation.add({"role": "user", "content": [{"text": "so "}, {"image": "x.png"}]})
    assert (conversation.rendered.tokens, conversation.rendered.weights) == before
    with pytest.raises(ChatError, match=r"turn 1: ask for prompt\(\)"):
        conversation.say([65])
    conversation.prompt()
    with pytest.raises(ChatError, match=r"turn 1: the assistant has been asked to speak"):
        conversation.add({"role": "user", "content": "y"})
    with pytest.raises(ChatError, match=r"sampling must stop at <\|im_end\|>"):
        conversation.say([65, END, 66])
