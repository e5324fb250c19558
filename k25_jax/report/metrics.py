"""Scalars of a run: one JSON object a step in `metrics.jsonl`, and the same to TensorBoard.

The JSONL file is the record: every line is flushed when written, and a resumed run ends with the same file as a run
that was never stopped. TensorBoard's event files are a view of it.
"""

import errno
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

from k25_jax.runtime.mirror import Mirror
from k25_jax.runtime.paths import AnyPath, read_range, size_and_time, to_path, write

FILE_NAME = "metrics.jsonl"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsError(ValueError):
    """Metrics that cannot be written or read; the message names the file or the metric, and the remedy."""


class MetricsWriter:
    """Writes scalars to `directory/metrics.jsonl` and to TensorBoard event files beside it.

    A last line that a killed process left half-written is removed when the file is opened. In a bucket the files are
    as new as the last `publish`, and otherwise half a minute old.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = to_path(directory)
        self.path = self.directory / FILE_NAME
        self._tensorboard, self._mirror = None, Mirror(self.directory, (FILE_NAME,))
        self._local = self._mirror.folder / FILE_NAME
        self._file = open(self._local, "ab", buffering=0)
        _repair(self._local)
        lines = _lines(self._local)
        self.last_step = _step(self.path, len(lines), lines[-1]) if lines else None

    def write(self, step: int, scalars: Mapping[str, float]):
        """Append one line. Values: numbers or arrays of one element; NaN and infinities become strings."""
        if self.last_step is not None and step < self.last_step:
            raise MetricsError(
                f"{self.path}: step {step} comes after step {self.last_step}; to resume, call truncate_after(step)"
            )
        numbers = {name: _number(name, value) for name, value in scalars.items()}
        record = {"step": int(step)} | {name: _to_json(value) for name, value in numbers.items()}
        self._append(step, json.dumps(record, allow_nan=False).encode() + b"\n")
        self.last_step = step
        if self._tensorboard is None:
            self._tensorboard = _tensorboard(self._mirror.folder)
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        self._mirror.publish()

    def publish(self):
        """Have in a bucket what was written so far: before a checkpoint, from which a run goes on with these lines."""
        self._mirror.publish(wait=True)

    def truncate_after(self, step: int):
        """Drop the lines of steps beyond `step`, the step of the checkpoint from which the run goes on."""
        self._close_files()
        lines = _lines(self._local)
        kept = [line for number, line in enumerate(lines, 1) if _step(self.path, number, line) <= step]
        if len(kept) < len(lines):
            write(self._local, b"".join(kept))
        self.last_step = _step(self.path, len(kept), kept[-1]) if kept else None
        self._file = open(self._local, "ab", buffering=0)
        # purge_step makes TensorBoard hide what earlier event files say about these steps.
        self._tensorboard = _tensorboard(self._mirror.folder, purge_step=step + 1)

    def close(self):
        """Close both files."""
        self._close_files()
        self._mirror.close()

    def _close_files(self):
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception):
        self.close()

    def _append(self, step: int, line: bytes):
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fitted")
        except OSError as error:
            self._file.truncate(size)  # the file ends with a whole line again
            reason = f"metrics of step {step} not written ({error.strerror}); free some space and resume"
            raise OSError(error.errno, reason, str(self.path)) from error


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a `metrics.jsonl`, or of the one in a directory, as dictionaries of numbers.

    "nan", "inf" and "-inf" come back as floats. A half-written last line, of a run that goes on, is left out.
    """
    path = to_path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise MetricsError(f"no metrics at {path}; a run writes {FILE_NAME} into its directory")
    return list(_records(path))


def _records(path: AnyPath) -> Iterator[dict]:
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n") and not _is_object(line):
            return
        record = _parse(path, number, line)
        yield {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _lines(path: AnyPath) -> list[bytes]:
    return read_range(path, size_and_time(path)[0], 0).splitlines(keepends=True)


def _tensorboard(directory: pathlib.Path, purge_step: int | None = None):
    """A writer of event files. Its import brings all of PyTorch where that is installed, which takes a second.

    Its queue has no bound: the thread that empties it ends where the disk is full, and whoever fills it would wait for ever.
    """
    import tensorboardX

    return tensorboardX.SummaryWriter(str(directory), max_queue=0, purge_step=purge_step, flush_secs=5)


def _repair(path: pathlib.Path):
    """Make the file end with a whole line: complete the newline of the last one, or cut it off."""
    lines = _lines(path)
    if not lines or lines[-1].endswith(b"\n"):
        return
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        if _is_object(lines[-1]):
            file.write(b"\n")
        else:
            file.truncate(file.tell() - len(lines[-1]))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(path: AnyPath, number: int, line: bytes) -> dict:
    if not _is_object(line):
        raise MetricsError(f"{path}, line {number}: not a JSON object: {line[:60]!r}; remove the line")
    return json.loads(line)


def _step(path: AnyPath, number: int, line: bytes) -> int:
    step = _parse(path, number, line).get("step")
    if not isinstance(step, int):
        raise MetricsError(f"{path}, line {number}: no whole number under 'step': {line[:60]!r}; remove the line")
    return step


def _number(name: str, value) -> int | float:
    """A Python number from a number or an array of one element (this waits for the device)."""
    if name == "step":
        raise MetricsError("a metric cannot be named 'step': the line already has its step")
    try:
        number = value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError) as error:
        raise MetricsError(
            f"metric {name!r} has shape {value.shape}; give its mean, or one metric an element"
        ) from error
    if not isinstance(number, (int, float)):
        raise MetricsError(f"metric {name!r} must be a number, not {value!r}")
    return number


def _to_json(number: int | float) -> int | float | str:
    return number if math.isfinite(number) else str(float(number))
