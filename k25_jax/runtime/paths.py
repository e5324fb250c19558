"""Paths that a user gives: on this machine, or in a bucket of Cloud Storage (gs://BUCKET/...). One set of rules for both.

A local path stays a pathlib.Path and all that one can do; a remote one is an epath.Path, which reads and writes through
gcsfs. What the two do not do alike is here. A bucket has no folders to make, no links, no locks and no renaming; an object
appears whole when its upload is closed, and cannot grow (runtime/mirror.py). Nothing remembers listings: several
processes write to one bucket. Credentials are those that gcloud or the TPU VM has.
"""

import contextlib
import errno
import glob as local_glob
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import typing
from collections.abc import Iterator

if typing.TYPE_CHECKING:
    from etils import epath

    AnyPath = pathlib.Path | epath.Path
else:
    AnyPath = pathlib.PurePath  # of both

REMOTE = "gs://"
UPLOAD = "write it here, then: gcloud storage cp -r FOLDER gs://BUCKET/..."
BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/|$)")
ADDRESS = re.compile(r"(?i)([a-z][a-z0-9+.-]*)://|(gs|gcs|s3):/")
AHEAD = 2**16, 2**24  # bytes of an object that are read at once: at first, and at most where reading goes on in order


class PathError(ValueError):
    """A path that cannot be used; the message names it, what it was given for, and the remedy."""


# ------------------------------------------------------------------------------------------------------- what a path is
def is_remote(path) -> bool:
    """Whether a path, or the text of one, leads into a bucket."""
    return os.fspath(path).startswith(REMOTE)


def to_path(path: str | os.PathLike, what: str = "") -> AnyPath:
    """The path that a user wrote; `what` is the flag or field. PathError for an address that is not read, and for gs:/x."""
    text, given = os.fspath(path), f"{what}={os.fspath(path)}" if what else os.fspath(path)
    if not (match := ADDRESS.match(text)):
        return pathlib.Path(path)
    if (match[1] or match[2]).lower() not in ("gs", "gcs"):
        raise PathError(f"{given}: is an address, which is not read; download it, or copy it to gs://BUCKET/...")
    if not BUCKET.match(text):
        raise PathError(
            f"{given}: a path in a bucket is written gs://BUCKET/PATH, in small letters and with two slashes"
        )
    if ".." in text.split("/"):
        raise PathError(f"{given}: a bucket has no folder '..'; write the path without it")
    from etils import epath

    _store()
    return epath.Path(text)


def local_only(path: str | os.PathLike, what: str, remedy: str) -> pathlib.Path:
    """A path of this machine; PathError for one in a bucket, with the remedy."""
    if is_remote(to_path(path, what)):
        raise PathError(f"{what}={path}: cannot be in a bucket; {remedy}")
    return pathlib.Path(path)


def lexists(path: AnyPath) -> bool:
    """Whether there is something, if only a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def absolute(path: AnyPath) -> AnyPath:
    """The whole path, links followed; that of a bucket always is."""
    return path if is_remote(path) else path.resolve()


def inside(root: AnyPath, path: str) -> AnyPath | None:
    """The path below `root` that a record names, links followed; None where it leads out of `root`. OSError, ValueError."""
    if not is_remote(root):
        file = (root / path).resolve()
        return file if file.is_relative_to(root.resolve()) else None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith(("/", REMOTE)) or ".." in parts or not parts or "\0" in path:
        return None
    return root.joinpath(*parts)


def _store():
    """The file system of buckets. PathError where it is not installed."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the kind of each bucket, by gRPC
    os.environ.setdefault("EPATH_USE_TF", "false")  # importing TensorFlow would take the TPU
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise PathError(f"paths in buckets need gcsfs, which is not installed ({error}): pip install gcsfs") from None
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath has


@contextlib.contextmanager
def _told(path: AnyPath):
    """What a library raises of a bucket, as an OSError that names the path."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such object, or no such bucket", str(path)) from None
    except PathError:
        raise
    except Exception as error:  # of HTTP, of credentials, of a connection
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        number = errno.EACCES if getattr(error, "code", None) in (401, 403) else errno.EIO
        raise OSError(number, f"the bucket refuses: {reason[:300]}", str(path)) from error


def check_reachable(path: AnyPath, what: str, write: bool = False) -> None:
    """Raise PathError unless the bucket of a path may be read, and written where that is wanted; local ones always may."""
    if not is_remote(path):
        return
    bucket = path.parts[2]
    try:
        with _told(path):
            _store().call("GET", "b/{}/o", bucket, maxResults=1)
            if write:
                probe = path / f".k25-{os.getpid()}"
                probe.write_bytes(b"")
                probe.unlink()
    except OSError as error:
        raise PathError(
            f"{what}={path}: gs://{bucket} cannot be {'written' if write else 'read'} ({error.strerror}); check its name, "
            "and that this account may (gcloud auth application-default login)"
        ) from error


# -------------------------------------------------------------------------------------------------------- what lies there
def names(folder: AnyPath) -> list[str]:
    """The names of what lies in a folder, sorted; OSError where it cannot be read."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    with _told(folder):
        found = _store().ls(str(folder), detail=False)
    at = str(folder).removeprefix(REMOTE).rstrip("/")
    return sorted({name.removeprefix(at).strip("/") for name in found} - {""})


