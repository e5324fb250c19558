"""Media of a record under the names of the field, brought to where they belong (K2.5 §3.3).

`images`, `image_url`, `video_path` and the like beside a text are its medium; beside messages or parts they fill the places
`<image>` and `<video>` in texts, and parts of type image or video without a source, in their order. Where a medium stays
over, the record is bad and its field is named: a caption without its picture must not become a text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from k25_jax.data.captions import IMAGES, OTHER_MEDIA, VIDEOS
from k25_jax.data.media import MEDIA
from k25_jax.data.records import RecordError

NAME = re.compile(
    r"(?:(?P<image>image|img|picture|photo|pic)|(?P<video>video|movie))s?"
    r"[ _-]?(?:path|file|file[ _-]?name|url|uri|bytes|data|(?P<coded>base64|b64))?s?",
    re.IGNORECASE,
)
TYPES = {  # of parts, elsewhere
    **dict.fromkeys(("image_url", "input_image", "image_path", "image_file", "image_base64", "img"), "image"),
    **dict.fromkeys(("video_url", "input_video", "video_path", "video_file", "video_base64"), "video"),
    **dict.fromkeys(("input_text", "output_text"), "text"),
}
CODED = ("base64", "b64", "b64_json", "data", "image_base64", "video_base64")  # in a mapping that is a medium
ADDRESSES = ("url", "uri", "path", "file", "source", "image", "video", "image_url", "video_url")
IN_BASE64 = re.compile(r"\s*data:[^,]{0,200},|(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|AAAA.{4}ZnR5c)[\w+/=\s-]{40}")
MEDIA_WORDS = set(
    "image images img imgs picture pictures photo photos pic pics screenshot screenshots thumbnail thumbnails video videos "
    "movie movies frame frames media medium pixel pixels audio audios sound sounds wav mp3 flac ogg heic heif avif".split()
)
NOT_SEEN = set("frame frames media medium audio audios sound sounds wav mp3 flac ogg heic heif avif".split())
ABOUT = set(  # `image_id`, `video_duration`: words about a medium
    "id ids width height size sizes shape count num number hash sha md5 phash license licence type types format duration fps "
    "resolution quality score scores ratio index idx title description caption captions alt tag tags label labels category "
    "class name dataset source author date mode channels similarity language key status meta metadata info prompt text style"
    .split()
)  # fmt: skip
WEB = ("http://", "https://")
COUNTING = ("num", "n", "has", "is", "no", "total")
FILE = re.compile(  # but for those that are text as well
    r"[^\n]{1,500}(?:"
    + "|".join(map(re.escape, set(IMAGES + VIDEOS + OTHER_MEDIA) - {".svg", ".eps"}))
    + r")(?:[?#][^\n]*)?",
    re.IGNORECASE,
)
MEDIUM_FIELDS = (*MEDIA, *(f"{kind}_base64" for kind in MEDIA))  # in our spelling
BESIDE = "write it into image or video, or into parts, or leave it out"


def as_list(record: Mapping, name: str) -> Sequence:
    """A field that must be a list; raises RecordError."""
    if not isinstance(record[name], (list, tuple)):
        raise RecordError("form", f"{name} must be a list, not {type(record[name]).__name__}")
    return record[name]


# ---------------------------------------------------------------------------------------------------------------- names
def kind_of_name(name: str, value=None) -> tuple[str, bool] | None:
    """Whether a field is called a medium: image or video, and whether it is said to be base64."""
    if match := NAME.fullmatch(name):
        return ("image" if match["image"] else "video"), bool(match["coded"])
    ending = f".{name}".lower()  # a column of a tar that became a table
    if isinstance(value, str) and name.lower() in ("file_name", "file name", "file-name"):  # of an image folder
        ending = value[value.rfind(".") :].lower()
    return ("image", False) if ending in IMAGES else ("video", False) if ending in VIDEOS else None


def as_part(kind: str, value, coded: bool = False) -> dict:
    """A medium in any of its spellings as a part: {kind: path, bytes or pixels} or {kind_base64: ..}; raises RecordError."""
    if isinstance(value, (list, tuple)):
        raise RecordError("form", f"a list stands where one {kind} should; give a path, bytes or base64")
    if isinstance(value, Mapping):
        for name in ("bytes", *CODED):
            if isinstance(value.get(name), str):
                return {f"{kind}_base64": value[name]}
        if isinstance(value.get("data"), bytes):
            return {kind: value["data"]}
        if not isinstance(value.get("bytes"), bytes):
            for name in ADDRESSES:
                if name in value and (name not in MEDIA or name == kind):
                    return as_part(kind, value[name])
    elif coded or (isinstance(value, str) and IN_BASE64.match(value)):
        return {f"{kind}_base64": value}
    return {kind: value}


def read_part(given, where: str):
    """A part of content in our spelling; what is odd about it is left for `part_kind` to name."""
    if not isinstance(given, Mapping):
        return given
    part = dict(given)
    kind = part.get("type")
    if isinstance(kind, str):
        kind = part["type"] = TYPES.get(kind, kind)
    if "text" in part:  # of a part that is a text the columns for media are padding
        part = {name: value for name, value in part.items() if value != {} or name not in MEDIA}
    for name, value in part.items():
        if isinstance(value, (list, tuple)) and kind_of_name(name):
            raise RecordError(
                "form", f"{where}.{name} is a list; give each medium a part of its own, and a video as a file"
            )
    rest, media, _ = take_media(part, where)
    if not media and isinstance(kind, str) and kind in MEDIA:
        sources = {name: rest.pop(name) for name in (*CODED, *ADDRESSES) if name in rest}
        media = {kind: [as_part(kind, sources)]} if sources else {}
    for (medium,) in media.values():
        rest |= medium
    check_strays(rest, ("type", "text", "name"), where, bool(media))
    return rest


def take_media(data: Mapping, where: str) -> tuple[dict, dict[str, list[dict]], str]:
    """The fields that are no media; the media by kind, as parts; and what their fields are called. Raises RecordError.

    Beside a medium, one more address of it stays, as the source of it.
    """
    named: dict[str, dict[str, list[dict]]] = {kind: {} for kind in MEDIA}
    rest = {}
    for name, value in data.items():
        kind = kind_of_name(name, value)
        if kind is None:
            rest[name] = value
        elif kind[0] in MEDIA:
            values = value if isinstance(value, (list, tuple)) else [value]
            if found := [as_part(kind[0], one, kind[1]) for one in values if one is not None]:
                named[kind[0]][name] = found
    out, names = {}, []
    for kind, fields in named.items():
        if fields:
            names.append(_primary(kind, fields, where))
            out[kind] = fields.pop(names[-1])
            rest |= {f"{name}_source": data[name] for name in fields}
    return rest, out, ", ".join(names)


def _primary(kind: str, fields: Mapping[str, list[dict]], where: str) -> str:
    """Of several fields that name media of one kind, the one that is it; the others must be addresses of it."""
    if len(fields) == 1:
        return next(iter(fields))
    addresses = [name for name, found in fields.items() if len(found) == 1 and isinstance(found[0].get(kind), str)]
    held = [name for name in fields if name not in addresses]
    if len(held) == 1:
        return held[0]
    if not held and kind in fields:
        return kind
    files = [name for name in addresses if not fields[name][0][kind].startswith(WEB)]
    if not held and len(files) == 1:
        return files[0]
    raise RecordError("form", f"{where} has media under several names, {', '.join(fields)}; give one of them")


# --------------------------------------------------------------------------------------------------------------- places
def fill(contents: Sequence, media: Mapping[str, list[dict]], where: str, names: str) -> list:
    """Contents, each a text or a list of parts, with the media in the places that they have for them."""
    places = {kind: 0 for kind in MEDIA}
    for kind in _places(contents):
        places[kind] += 1
    for kind in MEDIA:
        given = len(media.get(kind, ()))
        if given != places[kind]:
            raise RecordError(
                "form",
                f"{names} beside {where}: {given} media of kind {kind} for {places[kind]} places; write <{kind}> where "
                f"each belongs, or a part of type {kind}",
            )
    queues = {kind: enumerate(found) for kind, found in media.items()}
    return [_fill_content(content, queues) for content in contents]


def has_place(text: str) -> bool:
    """Whether a text has the mark of a medium; one that is closed again, as in XML, is none."""
    return _marks(text).search(text) is not None


def _marks(text: str) -> re.Pattern:
    kinds = [kind for kind in MEDIA if f"</{kind}>" not in text]
    return re.compile(f"<({'|'.join(kinds)})>" if kinds else "(?!)")


def _texts(content) -> Iterator[str]:
    for part in content if isinstance(content, (list, tuple)) else [{"text": content}]:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield part["text"]


def _places(contents: Sequence) -> Iterator[str]:
    for content in contents:
        for text in _texts(content):
            yield from _marks(text).findall(text)
        if isinstance(content, (list, tuple)):
            yield from (part["type"] for part in content if _is_open(part))


def _is_open(part) -> bool:
    """A part of type image or video without a source."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return kind in MEDIA and not any(name in part for name in (kind, f"{kind}_base64", "text"))


