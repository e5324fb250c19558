"""Headers of tar files, of any origin and in any state (K2.5 §3.3).

Reads V7, ustar, GNU and pax headers a block at a time. What a header says is never believed before it is bounded: no read
is larger than `MAX_EXTENSION`, and each byte of the archive is looked at once or twice. Where something cannot be read it
is named, and reading goes on at the next block that is a header by its checksum.
"""

import errno
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from k25_jax.data.records import RecordError
from k25_jax.runtime.paths import Reader

BLOCK = 512
MAX_EXTENSION = 2**18  # bytes of names, or of pax keywords, before one member
MAX_KEYWORDS = 10_000
SCANNED = 2**22  # bytes read at once, at most, where a header is looked for
MAGIC = np.frombuffer(b"ustar", np.uint8)
REGULAR = (b"0", b"\0", b"7")
EXTENSIONS = {b"x": "pax header", b"X": "pax header", b"g": "global pax header", b"L": "long name", b"K": "long link"}
NO_FILES = {b"3": "a character device", b"4": "a block device", b"6": "a pipe", b"M": "a piece of a file of another volume",
            b"S": "a sparse file"}  # fmt: skip
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


class Member(NamedTuple):
    """Where a file's bytes lie in the archive, and its name there."""

    name: str
    offset: int
    size: int


class Link(NamedTuple):
    """A link: hard, to the name of an earlier member, or symbolic, to a path from the folder of `name`."""

    name: str
    target: str
    hard: bool


class Damage(NamedTuple):
    """A piece of the archive that cannot be read."""

    problem: RecordError


class Directory(NamedTuple):
    """A folder's entry."""

    name: str


class Entry(NamedTuple):
    """What the archive has under a name, which for `Damage` is a place."""

    name: str
    what: Member | Link | Directory | RecordError | Damage


class _Header(NamedTuple):
    kind: bytes
    name: str
    size: int | None  # None: no number
    target: str
    is_cut: bool  # the name fills its field: it may go on elsewhere
    is_extended: bool  # of a sparse file: more blocks of its map follow


def read_entries(file: Reader) -> Iterator[Entry]:
    """The entries of an open archive in their order."""
    size, start = file.size, 0
    extension: dict[str, str] = {}  # what the next member is told by the headers before it
    lost = False  # such a header could not be read
    while start < size:
        header = _parse(file.read_at(BLOCK, start))
        if header is None or header.size is None or header.size < 0:
            reason = "its header is damaged" if header is None or header.size is None else f"a size of {header.size}"
            after, is_zero = _next_header(file, start, size)
            if is_zero and header is None:  # the mark of the end, and perhaps another archive after it
                start, extension = after, {}
                continue
            yield _damage(start, after, reason)
        elif header.kind in EXTENSIONS:
            after, found = _extension(file, header, start, size)
            if isinstance(found, str):
                after = after if after < size else _next_header(file, start, size)[0]
                yield _damage(start, after, f"{found}, before {_name_at(file, after)}")
                extension, lost = {}, True
            else:
                extension |= found
            start = after
            continue
        else:
            entry, after = _entry(file, header, extension, start, size, lost)
            if entry is not None:
                yield entry
            after = after if after <= size else _next_header(file, start, size)[0]
        start, extension, lost = after, {}, False


def _damage(start: int, after: int, reason: str) -> Entry:
    problem = RecordError("archive", f"{reason}; {after - start} bytes from {start} on are lost")
    return Entry(f"byte {start}", Damage(problem))


def _name_at(file: Reader, start: int) -> str:
    header = _parse(file.read_at(BLOCK, start))
    return repr(header.name[:200]) if header else "the end"


# ------------------------------------------------------------------------------------------------------------- a header
def _parse(block: bytes) -> _Header | None:
    """A block as a header; None when its checksum is not that of one."""
    if len(block) < BLOCK:
        return None
    checksum, rest = _number(block[148:156]), block[:148] + block[156:]
    if checksum != sum(rest) + 8 * 32 and checksum != sum(np.frombuffer(rest, np.int8).tolist()) + 8 * 32:
        return None
    kind, name = block[156:157], _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" and kind not in b"LKSVM" else ""
    name = f"{prefix}/{name}" if prefix else name
    return _Header(kind, name, _number(block[124:136]), _text(block[157:257]), block[99] != 0, block[482] != 0)


