"""safetensors files and their index, read one tensor at a time (K2.5 §3.2).

They may be damaged, or lie: every header is checked in bounded time and memory before any data is read, and data that
is not finite is named as it comes.
"""

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from k25_jax.checkpoint import quantised
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.config.json_file import parse_object, read_object, require_file, shown
from k25_jax.runtime.paths import AnyPath, is_remote, read_range, to_path

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, by the definition of safetensors; also of an index
MAX_RANK = 16
MAX_NAME = 255  # bytes of a file's name, characters of a tensor's
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": quantised.FP8,
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# words of the same size, and the bits that are all set in infinities and NaN, and only there
NOT_FINITE = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
BLOCK = 2**18  # words that are checked at once: they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, from byte `start`."""

    file: AnyPath
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


# ------------------------------------------------------------------------------------------------------------ headers
def read_header(path: AnyPath) -> list[Stored]:
    """What a safetensors file holds. Raises CheckpointError, one line, unless its tensors fill it exactly."""
    try:
        size = require_file(path)
        length = int.from_bytes(read_range(path, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file, or cut off inside its header")
        text = read_range(path, length, 8)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        header = parse_object(text, "it")
        header.pop("__metadata__", None)
        spans = sorted(_span(name, info) for name, info in header.items())
        position = 0
        for start, end, name in spans:
            if start != position:
                raise ValueError(f"{name} cannot lie at bytes {start} to {end}")
            position = end
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt header: {error}") from error
    if 8 + length + position != size:
        raise CheckpointError(f"{path} should be {8 + length + position} bytes long, but is {size}: cut off or damaged")
    return [
        Stored(path, name, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + start)
        for start, _, name in spans
    ]


def _span(name: str, info) -> tuple[int, int, str]:
    """(first byte, last, name) of an entry; ValueError where it is not one that could be."""
    if not (name.isprintable() and 0 < len(name) <= MAX_NAME):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if not isinstance(info, dict):
        raise ValueError(f"{name} is {shown(info)}, not an object")
    dtype, shape, offsets = (info.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"{name} has dtype {shown(dtype)}; it can be {', '.join(DTYPES)}")
    if not (_sizes(shape) and len(shape) <= MAX_RANK):
        raise ValueError(f"{name} has shape {shown(shape)}")
    if not (_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{name} has data_offsets {shown(offsets)}; they must be two numbers of bytes")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} cannot lie at bytes {start} to {end}: it is {dtype} of shape {shape}")
    return start, end, name


def _sizes(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_index(path: AnyPath) -> dict[AnyPath, set[str]]:
    """Which tensors are in which file beside the index. Raises CheckpointError, one line."""
    try:
        weight_map = read_object(path, MAX_HEADER).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"weight_map is {shown(weight_map)}, not an object")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(_beside(file), set()).add(name)
            if not (name.isprintable() and 0 < len(name) <= MAX_NAME):
                raise ValueError(f"{shown(name)} is no name of a tensor")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
        raise CheckpointError(f"{path} is not an index of tensors: {reason}") from error
    return {path.with_name(file): files[file] for file in sorted(files)}


def _beside(file) -> str:
    """A file's name that leads into no other folder."""
    if not isinstance(file, str) or not file.isprintable() or len(file.encode()) > MAX_NAME:
        raise ValueError(f"{shown(file)} is no name of a file")
    if file in ("", ".", "..") or "/" in file or "\\" in file:
        raise ValueError(f"{shown(file)} must be a file beside it, without folders")
    return file


# -------------------------------------------------------------------------------------------------------------- files
class TensorFiles:
    """The tensors of a checkpoint (a folder or one file), by `public_name` of their names; reads the headers alone.

    What is wrong with the files is gathered in `problems`; `lost` are the names that cannot be judged because of it.
    """

    def __init__(self, source, public_name: Callable[[str], str]):
        self.source, self.public_name = to_path(source), public_name
        self.tensors: dict[str, Stored] = {}
        self.lost: set[str] = set()
        self.problems: list[str] = []
        single = self.source / "model.safetensors" if self.source.is_dir() else self.source
        if single.exists():
            self._add(read_header(single))
        elif (self.source / INDEX).exists():
            self._open_shards(self.source / INDEX)
        else:
            raise CheckpointError(f"{self.source} has neither model.safetensors nor {INDEX}")

    def _open_shards(self, index: AnyPath):
        for path, named in read_index(index).items():
            try:
                stored = read_header(path)
            except CheckpointError as error:
                self.problems.append(f"{path}, which the index names, is missing" if not path.exists() else str(error))
                self.lost |= set(map(self.public_name, named))
                continue
            self._add(stored)
            for name in sorted(named - {tensor.name for tensor in stored}):
                self.problems.append(f"{name} is not in {path.name}, where the index puts it")
                self.lost.add(self.public_name(name))

    def _add(self, stored: list[Stored]):
        for tensor in stored:
            name = self.public_name(tensor.name)
            if name in self.tensors:
                other = self.tensors[name]
                self.problems.append(f"{tensor.name} in {tensor.file.name} repeats {other.name} in {other.file.name}")
            self.tensors[name] = tensor

    def encoding(self, name: str, shape: tuple[int, ...]) -> str:
        """How tensor `name` is stored: one of quantised.ENCODINGS."""
        if len(shape) == 2 and (f"{name}_packed" in self.tensors or f"{name}_packed" in self.lost):
            return "int4"
        return "fp8" if len(shape) == 2 and name in self.tensors and self.tensors[name].dtype == "F8_E4M3" else ""

    def encodings(self) -> dict[str, str]:
        """The encodings of matrices that occur, each with a tensor that has it."""
        found = {}
        for name, stored in self.tensors.items():
            if name.endswith(".weight_packed"):
                found.setdefault("int4", stored.name)
            elif stored.dtype == "F8_E4M3":
                found.setdefault("fp8", stored.name)
        return found

    def check(self, expected: dict[str, tuple[int, ...]], harmless: Callable[[str], bool]):
        """Raise ONE CheckpointError with all that is wrong, from the headers, unless exactly `expected` is there."""
        problems, used = list(self.problems), set()
        for name, shape in expected.items():
            for part, (dtypes, part_shape) in quantised.parts(name, shape, self.encoding(name, shape)).items():
                used.add(part)
                stored = self.tensors.get(part)
                if stored is None:
                    problems += [] if part in self.lost else [f"{part} is missing"]
                elif stored.shape != part_shape:
                    problems.append(f"{part} has shape {list(stored.shape)}; the config asks for {list(part_shape)}")
                elif stored.dtype not in dtypes:
                    problems.append(f"{part} is {stored.dtype}; it must be {' or '.join(dtypes)}")
        for name in sorted(self.tensors.keys() - used):
            if 0 not in self.tensors[name].shape and not harmless(name):
                problems.append(f"{self.tensors[name].name} is not part of this model")
        raise_problems(self.source, problems)

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows `first` to `last` of a tensor, as they are stored; what is not finite is an error."""
        stored = self.tensors[name]
        dtype, row = DTYPES[stored.dtype], math.prod(stored.shape[1:])
        rows = (stored.shape[0] if last is None else last) - first
        size = rows * row * dtype.itemsize
        start = stored.start + first * row * dtype.itemsize
        if is_remote(stored.file):
            data = np.frombuffer(read_range(stored.file, size, start), np.uint8)
        else:
            data = np.fromfile(stored.file, np.uint8, size, offset=start)
        if data.size != size:
            raise CheckpointError(f"{stored.file} ended while {stored.name} was read: it changed after it was opened")
        if not _finite(data, stored.dtype):
            raise CheckpointError(
                f"{stored.file}: {stored.name} holds NaN or infinity: fetch the file again, or take an earlier checkpoint"
            )
        return data.view(dtype).reshape(rows, *stored.shape[1:])

    def values(self, name: str, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of a checked tensor, in floating point."""
        encoding = self.encoding(name, shape)
        if encoding == "int4":
            if tuple(self.read(f"{name}_shape")) != shape:
                raise CheckpointError(f"{self.tensors[f'{name}_shape'].file}: {name}_shape is not {list(shape)}")
            packed, scale = (self.read(name + part, first, last) for part in ("_packed", "_scale"))
            return quantised.unpack_int4(packed, scale, (last - first, shape[1]))
        if encoding == "fp8":
            start = first // quantised.BLOCK * quantised.BLOCK  # scales are for whole blocks
            scale_inv = self.read(f"{name}_scale_inv", start // quantised.BLOCK, -(-last // quantised.BLOCK))
            return quantised.dequantise_fp8(self.read(name, start, last), scale_inv)[first - start :]
        return self.read(name, first, last)


def _finite(data: np.ndarray, dtype: str) -> bool:
    """Whether no number is infinite or NaN: by its bits, which takes a fraction of the time of reading it."""
    if dtype not in NOT_FINITE:
        return True
    kind, mask = NOT_FINITE[dtype]
    words, mask = data.view(kind), kind(mask)
    return all((words[i : i + BLOCK] & mask).max() != mask for i in range(0, words.size, BLOCK))


def raise_problems(source, problems: list[str]):
    """One error: a few problems on its line, else a list of the first 50; none, no error."""
    heading = f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}"
    if len(problems) > 3:
        raise CheckpointError("\n  ".join([heading, *problems[:50]]) + ("\n  ..." if len(problems) > 50 else ""))
    if problems:
        raise CheckpointError(f"{heading}: {'; '.join(problems)}")
