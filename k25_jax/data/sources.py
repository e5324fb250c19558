"""Sources of records, and the way from a record to an `Example` (K2.5 §3.3).

A record is a mapping of one of these forms; a media value is a path, or base64 in `image_base64` / `video_base64`:

    {"text": "..."}
    {"parts": [{"text": "..."}, {"image": "cat.png"}, {"video": "dog.mp4"}]}
    {"messages": [{"role": "user", "content": "..." or a list of parts}, ..]}

Two ways of failing: a record that cannot be used is a `RecordError`, which the pipeline skips, counts and logs; a
source that cannot be read raises `DataError`, which stops the run.
"""

import base64
import collections
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from k25_jax.config import DataConfig, K25Config, SourceConfig
from k25_jax.data.packing import Example, make_example
from k25_jax.text.chat import ChatError, Rendered, Writer, part_kind, render
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.vision.image import ImageError, load_image, preprocess
from k25_jax.vision.patchpack import Clip
from k25_jax.vision.video import VideoError, chunks, format_timestamp, load_video

logger = logging.getLogger(__name__)

FORMS = ("text", "parts", "messages")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
TEXTS = (".txt", ".md", ".py")
ARRAY_RECORD = (".array_record", ".arrayrecord")
MAX_RECORD_BYTES = 2**28
MAX_FRAMES = 256


class DataError(ValueError):
    """A source that cannot be used; the message names the path and the remedy."""


class RecordError(ValueError):
    """One record that cannot be used. `reason` is the word that it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail if len(detail) <= 500 else f"{detail[:500]}...")
        self.reason = reason


class Record(NamedTuple):
    """What a source yields: a name for the log, the data or what is wrong with it, and the folder its paths stay in."""

    name: str
    data: Mapping | RecordError
    root: Path | None = None


# -------------------------------------------------------------------------------------------------------------- sources
class Source:
    """Random access for Grain. `source[i]` raises DataError when the source fails, and never for a bad record."""

    modality = ""  # text or vision, where the source itself knows

    def __init__(self):
        self.left_out: collections.Counter[str] = collections.Counter()  # files that gave no record, by reason

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        try:
            data = self.read(int(index))
        except RecordError as problem:
            data = problem
        return Record(self.label(int(index)), data, self.root(int(index)))

    def read(self, index: int) -> Mapping:
        """The record; raises RecordError."""
        raise NotImplementedError

    def label(self, index: int) -> str:
        """What the log calls the record."""
        raise NotImplementedError

    def root(self, index: int) -> Path | None:
        """The folder that media paths in the record start from and must stay in; None: it may hold no path."""
        return None


def open_source(config: SourceConfig) -> Source:
    """Open a source; raises DataError when its path is missing or it holds no record."""
    path, kind = config.path, config.kind
    if kind == "auto":
        kind = _guess_kind(path)
    if kind in ("folder", "jsonl") and not Path(path).exists():
        raise DataError(f"data.sources: there is nothing at {path}; check the path")
    try:
        source = {"folder": Folder, "jsonl": Jsonl, "arrayrecord": ArrayRecords, "task": Task}[kind](path)
    except OSError as problem:
        raise DataError(f"data.sources: {path} cannot be read ({problem}); check its permissions") from problem
    if not len(source):
        raise DataError(f"data.sources: {path} holds no record ({kind}; left out: {dict(source.left_out)}); remove it")
    logger.info("%s: %d records (%s), left out: %s", path, len(source), kind, dict(source.left_out))
    return source


def _guess_kind(path: str) -> str:
    file = Path(path)
    if file.is_dir():
        return "arrayrecord" if _shards(path) else "folder"
    if any(suffix in file.name for suffix in ARRAY_RECORD):
        return "arrayrecord"
    if file.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if not file.exists() and re.fullmatch(r"\w+(:[\w.=+-]+)+", path):
        return "task"
    if not file.exists():
        raise DataError(f"data.sources: there is nothing at {path}; check the path")
    raise DataError(
        f"data.sources: cannot tell what {path} is; set kind to folder, jsonl, arrayrecord or task, or rename it to "
        ".jsonl or .array_record"
    )


class Folder(Source):
    """All files below a folder, in order of their names: texts; images and videos with a caption beside them.

    The caption of `cat.png` is `cat.txt`, or `cat.json` with "caption" or "text", or with a whole record in it.
    """

    def __init__(self, path: str):
        super().__init__()
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise DataError(f"data.sources: {path} is not a folder; set kind to what it is")
        self._files: list[tuple[Path, Path | None]] = []  # file, caption
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self._collect(Path(folder), sorted(name for name in names if not name.startswith(".")))

    def _collect(self, folder: Path, names: list[str]):
        captions = set()
        for name in names:
            file = folder / name
            if file.suffix.lower() in IMAGES + VIDEOS:
                caption = next((s for s in (".json", ".txt") if f"{file.stem}{s}" in names), None)
                if caption is None:
                    self.left_out["no caption"] += 1
                    if self.left_out["no caption"] <= 20:
                        logger.warning("%s: left out, no caption in %s.txt or .json", file, file.stem)
                else:
                    captions |= {f"{file.stem}.json", f"{file.stem}.txt"}
                    self._files.append((file, folder / f"{file.stem}{caption}"))
        texts = [name for name in names if Path(name).suffix.lower() in TEXTS and name not in captions]
        self._files += [(folder / name, None) for name in texts]

    def __len__(self) -> int:
        return len(self._files)

    def label(self, index: int) -> str:
        return str(self._files[index][0])

    def read(self, index: int) -> Mapping:
        file, caption = self._files[index]
        if caption is None:
            return {"text": _read_text(file)}
        kind = "image" if file.suffix.lower() in IMAGES else "video"
        text = _read_text(caption)
        if caption.suffix == ".json":
            record = parse_record(text.encode())
            text = record.get("caption", record.get("text"))
            if text is None:
                return record
        return {"parts": [{kind: file}, {"text": text}]}

    def root(self, index: int) -> Path:
        return self._files[index][0].parent


class Jsonl(Source):
    """One JSON record a line. Only the offsets of the lines are held; media paths are relative to the file's folder."""

    def __init__(self, path: str):
        super().__init__()
        self._path = Path(path)
        if not self._path.is_file():
            raise DataError(f"data.sources: {path} is not a file; set kind to what it is")
        self._file = open(path, "rb")
        self._bounds = _line_bounds(self._file.fileno())  # line k is [bounds[k], bounds[k + 1] - 1)
        self._kept = np.flatnonzero(np.diff(self._bounds) > 2)  # a record has at least two bytes

    def __len__(self) -> int:
        return len(self._kept)

    def label(self, index: int) -> str:
        return f"{self._path}:{self._kept[index] + 1}"

    def read(self, index: int) -> Mapping:
        line = self._kept[index]
        start, size = int(self._bounds[line]), int(self._bounds[line + 1] - 1 - self._bounds[line])
        if size > MAX_RECORD_BYTES:
            raise RecordError("too large", f"{size} bytes exceed {MAX_RECORD_BYTES}")
        try:
            return parse_record(os.pread(self._file.fileno(), size, start))
        except OSError as problem:
            raise DataError(
                f"data.sources: {self._path} can no longer be read ({problem}); check the disk"
            ) from problem

    def root(self, index: int) -> Path:
        return self._path.parent


