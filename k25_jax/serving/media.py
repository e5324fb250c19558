"""Addresses of images and videos to their bytes: data URLs, and files below one folder. Nothing is fetched from elsewhere.

A file is opened folder by folder without following symbolic links, so that no name leaves the folder, even while somebody
changes what is in it.
"""

import os
import pathlib
import stat
import urllib.parse

from k25_jax.serving.errors import ApiError
from k25_jax.vision.base64 import is_data_url, read_data_url


class MediaOpener:
    """Reads what the parts of one request point to, `limit` bytes of files in all. `root` None: no files."""

    def __init__(self, root: pathlib.Path | None, limit: int):
        self._root, self._limit, self._left = root, limit, limit

    def read(self, url: str, where: str) -> bytes:
        """The bytes behind a URL, named `where` in errors; raises ApiError."""
        if is_data_url(url):
            try:
                return read_data_url(url)
            except ValueError as problem:
                raise _error(where, f"{problem}; send data:image/png;base64,..") from None
        scheme = urllib.parse.urlsplit(url[:64]).scheme.lower() if ":" in url[:64] else ""
        if scheme in ("", "file"):
            return self._from_file(url, scheme, where)
        raise _error(
            where, f"addresses with {scheme[:20]!r} are not fetched; send a data URL: data:image/png;base64,.."
        )

    def _from_file(self, url: str, scheme: str, where: str) -> bytes:
        if self._root is None:
            raise _error(where, "files are not read here (the server has no --media_root); send a data URL")
        path = url
        if scheme:
            parts = urllib.parse.urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise _error(where, "a file URL must not name a host; write file:///path")
            path = urllib.parse.unquote(parts.path)
        names = self._names_below_root(path, where)
        try:
            descriptor = _open_below(self._root, names)
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or "not a name of a file"
            raise _error(where, f"cannot be read ({reason}); symbolic links are not followed") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _error(where, "is not a regular file")
            if status.st_size > self._left:
                raise _error(
                    where, f"the files of a request may have {self._limit} bytes in all; give fewer or smaller ones"
                )
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(self._left)
        finally:
            os.close(descriptor)
        self._left -= len(data)
        return data

    def _names_below_root(self, path: str, where: str) -> tuple[str, ...]:
        """The folders and the file of a path below the root; absolute paths must begin with the root."""
        plain = pathlib.PurePath(path)
        if plain.is_absolute():
            try:
                plain = plain.relative_to(self._root)
            except ValueError:
                raise _error(where, "lies outside of the folder that the server reads media from") from None
        if ".." in plain.parts:
            raise _error(where, "must not contain '..'")
        if not plain.parts:
            raise _error(where, "names no file")
        return plain.parts


def _open_below(root: pathlib.Path, names: tuple[str, ...]) -> int:
    """A descriptor of root/names.., opened without following a symbolic link below the root."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not make us wait
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for last, name in enumerate(names, 1 - len(names)):  # 0 at the last
        try:
            deeper = os.open(name, flags | (os.O_DIRECTORY if last else 0), dir_fd=folder)
        finally:
            os.close(folder)
        folder = deeper
    return folder


def _error(where: str, problem: str) -> ApiError:
    return ApiError(f"{where}: {problem}", where, "invalid_media")
