"""Kimi's chat template: messages to tokens, loss weights and clips (K2.5 §3.1, §3.2).

A turn is `<|im_user|>user<|im_middle|>` content `<|im_end|>`; an image in it is `<|media_begin|>image<|media_content|>
<|media_pad|><|media_end|>`, and a video is a list of such chunks, each after its time. There is one media_pad for each
clip; `data.packing` repeats it for every vision token. Tools are declared in a first turn `tool_declare`
(`text.declarations` has their form), calls follow what the assistant says (`text.tool_calls` has theirs), and the result of
a call is a turn `tool` that begins with `## Return of ID`. The mode says how an assistant's turn begins:

    plain      with what it says, as in K2-Instruct; <think> and </think> may stand in it
    thinking   <think> reasoning </think>; the prompt for a new turn ends with <think>
    instant    <think></think>, which is in the prompt too
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_jax.text.declarations import DeclarationError, declare
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import CallError, CallIds, call_parts

ROLES = ("system", "user", "assistant", "tool")
MODES = ("plain", "thinking", "instant")
KINDS = ("text", "image", "video")
MAX_WEIGHT = 1000
THINK = ("<think>", "</think>")  # special tokens in what the assistant says; ordinary text from anybody else
FIELDS = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}  # and who has them

# One part of media -> its clips, each with its time as HH:MM:SS.mmm (None: no time is written, as for an image).
LoadMedia = Callable[[Mapping], Sequence[tuple[str | None, Any]]]


class ChatError(ValueError):
    """A message that cannot be rendered; the text names its index, the field and the remedy."""


@dataclass
class Rendered:
    """Tokens with the weight of predicting each one; the media sources in order; their clips, one media_pad each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    media: list = field(default_factory=list)
    clips: list = field(default_factory=list)


class Writer:
    """Builds a `Rendered`: joins neighbouring text before it is encoded, as the template does with strings."""

    def __init__(self, tokenizer: Tokenizer):
        self.rendered = Rendered()
        self._tokenizer = tokenizer
        self._texts, self._weight, self._allowed = [], 0.0, ()

    def text(self, text: str, weight: float, allowed: Sequence[str] = ()):
        """Ordinary text; `allowed` names the special tokens that it may hold."""
        if (weight, allowed) != (self._weight, self._allowed):
            self.flush()
            self._weight, self._allowed = weight, allowed
        self._texts.append(text)

    def special(self, name: str, weight: float):
        """One special token."""
        self.flush()
        if name not in self._tokenizer.special:
            raise ChatError(self._tokenizer.special.lack(name))
        self._append([self._tokenizer.special[name]], weight)

    def media(self, part: Mapping, kind: str, load_media: LoadMedia):
        """All clips of one part, weight 0."""
        self.rendered.media.append(part[kind])
        for time, clip in load_media(part):
            if time is not None:
                self.text(time, 0.0)
            self.special("<|media_begin|>", 0.0)
            self.text(kind, 0.0)
            self.special("<|media_content|>", 0.0)
            self.special("<|media_pad|>", 0.0)
            self.special("<|media_end|>", 0.0)
            self.rendered.clips.append(clip)

    def flush(self):
        """Encode the text that waits for its end."""
        texts, self._texts = self._texts, []
        self._append(self._tokenizer.encode("".join(texts), self._allowed), self._weight)

    def lengths(self) -> tuple[int, ...]:
        """How much was written, for `cut`."""
        self.flush()
        return tuple(map(len, (self.rendered.tokens, self.rendered.weights, self.rendered.media, self.rendered.clips)))

    def cut(self, lengths: tuple[int, ...]):
        """Take back what was written since."""
        self._texts = []
        parts = (self.rendered.tokens, self.rendered.weights, self.rendered.media, self.rendered.clips)
        for part, length in zip(parts, lengths, strict=True):
            del part[length:]

    def _append(self, tokens: list[int], weight: float):
        self.rendered.tokens += tokens
        self.rendered.weights += [weight] * len(tokens)