def walk(folder: AnyPath, onerror=None) -> Iterator[tuple[AnyPath, list[str], list[str]]]:
    """As os.walk, for both: a folder, the names of the folders in it, which may be sorted in place, and of the files."""
    if not is_remote(folder):
        for here, folders, files in os.walk(folder, onerror=onerror):
            yield pathlib.Path(here), folders, files
        return
    with _told(folder):
        entries = _store().ls(str(folder), detail=True)
    at = str(folder).removeprefix(REMOTE).rstrip("/")
    found = [(entry["name"].removeprefix(at).strip("/"), entry["type"] == "directory") for entry in entries]
    folders, files = (
        sorted({name for name, is_folder in found if name and is_folder is kind}) for kind in (True, False)
    )
    yield folder, folders, files
    for name in folders:
        yield from walk(folder / name, onerror)


def expand(pattern: str) -> list[AnyPath]:
    """The files and folders that a pattern names, sorted; ** goes into folders."""
    if not is_remote(pattern):
        return [pathlib.Path(name) for name in sorted(local_glob.glob(pattern, recursive=True))]
    path = to_path(pattern)
    with _told(path):
        return [to_path(f"{REMOTE}{name.rstrip('/')}") for name in sorted(_store().glob(str(path)))]


def size_and_time(path: AnyPath) -> tuple[int, str]:
    """The bytes of a file and what changes when it is written anew; OSError where there is none."""
    if not is_remote(path):
        status = path.stat()
        return status.st_size, str(status.st_mtime_ns)
    with _told(path):
        found = _store().info(str(path))
    if found["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    return found["size"], str(found["generation"])


# ------------------------------------------------------------------------------------------------------ reading, writing
def read_range(path: AnyPath, size: int, offset: int) -> bytes:
    """At most `size` bytes of a file from `offset` on; fewer where it ends. OSError where it cannot be read."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return os.pread(file.fileno(), size, offset)
    with _told(path):
        return _store().cat_file(str(path), start=offset, end=offset + size) if size else b""


class Reader:
    """A file, open for reading by places, as a context; of an object, what follows is read along. OSError."""

    def __init__(self, path: AnyPath):
        self.path, self._file = path, None if is_remote(path) else open(path, "rb")
        self.size = size_and_time(path)[0] if self._file is None else os.fstat(self._file.fileno()).st_size
        self._start, self._held, self._ahead = 0, b"", AHEAD[0]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()

    def read_at(self, size: int, offset: int) -> bytes:
        """As os.pread."""
        if self._file:
            return os.pread(self._file.fileno(), size, offset)
        size, begin = max(0, min(size, self.size - offset)), offset - self._start
        if not 0 <= begin <= begin + size <= len(self._held):
            in_order = 0 <= begin <= len(self._held)
            self._ahead = min(2 * self._ahead, AHEAD[1]) if in_order else AHEAD[0]
            wanted = min(max(size, self._ahead), self.size - offset)
            self._start, self._held, begin = offset, read_range(self.path, wanted, offset), 0
        return self._held[begin : begin + size]

    def next_data(self, offset: int) -> int:
        """Where bytes lie that are not in a hole of the file; OSError (ENXIO) where there are no more."""
        return os.lseek(self._file.fileno(), offset, os.SEEK_DATA) if self._file else offset


def make_folder(folder: AnyPath) -> None:
    """A folder with those above it; in a bucket there is nothing to make."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: AnyPath, content: bytes | str) -> None:
    """A file, whole or not at all, also when the process is killed or the disk is full; makes its folder."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        with _told(path):
            _store().pipe_file(str(path), data)
        return
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def drafted(path: AnyPath) -> Iterator[pathlib.Path]:
    """A local file to write, for writers that seek; it takes the place of `path` whole, or not at all when they fail."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="k25-upload-") as folder:
            yield pathlib.Path(folder, path.name)
            upload(pathlib.Path(folder, path.name), path)
        return
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def upload(file: pathlib.Path, path: AnyPath) -> None:
    """Copy a local file into a bucket; it appears whole."""
    with _told(path):
        _store().put_file(str(file), str(path))


def download(path: AnyPath, file: pathlib.Path) -> None:
    """Copy an object to a local file, which appears whole."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with _told(path):
        _store().get_file(str(path), str(temporary))
    temporary.replace(file)


def copies(files: list[AnyPath], what: str) -> list[pathlib.Path]:
    """Local copies of objects, for libraries that read nothing else; kept in the user's cache for the next time.

    They may take half of the free disk; PathError beyond that.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(base, "k25_jax-copies")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    states = [size_and_time(file) for file in files]
    keys = [
        hashlib.sha256(f"{file}\0{state}".encode()).hexdigest()[:16] for file, state in zip(files, states, strict=True)
    ]
    targets = [folder / key / file.name for key, file in zip(keys, files, strict=True)]
    missing = [number for number, target in enumerate(targets) if not target.exists()]
    needed, free = sum(states[number][0] for number in missing), shutil.disk_usage(folder).free
    if needed > free // 2:
        raise PathError(
            f"{what}: {files[0].parent} has {needed:,} bytes to copy to {folder}, where {free:,} are free and half may be "
            "taken; free some, or mount the bucket (gcsfuse) and give that path"
        )
    for number in missing:
        targets[number].parent.mkdir(exist_ok=True)
        download(files[number], targets[number])
    return targets


def open_random(path: AnyPath) -> typing.BinaryIO:
    """A file object that can seek, for libraries that take one. OSError where it cannot be read."""
    if not is_remote(path):
        return open(path, "rb")
    size_and_time(path)  # what is missing is named
    with _told(path):
        return _store().open(str(path), "rb", block_size=2**20)
