"""Files that grow line by line, also in a bucket, whose objects cannot grow: they are written here and uploaded whole."""

import concurrent.futures
import logging
import pathlib
import tempfile
import time

from k25_jax.runtime.paths import AnyPath, PathError, download, is_remote, make_folder, size_and_time, upload

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between uploads


class Mirror:
    """`folder`, where files of `target` are read and written: `target` itself, or of a bucket a copy of `names` in it.

    What is written to a copy is in the bucket after `publish(wait=True)` or `close`, and meanwhile not older there than
    EVERY seconds, by a thread of its own, when `publish` is called now and then. Raises OSError, and PathError where
    somebody else has written to a file since.
    """

    def __init__(self, target: AnyPath, names: tuple[str, ...] = ()):
        self.target, self._last, self._work = target, time.monotonic(), None
        self._sent: dict[str, tuple[tuple, str]] = {}  # of each file: what was sent, and what the object was then
        make_folder(target)
        if not is_remote(target):
            self.folder = target
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="k25-mirror-")
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "mirror")
        self.folder = pathlib.Path(self._temporary.name)
        for name in names:
            if state := self._state(name):
                download(target / name, self.folder / name)
                self._sent[name] = _version(self.folder / name), state

    def publish(self, wait: bool = False) -> None:
        """Upload what has changed; without `wait` in the background, and not more often than EVERY seconds."""
        if self.folder == self.target:
            return
        if self._work and (wait or self._work.done()):
            self._settle(self._work)
            self._work = None
        if wait:
            self._upload()
        elif not self._work and time.monotonic() - self._last > EVERY:
            self._work, self._last = self._pool.submit(self._upload), time.monotonic()

    def close(self) -> None:
        """Publish, and delete the copy."""
        if self.folder == self.target:
            return
        try:
            self.publish(wait=True)
        finally:
            self._pool.shutdown()
            self._temporary.cleanup()

    def _settle(self, work: concurrent.futures.Future) -> None:
        """Wait for an upload in the background; one that failed is tried again with the next."""
        try:
            work.result()
        except OSError as error:
            log.warning("%s: not uploaded (%s); tried again", self.target, error.strerror)

    def _state(self, name: str) -> str:
        """What changes when an object is written anew; "" where there is none."""
        try:
            return size_and_time(self.target / name)[1]
        except FileNotFoundError:
            return ""

    def _upload(self) -> None:
        for file in sorted(self.folder.iterdir()):
            version, (sent, state) = _version(file), self._sent.get(file.name, ((), ""))
            if version == sent:
                continue
            if self._state(file.name) != state:
                raise PathError(f"{self.target / file.name}: another process has written to it; end one of the two")
            upload(file, self.target / file.name)
            self._sent[file.name] = version, self._state(file.name)


def _version(file: pathlib.Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
