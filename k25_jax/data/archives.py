"""Records in archives of the field: Parquet tables, and tar files in the WebDataset order (K2.5 §3.3).

Both give random access. A shuffled pass over Parquet reads a row group for nearly every record: turn large tables into
ArrayRecord first, with `k25 data build`.
"""

import glob
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from k25_jax.data.records import MAX_RECORD_BYTES, DataError, RecordError, Source, decode_text, parse_record

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
MAX_GROUP_BYTES = 2**31  # a row group, uncompressed
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
BLOCK = tarfile.BLOCKSIZE


def with_medium(record: Mapping, kind: str, medium: str | Path) -> Mapping:
    """A record that lies beside a medium: it gets the medium, unless it has parts, messages or media of its own."""
    own = ("parts", "messages", "image", "image_base64", "video", "video_base64")
    return record if any(record.get(key) is not None for key in own) else {**record, kind: medium}


def archive_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a source that is a file, a folder (searched without its subfolders) or a pattern, by name."""
    if os.path.isdir(path):
        return [Path(path, name) for name in sorted(os.listdir(path)) if name.lower().endswith(suffixes)]
    return [Path(path)] if os.path.isfile(path) else [Path(name) for name in sorted(glob.glob(path))]


class _Archives(Source):
    """Files that each hold some of the records, one after another."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._files = archive_files(path, self.suffixes)
        if not self._files:
            raise DataError(
                f"data.sources: there is no file *{self.suffixes[0]} at {path}; check the path and the kind"
            )
        self._ends = np.cumsum([self.open(file) for file in self._files])

    def open(self, file: Path) -> int:
        """Read the file's index; the number of its records. Raises DataError."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self._ends[-1])

    def files(self) -> list[Path]:
        return self._files

    def place(self, index: int) -> tuple[int, int]:
        """The number of the file, and of the record in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path} has {len(self)} records; {index} is not one of them")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)


# -------------------------------------------------------------------------------------------------------------- parquet
class ParquetTables(_Archives):
    """Parquet files (one, a folder or a pattern): a row is a record, its columns the fields; see `data.forms`.

    Binary columns, and structs of `bytes` and `path`, are media.
    """

    suffixes = (".parquet", ".pq")

    def __init__(self, path: str):
        self._tables: list[pa.parquet.ParquetFile] = []
        self._groups: list[np.ndarray] = []  # of each file, the row at which each of its groups ends
        self._lock = threading.Lock()  # a table is read by one thread at a time
        self._held: tuple[int, int, pa.Table | RecordError] | None = None  # the row group that was read last
        super().__init__(path)

    def open(self, file: Path) -> int:
        try:
            table = pa.parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True)
            rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise DataError(
                f"data.sources: {file} is no Parquet file, or is damaged ({problem}); fetch it again"
            ) from None
        if any(count < 0 for count in rows):
            raise DataError(f"data.sources: {file} is damaged: a row group of {min(rows)} rows; fetch it again")
        self._tables.append(table)
        self._groups.append(np.cumsum(rows, dtype=np.int64))
        return sum(rows)

    def label(self, index: int) -> str:
        file, row = self.place(index)
        return f"{self._files[file]}[{row}]"

    def root(self, index: int) -> Path:
        return self._files[self.place(index)[0]].parent

    def read(self, index: int) -> Mapping:
        file, row = self.place(index)
        group = int(np.searchsorted(self._groups[file], row, side="right"))
        first = int(self._groups[file][group - 1]) if group else 0
        with self._lock:
            if self._held is None or self._held[:2] != (file, group):
                self._held = None  # its memory goes before the next is read
                self._held = (file, group, self._read_group(file, group))
            table = self._held[2]
        if isinstance(table, RecordError):
            raise RecordError(table.reason, str(table))
        try:
            (record,) = table.slice(row - first, 1).to_pylist()
        except UnicodeDecodeError as problem:
            raise RecordError("utf-8", f"a column is not UTF-8 ({problem})") from None
        except (pa.ArrowException, ValueError, OverflowError, ArithmeticError) as problem:
            raise RecordError("archive", f"its columns are damaged ({problem})") from None
        return record

    def _read_group(self, file: int, group: int) -> pa.Table | RecordError:
        size = self._tables[file].metadata.row_group(group).total_byte_size
        if size > MAX_GROUP_BYTES:
            return RecordError("too large", f"a row group of {size} bytes; write groups of less than {MAX_GROUP_BYTES}")
        try:
            return self._tables[file].read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as problem:
            return RecordError("archive", f"row group {group} is damaged ({problem})")


# ------------------------------------------------------------------------------------------------------------------ tar
class _Member(NamedTuple):
    """Where a file's bytes lie in the archive."""

    offset: int
    size: int


class _Group(NamedTuple):
    """Members that share a stem, by the rest of their names; or what is wrong with this part of the archive."""

    stem: str
    members: dict[str, _Member]
    problem: RecordError | None = None


