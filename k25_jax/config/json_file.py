"""JSON objects from files that may be damaged or lie: read in bounded time and memory, or refused in one line."""

import json
import math
import reprlib
import stat

from k25_jax.runtime.paths import AnyPath, is_remote, read_range, size_and_time, to_path

MOST_BYTES = 10_000_000
MOST_ENTRIES = 4_000_000  # commas and brackets: what makes a small file large in memory
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def read_object(path: str | AnyPath, most_bytes: int = MOST_BYTES) -> dict:
    """The object in a file. Raises ValueError with one line that names it; never waits for a pipe or device."""
    try:
        require_file(path)
        data = read_range(to_path(path), most_bytes + 1, 0)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise ValueError(f"{path} is larger than {most_bytes:,} bytes: it is no such file")
    return parse_object(data, str(path))


def require_file(path: str | AnyPath) -> int:
    """The size of a regular file; ValueError for what would hang or has no end, OSError where there is none."""
    if is_remote(path := to_path(path)):
        return size_and_time(path)[0]
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is {KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")
    return status.st_size


def parse_object(data: bytes, where: str) -> dict:
    """The object in `data`. Its keys are unique, its numbers finite. Raises ValueError with one line."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_ENTRIES:
        raise ValueError(f"{where} has more than {MOST_ENTRIES:,} entries: it is no such file")
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deep") from None
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {shown(value)}")
    return value


def shown(value) -> str:
    """A value for a message: on one line, and short."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    return short.repr(value)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number