class ArrayRecords(Source):
    """ArrayRecord shards (a file, a folder or a pattern) whose records are JSON, with media in base64 or as paths."""

    def __init__(self, path: str):
        super().__init__()
        shards = _shards(path)
        if not shards:
            raise DataError(
                f"data.sources: there is no file *{ARRAY_RECORD[0]}* at {path}; check the path and the kind"
            )
        self._path, self._folder = path, Path(shards[0]).parent
        try:
            self._records = ArrayRecordDataSource(shards)
        except (RuntimeError, ValueError, IndexError) as problem:
            raise DataError(f"data.sources: {path}: a shard is damaged ({problem}); write it again") from problem

    def __len__(self) -> int:
        return len(self._records)

    def label(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def read(self, index: int) -> Mapping:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, IndexError) as problem:
            raise RecordError("array record", f"its bytes are damaged ({problem})") from problem
        return parse_record(record)

    def root(self, index: int) -> Path:
        return self._folder


class Task(Source):
    """A rendered task of `data.tasks`, by a spec such as "digits:train"."""

    def __init__(self, spec: str):
        super().__init__()
        from k25_jax.data.tasks import make_task  # a task may be slow to import, and imports this package's records

        self._spec, self._task = spec, make_task(spec)
        self.modality = getattr(self._task, "modality", "")

    def __len__(self) -> int:
        return len(self._task)

    def label(self, index: int) -> str:
        return f"{self._spec}[{index}]"

    def read(self, index: int) -> Mapping:
        return self._task.record(index)


def _shards(path: str) -> list[str]:
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        return [os.path.join(path, name) for name in names if any(suffix in name for suffix in ARRAY_RECORD)]
    return [path] if os.path.isfile(path) else sorted(glob.glob(path))