class _Members(Mapping):
    """Names to bytes of one group; bytes are read when asked for."""

    def __init__(self, file: Path, group: _Group):
        self._file, self._group = file, group

    def __getitem__(self, name: str) -> bytes:
        offset, size = self._group.members[self._ending(name)]
        if size > MAX_RECORD_BYTES:
            raise RecordError("too large", f"{name}: {size} bytes exceed {MAX_RECORD_BYTES}")
        try:
            with open(self._file, "rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as problem:
            raise DataError(
                f"data.sources: {self._file} can no longer be read ({problem}); check the disk"
            ) from problem
        if len(data) < size:
            raise RecordError("truncated", f"{name}: the archive ends after {len(data)} of {size} bytes")
        return data

    def _ending(self, name: str) -> str:
        base = self._group.stem.rpartition("/")[2]
        return name.removeprefix(f"{self._group.stem}.").removeprefix(f"{base}.").lower()

    def __contains__(self, name) -> bool:
        return self._ending(name) in self._group.members

    def __iter__(self) -> Iterator[str]:
        return iter(self._group.members)

    def __len__(self) -> int:
        return len(self._group.members)


class TarFiles(_Archives):
    """Tar files (one, a folder or a pattern) in which neighbours that share a stem are a record.

    The stem ends at the first dot of the file's name. `cat.jpg` and `cat.txt` are a picture and its caption; `cat.json`
    is a record of `data.forms`, which may name members (`"image": "0.jpg"` for `cat.0.jpg`). Only the places of the
    members are held. Compressed archives are refused: they have no random access. Links and devices are left out.
    """

    suffixes = (".tar",)

    def __init__(self, path: str):
        self._groups: list[list[_Group]] = []
        super().__init__(path)

    def open(self, file: Path) -> int:
        try:
            with open(file, "rb") as archive:
                head = archive.read(8)
                if head.startswith(COMPRESSED):
                    raise DataError(
                        f"data.sources: {file} is compressed, which allows no random access; decompress it to .tar"
                    )
                groups = list(self._index(archive))
        except OSError as problem:
            raise DataError(f"data.sources: {file} cannot be read ({problem}); check its permissions") from problem
        if not any(group.members for group in groups):
            raise DataError(f"data.sources: {file} is no tar file, or holds no files; check the path and the kind")
        self._groups.append(groups)
        return len(groups)

    def _index(self, archive) -> Iterator[_Group]:
        """Neighbours that share a stem. Where a header is damaged, a group of one problem; then what follows it."""
        group: _Group | None = None
        for name, member in _members(archive, self.left_out):
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            stem = f"{folder}/{stem}" if folder else stem
            broken = isinstance(member, RecordError)
            if group is not None and (broken or group.stem != stem or ending.lower() in group.members):
                yield group
                group = None
            if broken:
                yield _Group(name, {}, member)
            else:
                group = group or _Group(stem, {})
                group.members[ending.lower()] = member
        if group is not None:
            yield group

    def label(self, index: int) -> str:
        file, number = self.place(index)
        return f"{self._files[file]}[{self._groups[file][number].stem}]"

    def root(self, index: int) -> Mapping[str, bytes]:
        file, number = self.place(index)
        return _Members(self._files[file], self._groups[file][number])

    def read(self, index: int) -> Mapping:
        file, number = self.place(index)
        group, members = self._groups[file][number], self.root(index)
        if group.problem is not None:
            raise RecordError(group.problem.reason, str(group.problem))
        media = [(kind, name) for name in members for kind, endings in (("image", IMAGES), ("video", VIDEOS))
                 if f".{name}".endswith(endings)]  # fmt: skip
        record: Mapping = parse_record(members["json"]) if "json" in members else {}
        if "txt" in members and not any(key in record for key in ("text", "caption", "parts", "messages")):
            record = {**record, "text": decode_text(members["txt"], "txt")}
        if len(media) == 1:
            record = with_medium(record, *media[0])
        elif len(media) > 1 and record == with_medium(record, *media[0]):
            return record
        elif len(media) > 1:
            raise RecordError(
                "form", f"{len(media)} media and no parts or messages that name them: {list(members)[:8]}"
            )
        return record


def _members(archive, left_out) -> Iterator[tuple[str, _Member | RecordError]]:
    """Names and places of the regular files, in order."""
    size, start = os.fstat(archive.fileno()).st_size, 0
    while start < size:
        archive.seek(start)
        try:
            with tarfile.open(fileobj=archive, mode="r:", errors="replace") as tar:
                for info in tar:
                    if info.size < 0:
                        start = info.offset
                        raise ValueError(f"a size of {info.size}")
                    if info.isreg() and not info.issparse():
                        yield info.name, _Member(info.offset_data, info.size)
                    elif not info.isdir():
                        left_out["no regular file in the archive"] += 1
                    tar.members = []  # the list would hold every header
                    start = tar.offset
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as problem:
            reason = str(problem)
        else:
            reason = "its header is damaged"
        if start >= size or _is_end(archive, start, size):
            return
        found = _next_header(archive, start + BLOCK, size)
        yield f"byte {start}", RecordError("archive", f"{reason}; {found - start} bytes from {start} on are lost")
        start = found


def _is_end(archive, start: int, size: int) -> bool:
    """Whether only zeros follow in the block at `start`: the mark of the end."""
    return not os.pread(archive.fileno(), BLOCK, start).strip(b"\0")


def _next_header(archive, start: int, size: int) -> int:
    """Where the next header with a right checksum lies, in whole blocks; `size` if there is none."""
    for offset in range(start, size - BLOCK + 1, BLOCK):
        block = os.pread(archive.fileno(), BLOCK, offset)
        try:
            if block[257:262] == b"ustar":
                tarfile.TarInfo.frombuf(block, "utf-8", "replace")
                return offset
        except tarfile.HeaderError:
            pass
    return size
