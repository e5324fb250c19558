"""What a source is: records by number, each with a name, and two ways of failing (K2.5 §3.3).

A record that cannot be used is a `RecordError`, which is skipped, counted and logged; a source that cannot be read
raises `DataError`, which stops the run. The reasons of a `RecordError`, under which it is counted:

    form         fields are missing, of the wrong type, or do not go together
    json, utf-8  a line or file is not JSON, or not UTF-8 text
    base64       a field of base64 is not
    empty        there is no text to learn from
    box          a box has no four numbers, is empty or inverted, or lies outside the picture
    image, video the media cannot be decoded, or exceed a limit of pixels, frames or work
    media        there are media, but the configuration takes none
    path         a path or link leads out of its folder or archive, or there is no folder
    missing      a path or link leads to no file, or a caption has no picture or video
    file         a file cannot be read, or is no regular file
    too large    a record or a file exceeds a limit of bytes
    truncated    the archive ends before the record does
    archive      the archive's bytes are damaged there
    unknown medium  a picture, sound or the like in a format that nothing here reads
    memory       more memory was asked for than a worker has (`data.workers`)
    deadline     a worker took too long over it, and was ended
    crash        a decoder ended its worker
    unknown      a library failed in a way that it does not document; a fault of our own code stops the run instead
"""

import collections
import json
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

from k25_jax.runtime.paths import AnyPath, is_remote, read_range, size_and_time

MAX_RECORD_BYTES = 2**28


class DataError(ValueError):
    """A source that cannot be used; the message names the path and the remedy."""


class RecordError(ValueError):
    """One record that cannot be used. `reason` is the word that it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail if len(detail) <= 500 else f"{detail[:500]}...")
        self.reason = reason


class Record(NamedTuple):
    """What a source yields: a name for the log, the data or what is wrong with it, and where its media lie.

    `root` is the folder that paths to media start from and must stay in, or a mapping of names to bytes; None: the
    record may name no media.
    """

    name: str
    data: Mapping | RecordError
    root: AnyPath | Mapping[str, bytes] | None = None


class Source:
    """Random access for Grain. `source[i]` raises DataError when the source fails, and never for a bad record."""

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

    def root(self, index: int) -> AnyPath | Mapping[str, bytes] | None:
        """Where media that the record names lie; see `Record`."""
        return None

    def files(self) -> list[AnyPath]:
        """The files that the records are read from; empty when there are none."""
        return []

    @property
    def modality(self) -> str:
        """The words "text" or "vision" where the source says so itself (`k25 data build` writes it); "" where it does not."""
        return ""


def parse_record(line: bytes) -> dict:
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


def read_bytes(path: AnyPath) -> bytes:
    """All bytes of a regular file, which a link may lead to; raises RecordError."""
    try:
        if is_remote(path):
            size, _ = size_and_time(path)
            if size > MAX_RECORD_BYTES:
                raise RecordError("too large", f"{path}: more than {MAX_RECORD_BYTES} bytes")
            return read_range(path, size, 0)
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RecordError("file", f"{path}: is no regular file")
            if status.st_size > MAX_RECORD_BYTES:
                raise RecordError("too large", f"{path}: more than {MAX_RECORD_BYTES} bytes")
            return file.read(MAX_RECORD_BYTES)
    except (OSError, ValueError) as problem:
        if isinstance(problem, RecordError):
            raise
        raise RecordError("file", f"{path}: cannot be read ({getattr(problem, 'strerror', problem)})") from None


def read_text(path: AnyPath) -> str:
    """The text of a regular file in UTF-8; raises RecordError."""
    return decode_text(read_bytes(path), str(path))


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes to text, without a byte order mark; raises RecordError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise RecordError("utf-8", f"{name}: is not UTF-8 ({problem})") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for a writer
