"""Text to read on: pieces of the Python standard library's own source files."""

import functools
import hashlib
import os
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import ClassVar

from k25_jax.data.tasks import Task, TaskError

LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Library(Task):
    """Pieces of whole lines, of about `size` bytes; the last piece of a file may be shorter.

    A file is in one split only. Plain text: a record is {"text": ...}, and the answer is that text.
    """

    category: ClassVar[str] = "text"
    modality: ClassVar[str] = "text"
    longest: ClassVar[int] = 1_000_000

    size: int = 1500

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1:
            raise TaskError(f"library: size={self.size} must be positive")

    def __len__(self) -> int:
        return len(_pieces(self.split, self.size))

    def prompt(self, index: int) -> list[dict]:
        raise TaskError("library is text to read on and asks nothing; evaluate another task")

    def record(self, index: int) -> dict:
        return {"text": self.answer(index)}

    def answer(self, index: int) -> str:
        return _pieces(self.split, self.size)[self.check_index(index)]


def files(split: str) -> list[pathlib.Path]:
    """The split's files in the order of their paths. The hash of a file's path decides: one in ten is for testing."""
    root, found = pathlib.Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # do not go there: they can be large
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names if name.endswith(".py")]
    test = split == "test"
    return [root / path for path in sorted(found) if (hashlib.sha256(path.encode()).digest()[-1] % 10 == 0) == test]


@functools.cache
def _pieces(split: str, size: int) -> tuple[str, ...]:
    pieces = []
    for path in files(split):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the library has a few files in older encodings
            continue
        pieces += cut(text, size)
    return tuple(pieces)


def cut(text: str, size: int) -> list[str]:
    """Pieces of whole lines that reach `size` bytes of UTF-8; pieces of nothing but space are dropped."""
    pieces, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line.encode())
        if length >= size:
            pieces.append("".join(lines))
            lines, length = [], 0
    pieces.append("".join(lines))
    return [piece for piece in pieces if piece.strip()]
