"""Kimi's chat template: messages to tokens, loss weights and clips (K2.5 §3.1, §3.2).

A turn is `<|im_user|>user<|im_middle|>` content `<|im_end|>`; an image in it is `<|media_begin|>image<|media_content|>
<|media_pad|><|media_end|>`, and a video is a list of such chunks, each after its time. There is one media_pad for each
clip; `data.packing` repeats it for every vision token.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
KINDS = ("text", "image", "video")
THINK = ("<think>", "</think>")  # special tokens in what the assistant says; ordinary text from anybody else
LATER = ("tool_calls", "tool_call_id", "reasoning_content")  # fields that change the meaning and are not rendered

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
        self._text, self._weight, self._allowed = "", 0.0, ()

    def text(self, text: str, weight: float, allowed: Sequence[str] = ()):
        """Ordinary text; `allowed` names the special tokens that it may hold."""
        if (weight, allowed) != (self._weight, self._allowed):
            self.flush()
            self._weight, self._allowed = weight, allowed
        self._text += text

    def special(self, name: str, weight: float):
        """One special token."""
        self.flush()
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
        self._append(self._tokenizer.encode(self._text, self._allowed), self._weight)
        self._text = ""

    def _append(self, tokens: list[int], weight: float):
        self.rendered.tokens += tokens
        self.rendered.weights += [weight] * len(tokens)


def render(
    messages: Sequence[Mapping],
    tokenizer: Tokenizer,
    load_media: LoadMedia | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Messages `{"role", "content"}` to tokens; weight 1 on what the assistant says and its <|im_end|>, 0 elsewhere.

    `content` is a string or a list of parts: {"type": "text", "text": ..}, {"type": "image", "image": source},
    {"type": "video", "video": source}. Without `load_media`, parts other than text are refused. Raises ChatError.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ChatError(f"messages must be a list of at least one message, not {_show(messages)}")
    writer = Writer(tokenizer)
    for index, message in enumerate(messages):
        role, content = _check_message(message, index)
        weight = float(role == "assistant")
        _header(writer, role)
        for number, part in enumerate(content):
            where = f"messages[{index}].content[{number}]"
            kind = part_kind(part, where)
            if kind == "text":
                writer.text(part["text"], weight, THINK if role == "assistant" else ())
            elif load_media is None:
                raise ChatError(f"{where}: {kind} cannot be read here; send text only")
            else:
                writer.media(part, kind, load_media)
        writer.special("<|im_end|>", weight)
    if add_generation_prompt:
        _header(writer, "assistant")
    return writer.rendered


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


def _check_message(message: Mapping, index: int) -> tuple[str, Sequence[Mapping]]:
    """Role and parts of one message."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a mapping with role and content, not {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ChatError(f"{where}.role must be one of {', '.join(ROLES)}, not {_show(role)}")
    if content is None:
        raise ChatError(f"{where}.content is missing; give a string or a list of parts")
    for name in LATER:
        if message.get(name):
            raise ChatError(f"{where}.{name} is not supported; write it into content or drop the message")
    if isinstance(content, str):
        return role, [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError(f"{where}.content must be a string or a list of parts, not {_show(content)}")
    return role, content


def _header(writer: Writer, role: str):
    writer.special(f"<|im_{role}|>", 0.0)
    writer.text(role, 0.0)
    writer.special("<|im_middle|>", 0.0)


def _show(value) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
