"""Messages and tools of OpenAI's chat API to those of `text.chat`, with their media as bytes."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from k25_jax.serving.errors import ApiError, show
from k25_jax.serving.fields import Fields
from k25_jax.serving.media import MediaOpener

MEDIA = {"image_url": "image", "video_url": "video"}
SHOWN = ("detail", "format", "mime_type", "media_type")  # how many patches it gets the server says; its kind, its bytes
THOUGHTS = ("reasoning_content", "reasoning")  # names of one thing
CACHE = "cache_control"  # of other servers; here prompts that begin alike share what was computed anyway


class ToolUse(NamedTuple):
    """The tools to declare, whether calls are read from the answer, and the name of the one that must be called."""

    tools: list[dict]
    read: bool
    forced: str | None
    names: Sequence[str] = ()
    strict: Sequence[str] = ()  # those whose arguments were to be constrained, which they are not


def convert_messages(messages: list, opener: MediaOpener, mode: str) -> list[dict]:
    """Check what the API adds to `text.chat`, which checks the rest, and read the media; raises ApiError."""
    if not messages:
        raise ApiError("messages must hold at least one message", "messages", "invalid_value")
    return [_message(message, f"messages[{index}]", opener, mode) for index, message in enumerate(messages)]


def _message(message, where: str, opener: MediaOpener, mode: str) -> dict:
    if not isinstance(message, dict):
        raise ApiError(f"{where} must be an object with role and content, not {show(message)}", where, "invalid_type")
    fields = Fields(
        {name: value for name, value in message.items() if value not in ([], "") or name == "content"}, where
    )
    out = {"role": fields.take("role", str, required=True)}
    if out["role"] == "developer":
        out["role"] = "system"
    content = fields.take("content", str, list)
    if isinstance(content, list):
        parts = enumerate(content)
        content = [_part(part, f"{where}.content[{number}]", opener) for number, part in parts]
    for name, kind in (("name", str), ("tool_calls", list), ("tool_call_id", str)):
        out[name] = fields.take(name, kind)
    thought = _thought(fields, where)
    fields.ignored(CACHE)
    fields.end()
    if content is None and thought and out["role"] == "assistant":
        content = ""  # it was cut off while it thought
    # in the plain form of the template the thinking of earlier turns has no place
    out["reasoning_content"] = None if mode == "plain" and out["role"] == "assistant" else thought
    return {name: value for name, value in (out | {"content": content}).items() if value is not None}


def _thought(fields: Fields, where: str) -> str | None:
    """The thinking of an earlier answer, under any of its names; `reasoning_details` count where the others are missing."""
    said = {name: text for name in THOUGHTS if (text := fields.take(name, str))}
    details = fields.take("reasoning_details", list, default=[])
    if len(set(said.values())) > 1:
        raise fields.error("reasoning", "and reasoning_content differ; send one of them", "invalid_value")
    if said or not details:
        return next(iter(said.values()), None)
    texts = [detail.get("text") or detail.get("summary") if isinstance(detail, dict) else None for detail in details]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            place = f"reasoning_details[{number}]"
            raise fields.error(place, "has no text that can be read; send the thinking as reasoning_content")
    return "".join(texts)


def _part(part, where: str, opener: MediaOpener) -> dict:
    """One part of content."""
    if not isinstance(part, dict):
        raise ApiError(
            f"{where} must be an object such as {{'type': 'text', 'text': ..}}, not {show(part)}", where, "invalid_type"
        )
    fields = Fields(part, where)
    kind = fields.take("type", str, required=True)
    fields.ignored(CACHE)
    if kind == "text":
        text = fields.take("text", str, required=True)
        fields.end()
        return {"type": "text", "text": text}
    if kind not in MEDIA:
        known = ", ".join(("text", *MEDIA))
        raise ApiError(f"{where}.type must be one of {known}, not {show(kind)}", f"{where}.type", "invalid_value")
    source = fields.take(kind, dict, str, required=True)
    fields.end()
    place = f"{where}.{kind}"
    if isinstance(source, dict):
        inner = Fields(source, place)
        inner.ignored(*SHOWN)
        source, place = inner.take("url", str, required=True), f"{place}.url"
        inner.end()
    return {"type": MEDIA[kind], MEDIA[kind]: opener.read(source, place), "name": place}


def read_tools(fields: Fields, mode: str) -> ToolUse:
    """`tools` and `tool_choice`. What cannot be kept is refused; raises ApiError."""
    tools = [
        _checked_tool(tool, f"tools[{number}]") for number, tool in enumerate(fields.take("tools", list, default=[]))
    ]
    names = [tool["function"]["name"] for tool in tools]
    strict = [name for name, tool in zip(names, tools, strict=True) if tool["function"].get("strict")]
    choice = fields.take("tool_choice", str, dict, default="auto" if tools else "none")
    if choice == "none":
        return ToolUse([], False, None)
    if not tools:
        raise fields.error("tool_choice", "needs tools to choose from", "invalid_value")
    if choice == "auto":
        return ToolUse(tools, True, None, names, strict)
    name = _forced(fields, choice, names)
    if mode == "thinking":
        problem = "can only be kept without thinking: add chat_template_kwargs={'thinking': false}, or send 'auto'"
        raise fields.error("tool_choice", problem, "unsupported_value")
    return ToolUse(tools, True, name, names, strict)


def _checked_tool(tool, where: str) -> dict:
    """A declared tool, without what is not for the model."""
    if not isinstance(tool, dict):
        raise ApiError(f"{where} must be an object, not {show(tool)}", where, "invalid_type")
    fields = Fields(tool, where)
    kind = fields.take("type", str, default="function")
    if kind != "function":
        raise fields.error("type", f"must be 'function', not {show(kind)}", "invalid_value")
    function = Fields(fields.take("function", dict, required=True), f"{where}.function")
    fields.ignored(CACHE)
    fields.end()
    name = function.take("name", str, required=True)
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise function.error(
            "name", f"must be up to 64 letters, digits, '_', '.' and '-', not {show(name)}", "invalid_value"
        )
    rest = {"description": function.take("description", str), "parameters": function.take("parameters", dict)}
    rest["strict"] = function.take("strict", bool)
    function.ignored(CACHE)
    function.end()
    return {"type": kind, "function": {"name": name} | {k: v for k, v in rest.items() if v is not None}}


def _forced(fields: Fields, choice: str | dict, names: Sequence[str]) -> str:
    """The name of the tool that must be called."""
    if choice == "required" and len(set(names)) == 1:
        return names[0]
    if choice == "required":
        problem = "'required' can only be kept with one tool; name one, or send 'auto'"
        raise fields.error("tool_choice", problem, "unsupported_value")
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
    if name is None:
        problem = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ..}}"
        raise fields.error("tool_choice", f"{problem}, not {show(choice)}", "invalid_value")
    if name not in names:
        raise fields.error("tool_choice", f"names {show(name)}, which is not one of tools", "invalid_value")
    return name
