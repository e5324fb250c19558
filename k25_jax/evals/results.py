"""Results on disk: a line of JSON for every finished sample, in a file that knows whose they are.

The first line says who answered which questions under which settings; a file is only ever continued by the same. A line
that a killed process left unfinished is dropped.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields

from k25_jax.config import ConfigError
from k25_jax.evals.protocol import Result
from k25_jax.runtime.mirror import Mirror
from k25_jax.runtime.paths import AnyPath, to_path

FORMAT = 1


class ResultFile:
    """Opens `path` for one process, as a context; `finished` has its results by (index, sample), without errors.

    `of` is what the results belong to. Raises ConfigError when the file belongs to something else or is damaged, or
    when another process writes to it, which in a bucket, where there are no locks, is seen when it has: then PathError.
    """

    def __init__(self, path: AnyPath, of: Mapping):
        self.path = to_path(path)
        self.of = json.loads(json.dumps(of))  # as it is read back
        self.finished: dict[tuple[int, int], Result] = {}

    def __enter__(self) -> "ResultFile":
        self._mirror = Mirror(self.path.parent, (self.path.name,))
        self._file = open(self._mirror.folder / self.path.name, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self.path}: another evaluation writes to it; wait for its end") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_):
        self._file.close()
        self._mirror.close()

    def add(self, result: Result):
        """One more line, on its way to the disk before this returns; to a bucket within half a minute."""
        self._write(asdict(result))
        self._mirror.publish()

    def _write(self, line: Mapping):
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self):
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a process was killed while it wrote
            os.ftruncate(self._file.fileno(), whole)
        lines = data[:whole].splitlines()
        if not lines:
            self._write({"of": self.of})
            return
        self._check(self._parse(lines[0], 1))
        for number, line in enumerate(lines[1:], 2):
            try:
                result = Result(**self._parse(line, number))
            except TypeError:
                wanted = ", ".join(field.name for field in fields(Result))
                raise ConfigError(f"{self.path}:{number}: is no result, which has {wanted}; remove the line") from None
            if result.finish != "error":
                self.finished[result.index, result.sample] = result

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            parsed = json.loads(line)
        except ValueError as problem:
            raise ConfigError(f"{self.path}:{number}: is not JSON ({problem}); remove the line") from None
        if not isinstance(parsed, dict):
            raise ConfigError(f"{self.path}:{number}: is no JSON object; remove the line")
        return parsed

    def _check(self, head: dict):
        found = head.get("of")
        if not isinstance(found, dict):
            raise ConfigError(f"{self.path}: its first line does not say whose results these are; use another file")
        if differences := list(_differences(found, self.of)):
            raise ConfigError(
                f"{self.path} holds results of something else: {'; '.join(differences)}. Choose another --workdir, "
                "or delete the file"
            )


def _differences(found, wanted, where: str = ""):
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{where} was {found!r} and is now {wanted!r}"