def _number(field: bytes) -> int | None:
    """Octal digits, or the binary form of numbers that need more."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0", 1)[0].strip(b" ")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------------------------------------------- headers before it
def _extension(file: Reader, header: _Header, start: int, size: int) -> tuple[int, dict[str, str] | str]:
    """Where the next header lies, and what this one says of it, or what is wrong with it.

    Where the size leads to no header it is not believed, and the next is `size`: unknown.
    """
    title, after = EXTENSIONS[header.kind], start + BLOCK + _padded(header.size)
    known = after if after < size and _parse(file.read_at(BLOCK, after)) else size
    if header.size > min(MAX_EXTENSION, size - start - BLOCK):
        return known, f"a {title} of {header.size} bytes"
    payload = file.read_at(header.size, start + BLOCK)
    if header.kind in b"LK":
        return after, {"path" if header.kind == b"L" else "linkpath": _text(payload)}
    try:
        found = _keywords(payload)
    except ValueError as problem:
        return known, f"a {title} that is damaged ({problem})"
    if header.kind == b"g":
        return (known, f"a {title} that names all files alike") if found else (after, {})
    return after, found


def _keywords(payload: bytes) -> dict[str, str]:
    """What is wanted of the records "length keyword=value" of a pax header; raises ValueError."""
    out, at, count = {}, 0, 0
    while at < len(payload) and payload[at]:
        space = payload.find(b" ", at, at + 20)
        digits = payload[at : max(space, at)]
        if not digits.isdigit():
            raise ValueError(f"no length at byte {at}")
        end = at + int(digits)
        if end > len(payload) or end < space + 3 or payload[end - 1] != ord("\n"):
            raise ValueError(f"a record of {int(digits)} bytes at byte {at}")
        count += 1
        if count > MAX_KEYWORDS:
            raise ValueError(f"more than {MAX_KEYWORDS} keywords")
        keyword, _, value = payload[space + 1 : end - 1].partition(b"=")
        if keyword in (b"path", b"linkpath", b"size") or keyword.startswith(b"GNU.sparse."):
            out[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return out


# ------------------------------------------------------------------------------------------------------------- a member
def _entry(
    file: Reader, header: _Header, extension: dict[str, str], start: int, size: int, lost: bool
) -> tuple[Entry | None, int]:
    """A member as the headers before it have it, and where the next header lies; beyond the archive where that lies."""
    kind, offset = header.kind, start + BLOCK
    name = extension.get("GNU.sparse.name") or extension.get("path", header.name)
    stated = extension.get("size", str(header.size))
    is_number = re.fullmatch(r"[0-9]{1,20}", stated, re.ASCII)
    length = int(stated) if is_number else header.size
    is_extended = kind == b"S" and header.is_extended
    while is_extended and len(block := file.read_at(BLOCK, offset)) == BLOCK and _parse(block) is None:
        offset, is_extended = offset + BLOCK, block[504] != 0
    has_data = kind not in WITHOUT_DATA or (
        kind == b"1" and 0 < length <= size - offset and _is_data(file, offset, length)
    )
    after = offset if not has_data else min(offset + _padded(length), size) if offset + length <= size else size + 1
    if kind == b"5" or kind == b"D" or (kind in REGULAR and name.endswith("/")):
        return Entry(name.rstrip("/"), Directory(name.rstrip("/"))), after
    if kind == b"V":
        return None, after
    if lost and header.is_cut and "path" not in extension:
        return Entry(name, RecordError("archive", f"{name[:200]}..: the rest of its name could not be read")), after
    if not is_number:
        return Entry(name, RecordError("archive", f"{name[:200]}: a size of {stated[:40]!r}")), after
    if kind in (b"1", b"2") and not has_data:
        return Entry(name, Link(name, extension.get("linkpath", header.target), kind == b"1")), after
    if any(keyword.startswith("GNU.sparse.") for keyword in extension):
        kind = b"S"
    if kind in REGULAR or kind == b"1":
        return Entry(name, Member(name, offset, length)), after
    what = NO_FILES.get(kind, f"a member of the unknown type {kind!r}")
    return Entry(name, RecordError("file", f"{name[:200]}: {what}, which is not read; store the file itself")), after


def _is_data(file: Reader, offset: int, length: int) -> bool:
    """Whether a hard link brings so many bytes along, as some programs write them: then a header follows them only."""
    follows, later = (file.read_at(BLOCK, at) for at in (offset, offset + _padded(length)))
    return (
        bool(follows.strip(b"\0")) and _parse(follows) is None and (_parse(later) is not None or not later.strip(b"\0"))
    )


# ------------------------------------------------------------------------------------------------------------- recovery
def _next_header(file: Reader, start: int, size: int) -> tuple[int, bool]:
    """Where the next header after the block at `start` lies, else `size`, and whether all before it is zeros.

    Holes of the file are not read.
    """
    is_zero, offset, step = not file.read_at(BLOCK, start).strip(b"\0"), start + BLOCK, 8 * BLOCK
    while offset < size:
        try:
            data = file.next_data(offset)
            offset += (data - offset) // BLOCK * BLOCK
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # a hole until the end
                break
        chunk, step = file.read_at(step, offset), min(2 * step, SCANNED)
        count = len(chunk) // BLOCK
        blocks = np.frombuffer(chunk, np.uint8, count * BLOCK).reshape(count, BLOCK)
        for number in np.flatnonzero((blocks[:, 257:262] == MAGIC).all(axis=1)):
            if _parse(blocks[number].tobytes()) is not None:
                return offset + int(number) * BLOCK, is_zero and not blocks[:number].any()
        is_zero = is_zero and not chunk.strip(b"\0")
        if not count:
            break
        offset += count * BLOCK
    return size, is_zero
