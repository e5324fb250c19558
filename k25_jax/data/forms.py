"""Forms of records, and the way from a record to an `Example` (K2.5 §3.2, §3.3).

A record has exactly one of these forms, told by the field in bold type here; `data.examples` has one of each:

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
{"bytes": .., "path": ..} in a Parquet column, a data URL, or base64 in the field `image_base64` or `video_base64` instead.
A box b is [x1, y1, x2, y2] in pixels of the picture as it is seen, corners left-top and right-bottom; the text has
thousandths of its width and height. With grounding and screens, `caption` is a text before the boxes. Boxes reach at most
one pixel over the edge of the picture. A conversation may declare `tools` and have a `mode`, as in `text.chat`; its turns,
and any record, may have a `weight` in the loss. `data.normalise` says what other spellings are read. A field that no form
has is kept and not read, unless it is named as media are or holds some: then the record is bad.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.attach import MEDIUM_FIELDS, as_list
from k25_jax.data.media import MEDIA, MediaReader, resolve_media
from k25_jax.data.normalise import FORM_FIELDS, canonical
from k25_jax.data.packing import Example, make_example
from k25_jax.data.records import Record, RecordError
from k25_jax.text.chat import ChatError, Rendered, Writer, check_weight, part_kind, render
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.vision.image import ImageError
from k25_jax.vision.video import VideoError


def prepare(record: Record, tokenizer: Tokenizer, data: DataConfig, model: K25Config) -> Example:
    """Read the record's media, tokenise its text (K2.5 §3.2); raises RecordError.

    Text has weight 1 with [BOS] before and [EOS] after it; media tokens have weight 0; of messages only what the
    assistant says has weight 1, or the turn's own; a record's weight multiplies all of them.
    """
    record = canonical(record)
    media = MediaReader(record.name, data, model)
    try:
        weight = check_weight(record.data.get("weight", 1), "weight")
        if form_of(record.data) == "conversation":
            rendered = _conversation(record, tokenizer, media)
        else:
            rendered = _document(_parts(record, media), tokenizer, media)
    except ChatError as problem:
        raise RecordError("form", str(problem)) from None
    except (ImageError, VideoError) as problem:
        reason = "image" if isinstance(problem, ImageError) else "video"
        raise RecordError(reason, str(problem).removeprefix(f"{record.name}: ")) from None
    weights = [weight * one for one in rendered.weights]
    example = make_example(rendered.tokens, weights, rendered.clips, model.media_pad_id)
    _check_learnt(example, tokenizer)
    return example


def unforeseen(problem: Exception) -> RecordError:
    """What a library raised over a damaged record, as one of reason unknown; a fault of our own code is raised again."""
    last = problem.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    ours = last is not None and last.tb_frame.f_globals.get("__name__", "").startswith("k25_jax.")
    if ours and isinstance(problem, (TypeError, AttributeError, NameError)):
        raise problem
    return RecordError("unknown", f"{type(problem).__name__}: {problem}")


def form_of(data: Mapping) -> str:
    """The form of a record, as the table names it; raises RecordError when it has none, or several."""
    given = [key for key in FORM_FIELDS if _has(data, key)]
    media = [kind for kind in MEDIA if _has(data, kind) or _has(data, f"{kind}_base64")]
    if given in (["caption", "boxes"], ["caption", "elements"]):
        del given[0]
    shown = sorted(map(str, data))[:8]
    if len(given) != 1:
        raise RecordError("form", f"must have one form ({', '.join(FORM_FIELDS)}; see k25 data --help): {shown}")
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


def _conversation(record: Record, tokenizer: Tokenizer, media: MediaReader) -> Rendered:
    data = record.data
    messages = [_resolve_message(message, record.root) for message in as_list(data, "messages")]
    tools = as_list(data, "tools") if _has(data, "tools") else ()
    return render(messages, tokenizer, media.load, mode=data.get("mode", "plain"), tools=tools)


def _resolve_message(message, root: Path | Mapping | None):
    if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
        return {**message, "content": [_resolve(part, root) for part in message["content"]]}
    return message


def _resolve(part, root: Path | Mapping | None):
    return resolve_media(part, root) if isinstance(part, Mapping) else part


def _parts(record: Record, media: MediaReader) -> Sequence:
    """The record as parts whose media were resolved."""
    form, data = form_of(record.data), record.data
    if form == "text":
        return [{"text": data["text"]}]
    if form == "interleaved":
        return [_resolve(part, record.root) for part in as_list(data, "parts")]
    medium = resolve_media({key: data[key] for key in MEDIUM_FIELDS if _has(data, key)}, record.root)
    if form in ("grounding", "screen"):
        rgb = media.pixels(medium)
        return [{"image": rgb}, *_caption(data), {"text": _boxes(data, form, *rgb.shape[:2])}]
    key = next(key for key in ("text", "caption", "ocr") if _has(data, key))
    return [medium, {"text": data[key]}]


def _check_learnt(example: Example, tokenizer: Tokenizer):
    """Raise RecordError where no text has a weight: the one rule for training, `build`, `inspect` and `check`."""
    learnt = example.tokens[1:][example.loss_weights[1:] > 0]
    learnt = learnt[~np.isin(learnt, list(tokenizer.special.values()))]
    if not (tokenizer.decode(learnt[:64]).strip() or tokenizer.decode(learnt).strip()):
        raise RecordError("empty", "holds no text to learn: no turn of the assistant, no text, or all weights are 0")


def _document(parts: Sequence[Mapping], tokenizer: Tokenizer, media: MediaReader) -> Rendered:
    kinds = [part_kind(part, f"parts[{index}]") for index, part in enumerate(parts)]
    writer = Writer(tokenizer)
    writer.special("[BOS]", 1.0)
    for kind, part in zip(kinds, parts, strict=True):
        if kind == "text":
            writer.text(part["text"], 1.0)
        else:
            writer.media(part, kind, media.load)
    writer.special("[EOS]", 1.0)
    return writer.rendered


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
    for index, entry in enumerate(as_list(data, key)):
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