class Renderer:
    """Writes turns one after the other; what is written never changes. `ids` numbers the calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        load_media: LoadMedia | None = None,
        mode: str = "plain",
        tools: Sequence[Mapping] = (),
    ):
        if mode not in MODES:
            raise ChatError(f"mode must be one of {', '.join(MODES)}, not {_show(mode)}")
        self._writer = Writer(tokenizer)
        self._load_media, self._mode, self.ids = load_media, mode, CallIds()
        if tools:
            self._declare(tools)

    @property
    def rendered(self) -> Rendered:
        """All that was written; whoever appends sampled tokens appends to it."""
        self._writer.flush()
        return self._writer.rendered

    def message(self, message: Mapping, where: str, keep_thinking: bool = True):
        """One whole turn, or nothing where it raises ChatError, which names `where`.

        What the assistant says has weight 1, unless the thinking before it is left out.
        """
        lengths = self._writer.lengths()
        try:
            self._message(message, where, keep_thinking)
        except BaseException:
            self._writer.cut(lengths)
            raise

    def _message(self, message: Mapping, where: str, keep_thinking: bool):
        role, content = _check_message(message, where)
        reasoning, calls = message.get("reasoning_content") or "", message.get("tool_calls") or ()
        if reasoning and self._mode == "plain":
            raise ChatError(f"{where}.reasoning_content needs the mode thinking or instant; or write it into content")
        dropped = bool(reasoning) and not keep_thinking and self._mode == "thinking"
        weight = _weight(message, where) if role == "assistant" and not dropped else 0.0
        if role == "assistant":
            self.open_assistant(message.get("name") or role)
            if self._mode == "thinking":
                self._writer.text("" if dropped else reasoning, weight)
                self._writer.special("</think>", weight)
        else:
            self._header("user" if role == "user" else "system", message.get("name") or role)
        if role == "tool":
            self._writer.text(f"## Return of {self.ids.known(message['tool_call_id'])}\n", 0.0)
        allowed = THINK if role == "assistant" and self._mode == "plain" else ()
        self._content(content, where, weight, allowed)
        if calls:
            self._calls(calls, where, weight)
        self._writer.special("<|im_end|>", weight)

    def open_assistant(self, name: str = "assistant"):
        """The beginning of an assistant's turn, up to where it speaks; weight 0."""
        self._header("assistant", name)
        for special in {"plain": (), "thinking": THINK[:1], "instant": THINK}[self._mode]:
            self._writer.special(special, 0.0)

    def _declare(self, tools: Sequence[Mapping]):
        try:
            text = declare(tools)
        except DeclarationError as problem:
            raise ChatError(str(problem)) from None
        self._header("system", "tool_declare")
        self._writer.text(text, 0.0)
        self._writer.special("<|im_end|>", 0.0)

    def _header(self, kind: str, name: str):
        self._writer.special(f"<|im_{kind}|>", 0.0)
        self._writer.text(name, 0.0)
        self._writer.special("<|im_middle|>", 0.0)

    def _content(self, content: Sequence[Mapping], where: str, weight: float, allowed: Sequence[str]):
        for number, part in enumerate(content):
            place = f"{where}.content[{number}]"
            kind = part_kind(part, place)
            if kind == "text":
                self._writer.text(part["text"], weight, allowed)
            elif self._load_media is None:
                raise ChatError(f"{place}: {kind} cannot be read here; send text only")
            else:
                self._writer.media(part, kind, self._load_media)

    def _calls(self, calls: Sequence[Mapping], where: str, weight: float):
        self._writer.special("<|tool_calls_section_begin|>", weight)
        for number, call in enumerate(calls):
            try:
                id_, arguments = call_parts(call, self.ids)
            except CallError as problem:
                raise ChatError(f"{where}.tool_calls[{number}]{problem}") from None
            self._writer.special("<|tool_call_begin|>", weight)
            self._writer.text(id_, weight)
            self._writer.special("<|tool_call_argument_begin|>", weight)
            self._writer.text(arguments, weight)
            self._writer.special("<|tool_call_end|>", weight)
        self._writer.special("<|tool_calls_section_end|>", weight)


