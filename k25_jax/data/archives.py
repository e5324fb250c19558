"""Sources that are one file or several, each with some of the records: shards (K2.5 §3.3)."""

import glob
import os
import stat
from pathlib import Path

import numpy as np

from k25_jax.data.captions import OTHER, SYSTEM, is_system_file, medium_kind
from k25_jax.data.records import DataError, Source


def archive_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a source that is a file, a folder (searched without its subfolders) or a pattern, by name."""
    if os.path.isdir(path):
        names = (name for name in sorted(os.listdir(path)) if name.lower().endswith(suffixes))
        return [Path(path, name) for name in names if not is_system_file(name)]
    if os.path.lexists(path):
        return [Path(path)]
    return [Path(name) for name in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(name)]


class Archives(Source):
    """Files that each hold some of the records, one after another."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._files = self.find()
        if os.path.isdir(path):
            self._count_others(Path(path))
        if not self._files:
            what = f"is no file *{self.suffixes[0]}" if os.path.isdir(path) else "is nothing"
            raise DataError(f"data.sources: there {what} at {path}; check the path, and the kind if one was given")
        for file in self._files:
            check_file(file, Path(path))
        self._ends = np.cumsum([self.open(file) for file in self._files])

    def find(self) -> list[Path]:
        """The files, by name."""
        return archive_files(self._path, self.suffixes)

    def _count_others(self, folder: Path):
        """Files that are no shards; media may belong to records."""
        for name in os.listdir(folder):
            if is_system_file(name):
                self.left_out[SYSTEM] += 1
            elif not name.lower().endswith(self.suffixes) and not medium_kind(name) and not (folder / name).is_dir():
                self.left_out[OTHER] += 1

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


def check_file(file: Path, source: Path):
    """Raise DataError for a pipe or device, which would wait for ever, and for a link that leads out of the folder."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise DataError(f"data.sources: {file} is no regular file; write its records to one")
    except OSError as problem:
        raise DataError(f"data.sources: {file} cannot be read ({problem.strerror}); check the path") from None
    if file.is_symlink() and source.is_dir() and not file.resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"data.sources: {file} is a link that leads out of the folder; name the files by a pattern, "
            f"{source}/*{file.suffix}, or copy them there"
        )
