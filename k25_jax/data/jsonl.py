"""Records as JSON: a line each, or the elements of one list (K2.5 §3.3).

Only the places of the records are held, so memory goes by their number and not by the bytes or the blank lines.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from k25_jax.data.archives import Archives
from k25_jax.data.captions import (
    OTHER_MEDIA,
    OWN_MEDIA,
    ending,
    is_system_file,
    medium_kind,
    of_unknown_kind,
    printable,
    with_medium,
)
from k25_jax.data.records import MAX_RECORD_BYTES, DataError, RecordError, parse_record
from k25_jax.runtime.paths import AnyPath, Reader, names, read_range, to_path

STEP, HEAD = 2**20, 2**16  # bytes read at once, and to see what a file is
BLANK = np.zeros(256, bool)
BLANK[list(b" \t\n\v\f\r")] = True
MARK = b"\xef\xbb\xbf"  # of the byte order
STRUCTURE = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}
DEPTH = np.zeros(256, np.int64)
DEPTH[list(STRUCTURE)] = list(STRUCTURE.values())
IS_STRUCTURE = np.zeros(256, bool)
IS_STRUCTURE[list(STRUCTURE)] = True
METADATA = "metadata.jsonl"  # of an image folder


class Pieces(NamedTuple):
    """Where records lie in a file: int64 [n] each; `lines` has their numbers, or is None for elements of a list."""

    starts: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray | None


class Jsonl(Archives):
    """JSONL files (one, a folder or a pattern): one JSON record a line; media paths are relative to the file's folder."""

    suffixes = (".jsonl", ".ndjson")

    def __init__(self, path: str):
        self._pieces: list[Pieces] = []
        super().__init__(path)

    def open(self, file: AnyPath) -> int:
        try:
            with Reader(file) as reader:
                pieces = self.index(reader)
        except OSError as problem:
            raise DataError(f"data.sources: {file} cannot be read ({problem}); check its permissions") from problem
        self._pieces.append(pieces)
        return len(pieces.starts)

    def index(self, file: Reader) -> Pieces:
        """Where the records of an open file lie; raises DataError."""
        return _lines(file)

    def label(self, index: int) -> str:
        file, number = self.place(index)
        lines = self._pieces[file].lines
        return printable(str(self._files[file])) + (f"[{number}]" if lines is None else f":{lines[number]}")

    def read(self, index: int) -> Mapping:
        file, number = self.place(index)
        start, size = int(self._pieces[file].starts[number]), int(self._pieces[file].sizes[number])
        if size > MAX_RECORD_BYTES:
            raise RecordError("too large", f"{size} bytes exceed {MAX_RECORD_BYTES}")
        try:
            return parse_record(read_range(self._files[file], size, start))
        except OSError as problem:
            raise DataError(
                f"data.sources: {self._files[file]} can no longer be read ({problem}); check the disk"
            ) from problem

    def root(self, index: int) -> AnyPath:
        return self._files[self.place(index)[0]].parent


class Json(Jsonl):
    """JSON files that hold a list of records, as LLaVA's do, one record, or JSON lines under another name."""

    suffixes = (".json",)

    def index(self, file: Reader) -> Pieces:
        head = file.read_at(HEAD, 0).removeprefix(MARK).lstrip()
        if head.startswith(b"["):
            return _elements(file)
        if not head.startswith(b"{"):
            raise DataError(f"data.sources: {file.path} is no JSON in UTF-8: neither a list of records nor a record")
        lines = _lines(file)
        if len(lines.starts) > 1 and lines.sizes[0] <= MAX_RECORD_BYTES:
            try:
                parse_record(file.read_at(int(lines.sizes[0]), int(lines.starts[0])))
                return lines
            except RecordError:
                pass  # the first line of a record that is written over several
        return Pieces(np.zeros(1, np.int64), np.array([file.size], np.int64), None)


class ImageFolder(Jsonl):
    """A folder of pictures or videos and, in it or its subfolders, metadata.jsonl with their names in `file_name`."""

    def __init__(self, path: str):
        place = to_path(path, "data.sources")
        self._tables = [place] if place.is_file() else metadata_files(place)
        super().__init__(path)
        media = sum(medium_kind(name) != "" for table in self._tables for name in names(table.parent))
        if media > len(self):
            self.left_out[f"medium not in {METADATA}"] = media - len(self)

    def find(self) -> list[AnyPath]:
        return self._tables

    def read(self, index: int) -> Mapping:
        record = super().read(index)
        name = record.get("file_name")
        if not isinstance(name, str) or any(record.get(key) is not None for key in OWN_MEDIA):
            return record
        if ending(name) in OTHER_MEDIA:
            raise of_unknown_kind(name)
        return with_medium(record, medium_kind(name), name) if medium_kind(name) else record


def metadata_files(folder: AnyPath) -> list[AnyPath]:
    """The tables of an image folder, also one of several splits; none where they name no files."""
    found = [folder / METADATA]
    found += [folder / name / METADATA for name in names(folder) if not is_system_file(name)]
    return [file for file in found if file.is_file() and _names_files(file)]