def render(
    messages: Sequence[Mapping],
    tokenizer: Tokenizer,
    load_media: LoadMedia | None = None,
    add_generation_prompt: bool = False,
    mode: str = "plain",
    tools: Sequence[Mapping] = (),
    keep_thinking: bool = True,
) -> Rendered:
    """Messages `{"role", "content"}` to tokens; weight 1 on what the assistant says and its <|im_end|>, 0 elsewhere.

    `content` is a string or a list of parts: {"type": "text", "text": ..}, {"type": "image", "image": source},
    {"type": "video", "video": source}. Without `load_media`, parts other than text are refused. The assistant may have
    `reasoning_content`, `tool_calls` and a `weight` (0: read and not learnt), a result of a call (role tool) has its
    `tool_call_id`; `tools` are those of `text.declarations`. `keep_thinking=False` is the public template's default: of
    the turns up to the last answer without calls the thinking is left out, and what was said after it has weight 0.
    Raises ChatError.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ChatError(f"messages must be a list of at least one message, not {_show(messages)}")
    renderer = Renderer(tokenizer, load_media, mode, tools)
    answers = [i for i, m in enumerate(messages) if _is_answer(m)] if not keep_thinking else []
    for index, message in enumerate(messages):
        renderer.message(message, f"messages[{index}]", keep_thinking or index > max(answers, default=-1))
    if add_generation_prompt:
        renderer.open_assistant()
    return renderer.rendered


def part_kind(part: Mapping, where: str) -> str:
    """Check one part of content and return its kind: text, image or video; raises ChatError."""
    if not isinstance(part, Mapping):
        raise ChatError(f"{where} must be a mapping such as {{'type': 'text', 'text': ..}}, not {_show(part)}")
    present = [kind for kind in KINDS if kind in part]
    kind = part.get("type", present[0] if len(present) == 1 else None)
    if kind not in KINDS:
        raise ChatError(f"{where}.type must be one of {', '.join(KINDS)}, not {_show(kind)}")
    if present != [kind]:
        raise ChatError(f"{where}: a part of type {kind} needs the field {kind!r} and no other of {', '.join(KINDS)}")
    wanted = str if kind == "text" else (str, bytes, os.PathLike, np.ndarray)
    if not isinstance(part[kind], wanted):
        raise ChatError(f"{where}.{kind} has the wrong type: {_show(part[kind])}")
    return kind


def check_weight(weight, where: str) -> float:
    """How much a turn or a record counts in the loss; raises ChatError."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_WEIGHT:
        raise ChatError(f"{where} must be a number from 0 to {MAX_WEIGHT}, not {_show(weight)}")
    return float(weight)


def _weight(message: Mapping, where: str) -> float:
    given = message.get("weight")
    return 1.0 if given is None else check_weight(given, f"{where}.weight")


def _is_answer(message) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant" and not message.get("tool_calls")


def _check_message(message: Mapping, where: str) -> tuple[str, Sequence[Mapping]]:
    """Role and parts of one message."""
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a mapping with role and content, not {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ChatError(f"{where}.role must be one of {', '.join(ROLES)}, not {_show(role)}")
    for name, owner in FIELDS.items():
        if message.get(name) and role != owner:
            raise ChatError(f"{where}.{name} belongs to the role {owner}, not {role}")
    for name in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(message.get(name, ""), (str, type(None))):
            raise ChatError(f"{where}.{name} must be a string, not {_show(message[name])}")
    if role == "tool" and not message.get("tool_call_id"):
        raise ChatError(f"{where}.tool_call_id is missing; give the id of the call that this is the result of")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ChatError(f"{where}.tool_calls must be a list of calls, not {_show(calls)}")
    if _weight(message, where) and message.get("weight") and role != "assistant":
        raise ChatError(
            f"{where}.weight: only what the assistant says is learnt; leave it out for the role {role}, or 0"
        )
    if content is None and not calls and not message.get("reasoning_content"):
        raise ChatError(f"{where}.content is missing; give a string or a list of parts")
    if content is None or isinstance(content, str):
        return role, [{"type": "text", "text": content or ""}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError(f"{where}.content must be a string or a list of parts, not {_show(content)}")
    return role, content


def _show(value) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
