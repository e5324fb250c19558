"""Kinds of sources: a folder, JSON, ArrayRecord, Parquet, WebDataset tar, and rendered tasks (K2.5 §3.3).

What their records look like is in `data.forms`.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Mapping

from array_record.python.array_record_data_source import ArrayRecordDataSource

from k25_jax.config import SourceConfig
from k25_jax.data.archives import archive_files, check_file
from k25_jax.data.captions import (
    CAPTIONS,
    OTHER_MEDIA,
    TEXTS,
    captions_of,
    ending,
    is_system_file,
    medium_kind,
    printable,
)
from k25_jax.data.folder import Folder
from k25_jax.data.jsonl import METADATA, ImageFolder, Json, Jsonl, metadata_files
from k25_jax.data.parquet import ParquetTables
from k25_jax.data.records import DataError, RecordError, Source, parse_record
from k25_jax.data.tar import TarFiles
from k25_jax.runtime.paths import AnyPath, PathError, check_reachable, copies, is_remote, lexists, names, to_path, walk

logger = logging.getLogger(__name__)

ARRAY_RECORD = (".array_record", ".arrayrecord")
MANIFEST = "manifest.json"  # `k25 data build` writes it beside its shards
PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4")
ADVICE = {  # endings of files that are not read -> what to do
    PACKED: "it is compressed, which allows no random access; decompress it",
    (".zip", ".7z", ".rar"): "unpack it, and give the folder",
    (
        ".csv",
        ".tsv",
        ".xlsx",
        ".xls",
        ".ods",
    ): "write it as JSONL or Parquet (pandas: to_json(.., orient='records', lines=True))",
    (".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".tfrecord"): "write it as Parquet or JSONL",
    (".pdf", ".docx", ".doc", ".html", ".htm", ".epub", ".rtf"): "write its text to a .txt file",
    OTHER_MEDIA: "convert it to PNG, JPEG, WebP or MP4",
}
READ = ("a folder of texts or of pictures and videos with captions, a text (.txt, .md, .py), a picture or video with its "
        "caption beside it, .jsonl, .json, .parquet, .tar, .array_record, a pattern of these, or a task such as digits:train"
)  # fmt: skip


def open_source(config: SourceConfig) -> Source:
    """Open a source; raises DataError when its path is missing or it holds no record."""
    path, kind = config.path, config.kind
    try:
        check_reachable(to_path(path, "data.sources"), "data.sources")
    except PathError as problem:
        raise DataError(str(problem)) from problem
    if kind == "auto":
        kind = _guess_kind(path)
    if kind in ("folder", "jsonl") and not glob.has_magic(path) and not to_path(path, "data.sources").exists():
        raise DataError(f"data.sources: there is nothing at {path}; check the path")
    try:
        source = KINDS[kind](path)
    except OSError as problem:
        raise DataError(f"data.sources: {path} cannot be read ({problem}); check its permissions") from problem
    left_out = ", ".join(f"{count} x {reason}" for reason, count in sorted(source.left_out.items()))
    left_out = f"left out: {left_out}" if left_out else "nothing was left out"
    if not len(source):
        raise DataError(f"data.sources: {path} holds no record ({left_out}); {_remedy(path, kind)}")
    logger.info("%s: %d records (%s), %s", path, len(source), kind, left_out)
    return source


def _remedy(path: str, kind: str) -> str:
    if kind != "folder":
        return "give a source that has some"
    place = to_path(path)
    for folder, _, files in walk(place):
        for name in sorted(files):
            if _kind_of_file(name) not in ("", "folder") and not is_system_file(name):
                file = folder / name
                pattern = os.path.join(path, "**", f"*{file.suffix}") if folder != place else os.path.join(path, name)
                return f"to read {name} and the like, give {pattern}"
    return "a picture or video needs its caption beside it, in cat.txt or cat.json for cat.png"


def _guess_kind(path: str) -> str:
    file = to_path(path, "data.sources")
    if file.is_dir():
        return _kind_of_folder(file)
    kind = _kind_of_file(file.name)
    if kind and not (kind == "folder" and glob.has_magic(path) and not file.exists()):
        return kind
    if not lexists(file):
        if re.fullmatch(r"\w+(:[\w.=+,-]+)+", path):
            return "task"
        kinds = {_kind_of_file(found.name) for found in archive_files(path, ())} - {"folder"}
        if len(kinds) == 1 and "" not in kinds:
            return kinds.pop()
        what = "give a pattern of one kind of files" if kinds else "check the path"
        raise DataError(f"data.sources: there is nothing at {path} that can be read; {what}")
    if not file.is_file():
        raise DataError(f"data.sources: {path} is no regular file, and cannot be read twice; write its records to one")
    advice = next((advice for endings, advice in ADVICE.items() if file.name.lower().endswith(endings)), f"give {READ}")
    raise DataError(f"data.sources: cannot tell what {path} is: {advice}")


def _kind_of_folder(folder: AnyPath) -> str:
    found = [name for name in names(folder) if not is_system_file(name)]
    if _shards(str(folder)):
        return "arrayrecord"
    for kind in ("parquet", "webdataset"):
        if any(name.lower().endswith(KINDS[kind].suffixes) for name in found):
            return kind
    if metadata_files(folder):
        return "imagefolder"
    media, captions = (
        [name for name in found if medium_kind(name)],
        [name for name in found if ending(name) in CAPTIONS],
    )
    has_shards = any(name.lower().endswith(Jsonl.suffixes) for name in found)
    return "jsonl" if has_shards and not captions_of(media, captions) else "folder"


def _kind_of_file(name: str) -> str:
    """The kind of a file by its name, which may be a pattern; "" when it has none."""
    name = name.lower()
    if any(suffix in name for suffix in ARRAY_RECORD):
        return "arrayrecord"
    if name == METADATA:
        return "imagefolder"
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return "webdataset"
    for kind in ("jsonl", "json", "parquet", "webdataset"):
        if name.endswith(KINDS[kind].suffixes):
            return kind
    return "folder" if medium_kind(name) or ending(name) in TEXTS else ""


class ArrayRecords(Source):
    """ArrayRecord shards (a file, a folder or a pattern) whose records are JSON, with media in base64 or as paths."""

    def __init__(self, path: str):
        super().__init__()
        shards = _shards(path)
        if not shards:
            raise DataError(
                f"data.sources: there is no file *{ARRAY_RECORD[0]}* at {path}; check the path and the kind"
            )
        for shard in shards:
            check_file(shard, to_path(path))
        self._path, self._shards, self._folder = path, shards, shards[0].parent
        read = copies(shards, f"data.sources={path}") if is_remote(shards[0]) else shards
        try:
            self._records = ArrayRecordDataSource([str(shard) for shard in read])
        except (RuntimeError, ValueError, IndexError) as problem:
            raise DataError(f"data.sources: {path}: a shard is damaged ({problem}); write it again") from problem

    def __len__(self) -> int:
        return len(self._records)

    def label(self, index: int) -> str:
        return printable(f"{self._path}[{index}]")

    def read(self, index: int) -> Mapping:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, IndexError) as problem:
            raise RecordError("archive", f"its bytes are damaged ({problem})") from problem
        return parse_record(record)

    def root(self, index: int) -> AnyPath:
        return self._folder

    def files(self) -> list[AnyPath]:
        return self._shards

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


def _shards(path: str) -> list[AnyPath]:
    """The ArrayRecord files at a path; those in a folder that are links out of it are not there."""
    if to_path(path, "data.sources").is_dir():
        return [file for file in archive_files(path, ("",)) if any(suffix in file.name for suffix in ARRAY_RECORD)]
    return archive_files(path, ())


KINDS: dict[str, type[Source]] = {
    "folder": Folder,
    "jsonl": Jsonl,
    "json": Json,
    "imagefolder": ImageFolder,
    "parquet": ParquetTables,
    "webdataset": TarFiles,
    "arrayrecord": ArrayRecords,
    "task": Task,
}
