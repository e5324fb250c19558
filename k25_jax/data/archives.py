"""Sources that are one file or several, each with some of the records: shards (K2.5 §3.3)."""

import os
import stat

import numpy as np

from k25_jax.data.captions import OTHER, SYSTEM, is_system_file, medium_kind
from k25_jax.data.records import DataError, Source
from k25_jax.runtime.paths import AnyPath, expand, is_remote, lexists, names, size_and_time, to_path


def archive_files(path: str, suffixes: tuple[str, ...]) -> list[AnyPath]:
    """The files of a source that is a file, a folder (searched without its subfolders) or a pattern, by name."""
    place = to_path(path, "data.sources")
    if place.is_dir():
        found = (name for name in names(place) if name.lower().endswith(suffixes))
        return [place / name for name in found if not is_system_file(name)]
    if lexists(place):
        return [place]
    return [file for file in expand(path) if not file.is_dir()]


class Archives(Source):
    """Files that each hold some of the records, one after another."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, path: str):
        super().__init__()
        self._path, place = path, to_path(path, "data.sources")
        self._files = self.find()
        is_folder = place.is_dir()
        if is_folder:
            self._count_others(place)
        if not self._files:
            what = f"is no file *{self.suffixes[0]}" if is_folder else "is nothing"
            raise DataError(f"data.sources: there {what} at {path}; check the path, and the kind if one was given")
        for file in self._files:
            check_file(file, place)
        self._ends = np.cumsum([self.open(file) for file in self._files])

    def find(self) -> list[AnyPath]:
        """The files, by name."""
        return archive_files(self._path, self.suffixes)

    def _count_others(self, folder: AnyPath):
        """Files that are no shards; media may belong to records."""
        for name in names(folder):
            if is_system_file(name):
                self.left_out[SYSTEM] += 1
            elif not name.lower().endswith(self.suffixes) and not medium_kind(name) and not (folder / name).is_dir():
                self.left_out[OTHER] += 1

    def open(self, file: AnyPath) -> int:
        """Read the file's index; the number of its records. Raises DataError."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self._ends[-1])

    def files(self) -> list[AnyPath]:
        return self._files

    def place(self, index: int) -> tuple[int, int]:
        """The number of the file, and of the record in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path} has {len(self)} records; {index} is not one of them")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)


def check_file(file: AnyPath, source: AnyPath):
    """Raise DataError for a pipe or device, which would wait for ever, and for a link that leads out of the folder."""
    try:
        if is_remote(file):
            size_and_time(file)
            return
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise DataError(f"data.sources: {file} is no regular file; write its records to one")
    except OSError as problem:
        raise DataError(f"data.sources: {file} cannot be read ({problem.strerror}); check the path") from None
    if file.is_symlink() and source.is_dir() and not file.resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"data.sources: {file} is a link that leads out of the folder; name the files by a pattern, "
            f"{source}/*{file.suffix}, or copy them there"
        )
