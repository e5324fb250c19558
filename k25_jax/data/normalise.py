"""Records in the one spelling that `data.forms` reads; what the field writes otherwise is turned into it (K2.5 §3.3).

What reads a record and what writes it again (`k25 data build`) both begin here, so they cannot differ. Nothing is left out
but nulls: a field that no form reads stays, unless it holds media or says what is to be learnt; then the record is bad.

    null                                    absent, at every depth; it stays among the values of a list, as in an `enum`
    messages, tools, .. as a string         the JSON that it is; so a tool, its `parameters` and `tool_calls`
    conversations of "from" and "value"     messages (ShareGPT, LLaVA)
    system, system_prompt beside messages   the first message
    role developer                          role system
    reasoning, thinking of a turn           reasoning_content
    train, training, trainable, loss, ..    weight 1 or 0 of a turn
    images, image_url, video_path, ..       as `data.attach` has it
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.data.attach import (
    MEDIUM_FIELDS,
    as_list,
    check_bytes,
    check_no_place,
    check_strays,
    fill,
    has_place,
    read_part,
    take_media,
)
from k25_jax.data.records import Record, RecordError

FORM_FIELDS = ("text", "caption", "ocr", "boxes", "elements", "parts", "messages")
LISTS = ("messages", "conversations", "parts", "boxes", "elements", "tools")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
            "user": "user", "assistant": "assistant", "system": "system"}  # fmt: skip
REASONING = ("reasoning", "thinking")
LEARN = ("train", "training", "trainable", "loss", "learn", "train_on_turn")  # flags of a turn
MESSAGE_FIELDS = ("role", "content", "name", "weight", "reasoning_content", "tool_calls", "tool_call_id")
UNREAD = {  # what is to be learnt in words that are not read here -> how to say it
    **dict.fromkeys(("mask", "masked", "loss_mask", "loss_scale", "loss_weight", "train_detail", "train_on_inputs",
                     "sample_weight", "completion_mask", "assistant_masks"), "write the weight of a turn or of the record"),
    **dict.fromkeys(("function_call", "functions"), "write tool_calls and tools"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking"), "write the mode"),
}  # fmt: skip
METADATA_OF_TEXTS = ("mask", "masked", "functions", "function_call")  # beside a text they say nothing about learning


def canonical(record: Record) -> Record:
    """The record in our spelling, which is its own; raises RecordError."""
    if isinstance(record.data, RecordError):
        raise record.data
    try:
        return record._replace(data=_canonical(record.data))
    except RecursionError:
        raise RecordError("form", "is nested too deeply; write less deep fields") from None


def _canonical(given: Mapping) -> dict:
    data = without_nulls(given)
    for name in LISTS:
        if isinstance(data.get(name), str):
            data[name] = _parse(data[name], name)
    for name in ("images", "videos"):
        if isinstance(data.get(name), str) and data[name].lstrip().startswith("["):
            data[name] = _parse(data[name], name)
    if "conversations" in data:
        data = _turns(data)
    data, media, names = take_media(data, "the record")
    if "messages" in data:
        data = _conversation(data, media, names)
    elif "parts" in data:
        parts = [read_part(part, f"parts[{i}]") for i, part in enumerate(as_list(data, "parts"))]
        data["parts"] = _placed([parts], media, "parts", names)[0]
    elif media:
        data = _with_medium(data, media, names)
    else:
        check_no_place([data.get(name) for name in ("text", "caption")], "the text")
    _check_fields(data)
    return data


# ---------------------------------------------------------------------------------------------------------------- nulls
def without_nulls(value):
    """Without fields that are null, and without nulls between mappings. Pairs of a Parquet map become a mapping."""
    if isinstance(value, Mapping):
        return {
            name: _schemas(one) if name in ("properties", "$defs") else without_nulls(one)
            for name, one in value.items()
            if one is not None
        }
    if isinstance(value, list) and value and all(isinstance(one, tuple) and len(one) == 2 for one in value):
        if all(isinstance(name, str) for name, _ in value):
            return without_nulls(dict(value))
    if isinstance(value, (list, tuple)):
        rows = all(one is None or isinstance(one, Mapping) for one in value)
        return [without_nulls(one) for one in value if not (rows and _is_null(one))]
    return value.item() if isinstance(value, np.generic) else value


def _schemas(value):
    """Names to JSON Schemas: where several were padded to one struct, those of nothing but nulls are not there."""
    if isinstance(value, list):
        value = without_nulls(value) if any(isinstance(one, tuple) for one in value) else value
    if not isinstance(value, Mapping):
        return without_nulls(value)
    return {name: without_nulls(one) for name, one in value.items() if not _is_null(one)}


def _is_null(value) -> bool:
    return value is None or (isinstance(value, Mapping) and len(value) > 0 and all(map(_is_null, value.values())))


def _parse(text: str, name: str):
    """A field that was written as JSON."""
    try:
        return without_nulls(json.loads(text))
    except ValueError as problem:
        raise RecordError(
            "form", f"{name} is a string that is not JSON ({problem}); write a list, or its JSON"
        ) from None


# --------------------------------------------------------------------------------------------------------- conversations
def _turns(data: dict) -> dict:
    """`conversations`, of turns {"from", "value"} or messages, as `messages`."""
    if "messages" in data:
        raise RecordError("form", "has messages and conversations; give one of them")
    messages = []
    for index, turn in enumerate(as_list(data, "conversations")):
        where = f"conversations[{index}]"
        if isinstance(turn, Mapping) and "from" in turn:
            speaker = turn["from"]
            if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
                raise RecordError("form", f"{where}.from must be one of {', '.join(SPEAKERS)}, not {str(speaker)[:40]!r}; "
                                          "write calls of tools as messages")  # fmt: skip
            rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
            turn = {"role": SPEAKERS[speaker.lower()], "content": turn.get("value"), **rest}
            if turn["content"] is None:
                raise RecordError("form", f"{where}.value is missing; give a string")
        messages.append(turn)
    return {("messages" if name == "conversations" else name): (messages if name == "conversations" else value)
            for name, value in data.items()}  # fmt: skip


def _conversation(data: dict, media: dict, names: str) -> dict:
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(as_list(data, "messages"))]
    for name in ("system", "system_prompt"):
        if isinstance(data.get(name), str):
            text = data.pop(name)
            if text and any(isinstance(one, Mapping) and one.get("role") == "system" for one in messages):
                raise RecordError("form", f"has {name} and a message of the role system; give one of them")
            messages[:0] = [{"role": "system", "content": text}] if text else []
    contents = _placed(
        [m.get("content") if isinstance(m, Mapping) else None for m in messages], media, "messages", names
    )
    data["messages"] = [
        {**message, "content": content} if content is not None else message
        for message, content in zip(messages, contents, strict=True)
    ]
    if isinstance(data.get("tools"), (list, tuple)):
        data["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(data["tools"])]
    return data


def _placed(contents: list, media: dict, where: str, names: str) -> list:
    if media:
        return fill(contents, media, where, names)
    check_no_place(contents, where)
    return contents


def _message(given, where: str):
    """One message; what is odd about it, `text.chat` will say."""
    if not isinstance(given, Mapping):
        return given
    message, media, names = take_media(given, where)
    if message.get("role") == "developer":
        message["role"] = "system"
    for name in REASONING:
        if name in message:
            value = message.pop(name)
            if message.setdefault("reasoning_content", value) != value:
                raise RecordError("form", f"{where} has {name} and another reasoning_content; give one of them")
    for name in LEARN:
        if name in message:
            message["weight"] = _flag(message, name, where)
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = _parse(message["tool_calls"], f"{where}.tool_calls")
    if isinstance(message.get("tool_calls"), (list, tuple)):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    if isinstance(message.get("content"), (list, tuple)):
        message["content"] = [read_part(part, f"{where}.content[{i}]") for i, part in enumerate(message["content"])]
    if media:
        (message["content"],) = fill([message.get("content")], media, where, names)
    check_strays(message, MESSAGE_FIELDS, where, _holds_media(message.get("content")))
    _refuse(message, tuple(UNREAD), where)
    return message


def _flag(message: dict, name: str, where: str) -> float:
    flag = message.pop(name)
    if not isinstance(flag, (bool, int)) or flag not in (0, 1):
        raise RecordError("form", f"{where}.{name} must be true or false, not {str(flag)[:40]!r}; or write a weight")
    if message.get("weight", flag) != flag:
        raise RecordError("form", f"{where} has {name} and another weight; give one of them")
    return float(flag)


def _call(call):
    """A call as {"function": {"name", "arguments"}}; one without arguments has none."""
    if not isinstance(call, Mapping):
        return call
    if "function" not in call and "name" in call:
        inner = {name: call[name] for name in ("name", "arguments") if name in call}
        call = {**{name: value for name, value in call.items() if name not in inner}, "function": inner}
    if isinstance(call.get("function"), Mapping) and "arguments" not in call["function"]:
        call = {**call, "function": {**call["function"], "arguments": {}}}
    return call


def _tool(tool, where: str):
    """A tool as {"type": "function", "function": {"name", "description", "parameters"}}."""
    if isinstance(tool, str):
        tool = _parse(tool, where)
    if not isinstance(tool, Mapping):
        return tool
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    function = tool.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        parameters = _parse(function["parameters"], f"{where}.function.parameters")
        tool = {**tool, "function": {**function, "parameters": parameters}}
    return tool


# ---------------------------------------------------------------------------------------------------------- whole records
def _with_medium(data: dict, media: dict, names: str) -> dict:
    """A record of one text: with one medium beside it, or as parts where the text says where its media belong."""
    name = next((name for name in ("text", "caption") if isinstance(data.get(name), str)), None)
    found = [part for parts in media.values() for part in parts]
    marked = name is not None and not {"boxes", "elements"} & data.keys() and has_place(data[name])
    if len(found) == 1 and not marked:
        return {**data, **found[0]}
    if name is None or {"ocr", "boxes", "elements"} & data.keys():
        raise RecordError("form", f"{names}: {len(found)} media for one text; write parts")
    (parts,) = fill([data[name]], media, name, names)
    return {key: value for key, value in data.items() if key != name} | {"parts": parts}


def _holds_media(content) -> bool:
    parts = content if isinstance(content, (list, tuple)) else ()
    return any(isinstance(part, Mapping) and any(name in part for name in MEDIUM_FIELDS) for part in parts)


def _check_fields(data: Mapping):
    """Refuse fields that no form reads and that are media, or say what is to be learnt."""
    contents = [data.get("parts")]
    if isinstance(data.get("messages"), Sequence):
        contents = [message.get("content") for message in data["messages"] if isinstance(message, Mapping)]
    has_media = any(name in data for name in MEDIUM_FIELDS) or any(map(_holds_media, contents))
    read = (*FORM_FIELDS, *(("tools", "mode") if "messages" in data else ()), "weight", "from")
    check_strays(data, read, "the record", has_media)
    check_bytes(data)
    if "messages" in data:
        return _refuse(data, tuple(UNREAD), "the record")
    if data.get("tools"):
        raise RecordError("form", "has tools and no messages; tools belong to messages")
    _refuse(data, tuple(name for name in UNREAD if name not in METADATA_OF_TEXTS), "the record")


def _refuse(data: Mapping, names: Sequence[str], where: str):
    for name in names:
        if name in data:
            raise RecordError("form", f"{where}: the field {name!r} is not read; {UNREAD[name]}, or leave it out")