def _names_files(table: AnyPath) -> bool:
    for line in read_range(table, STEP, 0).split(b"\n"):
        if line.strip():
            try:
                return "file_name" in parse_record(line)
            except RecordError:
                return False
    return False


# ---------------------------------------------------------------------------------------------------------------- index
def _blocks(file: Reader) -> Iterator[tuple[int, np.ndarray]]:
    """The file in pieces: where each begins, and its bytes."""
    offset = 0
    while block := file.read_at(STEP, offset):
        yield offset, np.frombuffer(block, np.uint8)
        offset += len(block)


def _lines(file: Reader) -> Pieces:
    """The lines that are not blank."""
    found: list[np.ndarray] = []  # int64 [3, n]: start, end, number
    start, line, solid = 0, 1, False  # of the line that is not over yet
    mark = len(MARK) if file.read_at(len(MARK), 0) == MARK else 0
    for offset, block in _blocks(file):
        is_solid = ~BLANK[block]
        is_solid[: max(0, mark - offset)] = False
        ends = np.flatnonzero(block == ord("\n"))
        if not solid and not is_solid.any():  # nothing begins here
            start, line = (offset + int(ends[-1]) + 1, line + len(ends)) if len(ends) else (start, line)
            continue
        firsts = np.concatenate([[0], ends + 1])
        firsts = firsts[firsts < len(block)]
        filled = np.logical_or.reduceat(is_solid, firsts)
        if len(ends):
            wanted = filled[: len(ends)].copy()
            wanted[0] |= solid
            kept = np.flatnonzero(wanted)
            starts = firsts[kept] + offset
            starts[kept == 0] = start
            found.append(np.stack([starts, ends[kept] + offset, kept + line]))
            start, line = offset + int(ends[-1]) + 1, line + len(ends)
            solid = bool(len(filled) > len(ends) and filled[-1])
        else:
            solid = solid or bool(filled[0])
    if solid:
        found.append(np.array([[start], [file.size], [line]]))
    starts, ends, lines = np.concatenate(found, 1) if found else np.zeros((3, 0), np.int64)
    return Pieces(starts, ends - starts, lines)


def _elements(file: Reader) -> Pieces:
    """The elements of the list that the file is; the last one is cut off where the file is. Raises DataError."""
    found: list[np.ndarray] = []  # int64 [2, n]: start, end
    start, depth, inside, run, is_over = -1, 0, 0, 0, False  # -1: before the bracket
    for offset, block in _blocks(file):
        if is_over:
            break
        quotes, run = _quotes(block, run)
        toggles = np.zeros(len(block), np.int8)
        toggles[quotes] = 1
        within = np.bitwise_xor.accumulate(toggles) ^ inside
        inside = int(within[-1])
        places = np.flatnonzero(IS_STRUCTURE[block] & (within == 0))
        signs = block[places]
        depths = depth + np.cumsum(DEPTH[signs])
        depth = int(depths[-1]) if len(depths) else depth
        closing = np.flatnonzero(depths == 0)
        if len(closing):
            is_over, places, signs, depths = True, *(a[: closing[0] + 1] for a in (places, signs, depths))
            end = offset + int(places[-1]) + 1
        marks = offset + places[((depths == 1) & (signs == ord(","))) | (depths == 0)]
        if start < 0 and len(places):
            start = offset + int(places[0]) + 1
        if len(marks):
            pairs = np.stack([np.append(start, marks[:-1] + 1), marks])
            found.append(pairs[:, pairs[0] < pairs[1]])
            start = int(marks[-1]) + 1
    size = file.size
    if is_over and file.read_at(STEP, end).strip():
        raise DataError(
            f"data.sources: {file.path} goes on after its list of records; write one list, or one record a line"
        )
    starts, ends = np.concatenate([*found, [[], []] if is_over else [[start], [size]]], 1).astype(np.int64)
    if len(starts) and ends[-1] - starts[-1] < STEP:
        last = file.read_at(int(ends[-1] - starts[-1]), int(starts[-1]))
        starts, ends = (starts, ends) if last.strip() else (starts[:-1], ends[:-1])  # an empty list
    return Pieces(starts, ends - starts, None)


def _quotes(block: np.ndarray, run: int) -> tuple[np.ndarray, int]:
    """The places of quotes that no backslash takes their meaning, and how many backslashes the block ends with."""
    quotes = np.flatnonzero(block == ord('"'))
    is_slash = block == ord("\\")
    if not run and not is_slash.any():
        return quotes, 0
    last = np.maximum.accumulate(np.where(is_slash, -1, np.arange(len(block), dtype=np.int32)))
    before = np.where(quotes > 0, last[quotes - 1], -1)  # the last byte before the quote that is no backslash
    runs = quotes - 1 - before + np.where(before < 0, run, 0)
    tail = len(block) - 1 - int(last[-1])
    return quotes[runs % 2 == 0], tail + (run if last[-1] < 0 else 0)
