"""Forms of records, and the way from a record to an `Example` (K2.5 §3.2, §3.3).

A record has exactly one of these forms, told by the field in bold type here; other fields are ignored:

    form           record                                                      becomes the document
    text           {*text*: ".."}                                              the text
    pair           {"image": m, *text*: ".."} or {"image": m, *caption*: ".."} media, text
    video-text     the same with "video": m                                    media, text
    ocr            {"image": m, *ocr*: "what is written"}                      media, text
    grounding      {"image": m, *boxes*: [{"label": "cat", "box": b}, ..]}     media, `cat<box>1,2,3,4</box>`, ..
    screen         {"image": m, *elements*: [{"type": "button", "text": "OK",  media, `button OK<box>1,2,3,4</box>`,
                   "box": b}, ..]}                                             ..
    interleaved    {*parts*: [{"text": ".."}, {"image": m}, {"video": m}, ..]} the parts in this order
    conversation   {*messages*: [{"role": "user", "content": ".." or parts},   the chat template; only what the
                   ..], "tools": [..], "mode": ".."}                           assistant says is learnt

A medium m is a path below the source's folder, the name of a member of the record's archive, bytes or
{"bytes": .., "path": ..} in a Parquet column, or base64 in the field `image_base64` or `video_base64` instead. A box b
is [x1, y1, x2, y2] in pixels of the picture as it is seen, corners left-top and right-bottom; the text has thousandths
of its width and height. With grounding and screens, `caption` is a text before the boxes. Boxes reach at most one pixel
over the edge of the picture. A conversation may declare `tools` and have a `mode`, as in `text.chat`.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.packing import Example, make_example
from k25_jax.data.records import Record, RecordError
from k25_jax.text.chat import ChatError, Rendered, Writer, part_kind, render
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.vision.image import ImageError, load_image, preprocess
from k25_jax.vision.patchpack import Clip
from k25_jax.vision.video import VideoError, chunks, format_timestamp, load_video

MEDIA = ("image", "video")
MAX_FRAMES = 256


def prepare(record: Record, tokenizer: Tokenizer, data: DataConfig, model: K25Config) -> Example:
    """Read the record's media, tokenise its text (K2.5 §3.2); raises RecordError.

    Text has weight 1 with [BOS] before and [EOS] after it; media tokens have weight 0; of messages only what the
    assistant says has weight 1.
    """
    if isinstance(record.data, RecordError):
        raise record.data
    media = _Media(record.name, data, model)
    try:
        if form_of(record.data) == "conversation":
            messages = [_resolve_message(message, record.root) for message in _as_list(record.data, "messages")]
            tools = _as_list(record.data, "tools") if _has(record.data, "tools") else ()
            mode = record.data["mode"] if _has(record.data, "mode") else "plain"
            rendered = render(messages, tokenizer, media.load, mode=mode, tools=tools)
        else:
            rendered = _document(_parts(record, media), tokenizer, media)
    except ChatError as problem:
        raise RecordError("form", str(problem)) from None
    except ImageError as problem:
        raise RecordError("image", str(problem)) from None
    except VideoError as problem:
        raise RecordError("video", str(problem)) from None
    return make_example(rendered.tokens, rendered.weights, rendered.clips, model.media_pad_id)


def form_of(data: Mapping) -> str:
    """The form of a record, as the table names it; raises RecordError when it has none, or several."""
    given = [key for key in ("text", "caption", "ocr", "boxes", "elements", "parts", "messages") if _has(data, key)]
    media = [kind for kind in MEDIA if _has(data, kind) or _has(data, f"{kind}_base64")]
    if given in (["caption", "boxes"], ["caption", "elements"]):
        del given[0]
    shown = sorted(map(str, data))[:8]
    if len(given) != 1:
        raise RecordError("form", f"must have one form (text, caption, ocr, boxes, elements, parts, messages): {shown}")
    (key,) = given
    if key in ("parts", "messages") or (key == "text" and not media):
        if media:
            raise RecordError("form", f"media beside {key} belong into it: {shown}")
        return {"parts": "interleaved", "messages": "conversation", "text": "text"}[key]
    if len(media) != 1 or (key in ("ocr", "boxes", "elements") and media != ["image"]):
        wanted = "one of image and video" if key in ("text", "caption") else "an image"
        raise RecordError("form", f"{key} needs {wanted}: {shown}")
    names = {"ocr": "ocr", "boxes": "grounding", "elements": "screen"}
    return names.get(key, "pair" if media == ["image"] else "video-text")


def _has(data: Mapping, key: str) -> bool:
    return data.get(key) is not None


def _parts(record: Record, media: "_Media") -> Sequence:
    """The record as parts whose media were resolved."""
    form, data = form_of(record.data), record.data
    if form == "text":
        return [{"text": data["text"]}]
    if form == "interleaved":
        return [_resolve(part, record.root) for part in _as_list(data, "parts")]
    medium = resolve_media({key: data[key] for kind in MEDIA for key in (kind, f"{kind}_base64") if _has(data, key)},
                           record.root)  # fmt: skip
    if form in ("grounding", "screen"):
        rgb = media.pixels(medium)
        return [{"image": rgb}, *_caption(data), {"text": _boxes(data, form, *rgb.shape[:2])}]
    key = next(key for key in ("text", "caption", "ocr") if _has(data, key))
    return [medium, {"text": data[key]}]


def _document(parts: Sequence[Mapping], tokenizer: Tokenizer, media: "_Media") -> Rendered:
    kinds = [part_kind(part, f"parts[{index}]") for index, part in enumerate(parts)]
    if not any(kind == "text" and part["text"].strip() for kind, part in zip(kinds, parts, strict=True)):
        raise RecordError("empty", "holds no text")
    writer = Writer(tokenizer)
    writer.special("[BOS]", 1.0)
    for kind, part in zip(kinds, parts, strict=True):
        if kind == "text":
            writer.text(part["text"], 1.0)
        else:
            writer.media(part, kind, media.load)
    writer.special("[EOS]", 1.0)
    return writer.rendered


def _as_list(record: Mapping, form: str) -> Sequence:
    if not isinstance(record[form], (list, tuple)):
        raise RecordError("form", f"{form} must be a list, not {type(record[form]).__name__}")
    return record[form]


# ---------------------------------------------------------------------------------------------------------------- boxes
def _caption(data: Mapping) -> list[dict]:
    if not _has(data, "caption"):
        return []
    if not isinstance(data["caption"], str):
        raise RecordError("form", f"caption must be a string, not {type(data['caption']).__name__}")
    return [{"text": f"{data['caption']}\n"}]


def _boxes(data: Mapping, form: str, height: int, width: int) -> str:
    """One line for each box."""
    key = "boxes" if form == "grounding" else "elements"
    lines = []
    for index, entry in enumerate(_as_list(data, key)):
        where = f"{key}[{index}]"
        if not isinstance(entry, Mapping):
            raise RecordError("form", f"{where} must be a mapping, not {type(entry).__name__}")
        name = _label(entry, "label" if form == "grounding" else "type", where)
        if form == "screen" and entry.get("text"):
            name += f" {_label(entry, 'text', where)}"
        lines.append(f"{name}{box_text(entry.get('box'), height, width, where)}")
    if not lines:
        raise RecordError("empty", f"{key} is an empty list")
    return "\n".join(lines)


def _label(entry: Mapping, key: str, where: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        raise RecordError("form", f"{where}.{key} must be a text, not {str(text)[:40]!r}")
    if "<box>" in text or "</box>" in text:
        raise RecordError("box", f"{where}.{key} holds the marks of a box: {text[:40]!r}")
    return " ".join(text.split())


def box_text(box, height: int, width: int, where: str = "box") -> str:
    """`<box>x1,y1,x2,y2</box>` in thousandths, of a box in pixels of a picture of this size; raises RecordError."""
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4:
        raise RecordError("box", f"{where} must be [x1, y1, x2, y2], not {str(box)[:60]}")
    numbers = [float(v) for v in box if isinstance(v, (int, float, np.number)) and not isinstance(v, bool)
               and abs(v) < 1e9]  # fmt: skip
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise RecordError("box", f"{where} must have four finite numbers, not {str(list(box))[:60]}")
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise RecordError("box", f"{where} is empty or inverted: {numbers}; write left, top, right, bottom")
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise RecordError("box", f"{where} lies outside the picture of {width} x {height} pixels: {numbers}")
    shares = (x1 / width, y1 / height, x2 / width, y2 / height)
    return "<box>{},{},{},{}</box>".format(*(round(1000 * min(1.0, max(0.0, share))) for share in shares))


# ---------------------------------------------------------------------------------------------------------------- media
def _resolve_message(message, root: Path | Mapping | None):
    if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
        return {**message, "content": [_resolve(part, root) for part in message["content"]]}
    return message


def _resolve(part, root: Path | Mapping | None):
    return resolve_media(part, root) if isinstance(part, Mapping) else part


def resolve_media(part: Mapping, root: Path | Mapping | None) -> dict:
    """A part whose media is a path that was checked, or bytes; anything odd is left for `part_kind` to name."""
    part = dict(part)
    for kind in MEDIA:
        coded, value = part.pop(f"{kind}_base64", None), part.get(kind)
        if coded is not None:
            try:
                part[kind] = base64.b64decode(coded, validate=True)
            except (ValueError, TypeError) as problem:
                raise RecordError("base64", f"{kind}_base64 is not base64 ({problem})") from None
        elif isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            part[kind] = value["bytes"]
        elif isinstance(value, Mapping) and isinstance(value.get("path"), str):
            part[kind] = _find(root, value["path"])
        elif isinstance(value, str):
            part[kind] = _find(root, value)
    return part


def _find(root: Path | Mapping | None, path: str) -> Path | bytes:
    """The file below a folder, or the bytes in an archive, that a record names."""
    if root is None:
        raise RecordError("path", f"{path[:200]!r}: this source has no folder for media; give base64")
    if isinstance(root, Path):
        return _inside(root, path)
    if path not in root:
        raise RecordError("missing", f"{path[:200]!r}: no such member beside the record ({', '.join(root)[:200]})")
    return root[path]


def _inside(root: Path, path: str) -> Path:
    """A file below `root`. Paths in records come from anywhere: links and `..` must not lead out of the folder."""
    shown = repr(path[:200])
    try:
        file = (root / path).resolve()
        inside, exists = file.is_relative_to(root.resolve()), file.is_file()
    except (OSError, ValueError, RuntimeError) as problem:
        raise RecordError("path", f"{shown} is not a path ({problem})") from None
    if not inside:
        raise RecordError("path", f"{shown} leads out of {root}; move the file into the folder")
    if not exists:
        raise RecordError("missing", f"{shown}: no such file in {root}")
    return file


class _Media:
    """Reads the images and videos of one record, small enough for the packs."""

    def __init__(self, name: str, data: DataConfig, model: K25Config):
        self._name, self._data, self._vision = name, data, model.vision

    def load(self, part: Mapping) -> list[tuple[str | None, Clip]]:
        """The clips of a part, each with its time as text."""
        self._check_packs()
        kind = "image" if "image" in part else "video"
        source = part[kind]
        return self._image(source) if kind == "image" else self._video(source, self._title(source))

    def pixels(self, part: Mapping) -> np.ndarray:
        """The picture of a part as it is seen: uint8 RGB [h, w, 3]."""
        self._check_packs()
        part_kind(part, "image")
        source = part["image"]
        return source if isinstance(source, np.ndarray) else load_image(source, name=self._title(source))

    def _check_packs(self):
        if not self._data.packs:
            raise RecordError("media", "holds media, but data.packs is 0 (text only)")

    def _title(self, source: Path | bytes | np.ndarray) -> str:
        return f"{self._name}: {source}" if isinstance(source, Path) else self._name

    def _image(self, source: Path | bytes | np.ndarray) -> list[tuple[None, Clip]]:
        rgb, name = self.pixels({"image": source}), self._title(source)
        limit = self._data.pack_patches
        budget = min(self._data.max_image_patches, limit)
        return _shrink(lambda budget: [(None, preprocess(rgb, self._vision, budget, name))], budget, limit)

    def _video(self, source: Path | bytes | np.ndarray, name: str) -> list[tuple[str, Clip]]:
        frames_a_clip, data = self._vision.pos_time, self._data
        budget = max(1, min(data.max_frame_patches, data.pack_patches // frames_a_clip))
        clips_a_pack = max(1, data.pack_patches // (budget * frames_a_clip))
        max_frames = min(MAX_FRAMES, data.packs * clips_a_pack * frames_a_clip)

        def read(max_patches: int) -> list[tuple[str, Clip]]:
            frames, times = load_video(source, data.video_fps, max_frames, max_patches, self._vision, name=name)
            return [(format_timestamp(time), clip) for time, clip in chunks(frames, times, self._vision, name)]

        return _shrink(read, budget, budget)


def _shrink(read: Callable[[int], list], budget: int, limit: int) -> list[tuple[str | None, Clip]]:
    """Clips read with `budget` patches a frame, or with less until the padded frames have at most `limit`."""
    while True:
        clips = read(budget)
        excess = max(len(clip.patches) // clip.grid[0] for _, clip in clips) - limit
        if excess <= 0 or budget == 1:
            return clips
        budget = max(1, budget - excess)