def _fill_content(content, queues: Mapping[str, Iterator[tuple[int, dict]]]):
    if isinstance(content, str):
        return _fill_text(content, queues) if has_place(content) else content
    if not isinstance(content, (list, tuple)):
        return content
    out = []
    for part in content:
        if _is_open(part):
            number, medium = next(queues[part["type"]])
            if part.get("index", number) != number:
                raise RecordError(
                    "form", f"a part of type {part['type']} has index {part['index']!r}, and is number {number}"
                )
            out.append({**part, **medium})
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str) and has_place(part["text"]):
            out += _fill_text(part["text"], queues)
        else:
            out.append(part)
    return out


def _fill_text(text: str, queues: Mapping[str, Iterator[tuple[int, dict]]]) -> list[dict]:
    """A text cut at its places: text, kind, text, .."""
    parts = []
    for number, piece in enumerate(_marks(text).split(text)):
        if number % 2:
            parts.append({"type": piece, **next(queues[piece])[1]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_no_place(contents: Sequence, where: str):
    """Raise RecordError where a text begins or ends with the mark of a medium that is not there."""
    for content in contents:
        for text in _texts(content):
            for kind in MEDIA:
                mark, bare = f"<{kind}>", text.strip()
                if (bare.startswith(mark) or bare.endswith(mark)) and f"</{kind}>" not in text:
                    raise RecordError(
                        "form", f"{where} has {mark}, and the record no {kind}; add it, or remove the mark"
                    )


# --------------------------------------------------------------------------------------------------------------- strays
def check_strays(data: Mapping, known: Sequence[str], where: str, has_media: bool):
    """Raise RecordError for a field that is not known and holds a medium, by its name or its value."""
    for name, value in data.items():
        if name in known or name in MEDIUM_FIELDS or isinstance(value, (bool, int, float)):
            continue
        problem = _stray_name(name, value, has_media) or _stray_value(name, value, has_media)
        if problem:
            raise RecordError("form", f"{where}: the field {name!r} {problem}; {BESIDE}")


def check_bytes(data: Mapping):
    """Raise RecordError where bytes stand elsewhere than in a medium: no text and no JSON has them."""
    for name, value in data.items():
        if name not in MEDIUM_FIELDS and any(isinstance(one, bytes) for one in _walk(value, MEDIUM_FIELDS)):
            raise RecordError(
                "form", f"the field {name!r} holds bytes that are no medium; write text, or leave them out"
            )


def _stray_name(name: str, value, has_media: bool) -> str:
    words = re.findall("[a-z]+[0-9]?", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    words = [word if word in MEDIA_WORDS else word.rstrip("0123456789") for word in words]
    if not MEDIA_WORDS.intersection(words) or words[-1] in ABOUT or words[0] in COUNTING:
        return ""
    if isinstance(value, (str, list, tuple, Mapping)) and not len(value):
        return ""
    if has_media and isinstance(value, str) and not NOT_SEEN.intersection(words):
        return ""  # where the medium is from
    return "is named as media are, and no form reads it"


def _stray_value(name: str, value, has_media: bool) -> str:
    for one in _walk(value):
        if isinstance(one, (bytes, np.ndarray)):
            return "holds bytes, and no form reads it"
        if isinstance(one, str) and re.match(r"\s*data:(image|video|audio)/", one[:40], re.IGNORECASE):
            return "holds a data URL, and no form reads it"
        if isinstance(one, str) and not has_media and len(one) < 600 and FILE.fullmatch(one):
            web = one.startswith(WEB)
            if not (web and re.search(r"(?i)(^|[_-])(url|uri|link|href|source)$", name)):  # the page of a text
                return f"names a medium ({one[:80]!r}), and no form reads it"
    return ""


def _walk(value, passed_over: Sequence[str] = ()) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            if name not in passed_over:
                yield from _walk(one, passed_over)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _walk(one, passed_over)
    else:
        yield value
