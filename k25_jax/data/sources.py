"""Kinds of sources: a folder, JSONL, ArrayRecord, Parquet, WebDataset tar, and rendered tasks (K2.5 §3.3).

What their records look like is in `data.forms`.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from k25_jax.config import SourceConfig
from k25_jax.data.archives import (
    IMAGES,
    VIDEOS,
    ParquetTables,
    TarFiles,
    archive_files,
    with_medium,
)  # fmt: skip
from k25_jax.data.records import MAX_RECORD_BYTES, DataError, RecordError, Source, parse_record, read_text

logger = logging.getLogger(__name__)

TEXTS = (".txt", ".md", ".py")
ARRAY_RECORD = (".array_record", ".arrayrecord")
MANIFEST = "manifest.json"  # `k25 data build` writes it beside its shards


def open_source(config: SourceConfig) -> Source:
    """Open a source; raises DataError when its path is missing or it holds no record."""
    path, kind = config.path, config.kind
    if kind == "auto":
        kind = _guess_kind(path)
    if kind in ("folder", "jsonl") and not Path(path).exists():
        raise DataError(f"data.sources: there is nothing at {path}; check the path")
    kinds = {"folder": Folder, "jsonl": Jsonl, "parquet": ParquetTables, "webdataset": TarFiles, "task": Task}
    try:
        source = (kinds | {"arrayrecord": ArrayRecords})[kind](path)
    except OSError as problem:
        raise DataError(f"data.sources: {path} cannot be read ({problem}); check its permissions") from problem
    if not len(source):
        raise DataError(f"data.sources: {path} holds no record ({kind}; left out: {dict(source.left_out)}); remove it")
    logger.info("%s: %d records (%s), left out: %s", path, len(source), kind, dict(source.left_out))
    return source


def _guess_kind(path: str) -> str:
    file = Path(path)
    if file.is_dir():
        if _shards(path):
            return "arrayrecord"
        if archive_files(path, ParquetTables.suffixes):
            return "parquet"
        return "webdataset" if archive_files(path, TarFiles.suffixes) else "folder"
    name = file.name.lower()
    if any(suffix in name for suffix in ARRAY_RECORD):
        return "arrayrecord"
    for kind, suffixes in (
        ("jsonl", (".jsonl", ".ndjson")),
        ("parquet", ParquetTables.suffixes),
        ("webdataset", (*TarFiles.suffixes, ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")),
    ):
        if name.endswith(suffixes):
            return kind
    if not file.exists() and re.fullmatch(r"\w+(:[\w.=+,-]+)+", path):
        return "task"
    if not file.exists():
        raise DataError(f"data.sources: there is nothing at {path}; check the path")
    raise DataError(
        f"data.sources: cannot tell what {path} is; set kind to folder, jsonl, parquet, webdataset, arrayrecord or task, "
        "or rename it to .jsonl, .parquet, .tar or .array_record"
    )


class Folder(Source):
    """All files below a folder, in order of their names: texts; images and videos with a caption beside them.

    The caption of `cat.png` is `cat.txt`, or `cat.json` with the rest of a record such as "caption", "ocr" or "boxes",
    or with a whole record. Links to files are followed; paths within records do not lead out of the folder.
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
            return {"text": read_text(file)}
        kind = "image" if file.suffix.lower() in IMAGES else "video"
        text = read_text(caption)
        return with_medium(parse_record(text.encode()) if caption.suffix == ".json" else {"text": text}, kind, file)

    def root(self, index: int) -> Path:
        return self._files[index][0].parent

    def files(self) -> list[Path]:
        return [file for pair in self._files for file in pair if file is not None]


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

    def files(self) -> list[Path]:
        return [self._path]


class ArrayRecords(Source):
    """ArrayRecord shards (a file, a folder or a pattern) whose records are JSON, with media in base64 or as paths."""

    def __init__(self, path: str):
        super().__init__()
        shards = _shards(path)
        if not shards:
            raise DataError(
                f"data.sources: there is no file *{ARRAY_RECORD[0]}* at {path}; check the path and the kind"
            )
        self._path, self._shards, self._folder = path, shards, Path(shards[0]).parent
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
            raise RecordError("archive", f"its bytes are damaged ({problem})") from problem
        return parse_record(record)

    def root(self, index: int) -> Path:
        return self._folder

    def files(self) -> list[Path]:
        return [Path(shard) for shard in self._shards]

    @property
    def modality(self) -> str:
        """As the manifest beside the shards has it."""
        try:
            manifest = json.loads((self._folder / MANIFEST).read_bytes())
        except (OSError, ValueError, RecursionError):
            return ""
        found = manifest.get("modality") if isinstance(manifest, dict) else None
        return found if found in ("text", "vision") else ""


class Task(Source):
    """A rendered task of `data.tasks`, by a spec such as "digits:train"."""

    def __init__(self, spec: str):
        super().__init__()
        from k25_jax.data.tasks import make_task  # a task may be slow to import, and imports this package

        self._spec, self._task = spec, make_task(spec)

    @property
    def modality(self) -> str:
        return self._task.modality

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