def _line_bounds(descriptor: int) -> np.ndarray:
    """int64: where each line starts, and one past the newline that the last line ends with or lacks."""
    size, block = os.fstat(descriptor).st_size, 2**24
    breaks = [
        offset + 1 + np.flatnonzero(np.frombuffer(os.pread(descriptor, block, offset), np.uint8) == 10)
        for offset in range(0, size, block)
    ]
    return np.concatenate([[0], *breaks, [size + 1]]).astype(np.int64)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise RecordError("too large", f"{path}: more than {MAX_RECORD_BYTES} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise RecordError("file", f"{path}: cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError as problem:
        raise RecordError("utf-8", f"{path}: is not UTF-8 ({problem})") from None


def parse_record(line: bytes) -> Mapping:
    """JSON bytes to a mapping; raises RecordError."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise RecordError("utf-8", f"is not UTF-8 ({problem})") from None
    except (ValueError, RecursionError) as problem:
        raise RecordError("json", f"is not JSON ({problem})") from None
    if not isinstance(record, dict):
        raise RecordError("form", f"must be a JSON object, not {type(record).__name__}")
    return record


# -------------------------------------------------------------------------------------------------- record to example
def prepare(record: Record, tokenizer: Tokenizer, data: DataConfig, model: K25Config) -> Example:
    """Read the record's media, tokenise its text (K2.5 §3.2); raises RecordError.

    Text has weight 1 with [BOS] before and [EOS] after it; media tokens have weight 0; of messages only what the
    assistant says has weight 1.
    """
    if isinstance(record.data, RecordError):
        raise record.data
    forms = [form for form in FORMS if record.data.get(form) is not None]
    if len(forms) != 1:
        raise RecordError("form", f"must have one of {', '.join(FORMS)}, not {sorted(map(str, record.data))[:8]}")
    media = _Media(record.name, data, model)
    try:
        if forms[0] == "messages":
            messages = [_resolve_message(message, record.root) for message in _as_list(record.data, "messages")]
            rendered = render(messages, tokenizer, media.load)
        else:
            text = [{"text": record.data["text"]}] if forms[0] == "text" else _as_list(record.data, "parts")
            rendered = _document([_resolve(part, record.root) for part in text], tokenizer, media)
    except ChatError as problem:
        raise RecordError("form", str(problem)) from None
    except ImageError as problem:
        raise RecordError("image", str(problem)) from None
    except VideoError as problem:
        raise RecordError("video", str(problem)) from None
    return make_example(rendered.tokens, rendered.weights, rendered.clips, model.media_pad_id)


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


def _resolve_message(message, root: Path | None):
    if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
        return {**message, "content": [_resolve(part, root) for part in message["content"]]}
    return message


def _resolve(part, root: Path | None):
    """A part whose media is a path that was checked, or bytes; anything odd is left for `part_kind` to name."""
    if not isinstance(part, Mapping):
        return part
    for kind in ("image", "video"):
        coded = part.get(f"{kind}_base64")
        if coded is not None:
            try:
                part = {**part, kind: base64.b64decode(coded, validate=True)}
            except (ValueError, TypeError) as problem:
                raise RecordError("base64", f"{kind}_base64 is not base64 ({problem})") from None
        elif isinstance(part.get(kind), str):
            part = {**part, kind: _inside(root, part[kind])}
    return part


def _inside(root: Path | None, path: str) -> Path:
    """A file below `root`. Paths in records come from anywhere: links and `..` must not lead out of the folder."""
    shown = repr(path[:200])
    if root is None:
        raise RecordError("path", f"{shown}: this source has no folder for media; give base64")
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
        if not self._data.packs:
            raise RecordError("media", "holds media, but data.packs is 0 (text only)")
        kind = "image" if "image" in part else "video"
        source = part[kind]
        name = f"{self._name}: {source}" if isinstance(source, Path) else self._name
        if kind == "video" and isinstance(source, np.ndarray):
            raise RecordError("video", "is an array; give frames as images, or a file")
        return self._image(source, name) if kind == "image" else self._video(source, name)

    def _image(self, source: Path | bytes | np.ndarray, name: str) -> list[tuple[None, Clip]]:
        rgb = source if isinstance(source, np.ndarray) else load_image(source, name=name)
        limit = self._data.pack_patches
        budget = min(self._data.max_image_patches, limit)
        return _shrink(lambda budget: [(None, preprocess(rgb, self._vision, budget, name))], budget, limit)

    def _video(self, source: Path | bytes, name: str) -> list[tuple[str, Clip]]:
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
