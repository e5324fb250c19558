"""Tensors as public checkpoints store them: safetensors files, with INT4 or FP8 matrices in them (K2.5 §3.2).

The experts of K2.5 are INT4, all matrices of K2 are FP8. A matrix `x.weight` [rows, columns] is stored in one of the
`ENCODINGS`; `parts` says which tensors hold it:
    ""    x.weight, in floating point
    int4  x.weight_packed: 8 values in an int32, the first in the lowest bits, each with 8 added; x.weight_scale: one
          scale for every 32 values of a row; x.weight_shape: [rows, columns], as a row may not fill its last int32
    fp8   x.weight: E4M3 values; x.weight_scale_inv: one factor for every block of 128 by 128, the last ones ragged
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

from k25_jax.checkpoint.store import CheckpointError

ENCODINGS = ("", "int4", "fp8")
FLOATS = ("F32", "BF16", "F16")  # as safetensors calls them
GROUP = 32
BLOCK = 128
MAX_HEADER = 100_000_000  # bytes, by the definition of safetensors
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = float(ml_dtypes.finfo(FP8).max)
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": FP8,
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


# --------------------------------------------------------------------------------------------------------- encodings
def parts(name: str, shape: tuple[int, ...], encoding: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The tensors that hold `name` of `shape`: their dtypes (any of them may be read, the first is written), shapes."""
    if encoding == "int4":
        rows, columns = shape
        return {
            f"{name}_packed": (("I32",), (rows, -(-columns // 8))),
            f"{name}_scale": (("BF16", "F32", "F16"), (rows, -(-columns // GROUP))),
            f"{name}_shape": (("I32", "I64"), (2,)),
        }
    if encoding == "fp8":
        blocks = tuple(-(-size // BLOCK) for size in shape)
        return {name: (("F8_E4M3",), shape), f"{name}_scale_inv": (("F32", "BF16"), blocks)}
    return {name: (FLOATS, shape)}


def encode(weight: np.ndarray, encoding: str) -> tuple[np.ndarray, ...]:
    """The contents of `parts`, in their order. Raises ValueError where a value to quantise is not finite."""
    if not encoding:
        return (weight,)
    if not np.isfinite(weight.astype(np.float32)).all():
        raise ValueError(f"cannot be stored as {encoding}: it holds NaN or infinity")
    return pack_int4(weight) if encoding == "int4" else quantise_fp8(weight)


def unpack_int4(packed: np.ndarray, scale: np.ndarray, shape, group: int = GROUP) -> np.ndarray:
    """INT4 [rows, ceil(columns / 8)] and scales [rows, ceil(columns / group)] -> float32 of `shape`."""
    rows, columns = (int(size) for size in shape)
    pairs = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    values = np.empty((rows, 2 * pairs.shape[1]), np.int8)
    values[:, 0::2] = pairs & 15
    values[:, 1::2] = pairs >> 4
    values = values[:, :columns] - np.int8(8)
    return values * _spread(scale, group, 1, columns)


def pack_int4(weight: np.ndarray, group: int = GROUP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix -> (packed int32, scale bfloat16, shape int32), symmetric: the largest of a group becomes 7 or -7.

    So a group that already holds 4-bit values with such an extreme is stored without loss.
    """
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // group), group), np.float32)
    padded.reshape(rows, -1)[:, :columns] = weight
    scale = (np.abs(padded).max(axis=2) / 7).astype(ml_dtypes.bfloat16)
    scale[scale == 0] = 1
    values = np.clip(np.rint(padded.reshape(rows, -1)[:, :columns] / _spread(scale, group, 1, columns)), -8, 7)
    nibbles = np.zeros((rows, 8 * -(-columns // 8)), np.uint8)
    nibbles[:, :columns] = (values + 8).astype(np.uint8)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view("<i4")
    return packed, scale, np.array([rows, columns], np.int32)


def dequantise_fp8(weight: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """E4M3 [rows, columns] and the factor of each 128x128 block -> float32."""
    rows, columns = weight.shape
    return weight.astype(np.float32) * _spread(_spread(scale_inv, BLOCK, 0, rows), BLOCK, 1, columns)


def quantise_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix -> (E4M3 values, float32 factors of its 128x128 blocks): the largest of a block becomes 448."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = np.zeros((down * BLOCK, across * BLOCK), np.float32)
    padded[:rows, :columns] = weight
    scale = np.abs(padded).reshape(down, BLOCK, across, BLOCK).max(axis=(1, 3)) / np.float32(FP8_MAX)
    scale[scale == 0] = 1
    values = padded[:rows, :columns] / _spread(_spread(scale, BLOCK, 0, rows), BLOCK, 1, columns)
    return np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8), scale


def _spread(scale: np.ndarray, size: int, axis: int, length: int) -> np.ndarray:
    """Each scale repeated for the `size` values that share it, cut to `length`; float32."""
    repeated = np.repeat(scale.astype(np.float32), size, axis)
    return repeated[:length] if axis == 0 else repeated[:, :length]


def describe(encoding: str) -> dict:
    """The `quantization_config` that tells other software about the tensors of an encoding."""
    others = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    others += ["re:.*vision_tower.*", "re:.*mm_projector.*"]
    if encoding == "fp8":
        kept = ["lm_head", "vision_tower", "mm_projector"]
        scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return scheme | {"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": kept}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return scheme | {"config_groups": {"group_0": group}, "ignore": others}


# ------------------------------------------------------------------------------------------------------------- files
@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, from byte `start`."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: pathlib.Path) -> list[Stored]:
    """What a safetensors file holds. Raises CheckpointError unless its tensors fill it exactly."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file, or cut off inside its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (*map(int, info["data_offsets"]), DTYPES[info["dtype"]], tuple(map(int, info["shape"])), name)
                for name, info in header.items()
            ]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path} has a corrupt header: {error!r}") from error
    stored, position = [], 0
    for start, end, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        if start != position or end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path} has a corrupt header: {name} cannot lie at bytes {start} to {end}")
        stored.append(Stored(path, name, header[name]["dtype"], shape, 8 + length + start))
        position = end
    if 8 + length + position != size:
        raise CheckpointError(f"{path} should be {8 + length + position} bytes long, but is {size}: cut off or damaged")
    return stored


class TensorFiles:
    """The tensors of a checkpoint (a folder or one file), by `public_name` of their names; reads the headers alone.

    What is wrong with the files is gathered in `problems`; `lost` are the names that cannot be judged because of it.
    """

    def __init__(self, source, public_name: Callable[[str], str]):
        self.source, self.public_name = pathlib.Path(source), public_name
        self.tensors: dict[str, Stored] = {}
        self.lost: set[str] = set()
        self.problems: list[str] = []
        single = self.source if self.source.is_file() else self.source / "model.safetensors"
        if single.is_file():
            self._add(read_header(single))
        elif (self.source / INDEX).is_file():
            self._open_shards(self.source / INDEX)
        else:
            raise CheckpointError(f"{self.source} has neither model.safetensors nor {INDEX}")

    def _open_shards(self, index: pathlib.Path):
        try:
            shards = {}
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                shards.setdefault(index.with_name(file), set()).add(name)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{index} is not an index of tensors: {error!r}") from error
        for path, named in sorted(shards.items()):
            try:
                stored = read_header(path)
            except (OSError, CheckpointError) as error:
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
        """How tensor `name` is stored: one of ENCODINGS."""
        if len(shape) == 2 and (f"{name}_packed" in self.tensors or f"{name}_packed" in self.lost):
            return "int4"
        return "fp8" if len(shape) == 2 and name in self.tensors and self.tensors[name].dtype == "F8_E4M3" else ""

    def check(self, expected: dict[str, tuple[int, ...]], harmless: Callable[[str], bool]):
        """Raise ONE CheckpointError with all that is wrong, from the headers, unless exactly `expected` is there."""
        problems, used = list(self.problems), set()
        for name, shape in expected.items():
            for part, (dtypes, part_shape) in parts(name, shape, self.encoding(name, shape)).items():
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
        """Rows `first` to `last` of a tensor, as they are stored."""
        stored = self.tensors[name]
        dtype, row = DTYPES[stored.dtype], math.prod(stored.shape[1:])
        rows = (stored.shape[0] if last is None else last) - first
        size = rows * row * dtype.itemsize
        data = np.fromfile(stored.file, np.uint8, size, offset=stored.start + first * row * dtype.itemsize)
        if data.size != size:
            raise CheckpointError(f"{stored.file} ended while {stored.name} was read: it changed after it was opened")
        return data.view(dtype).reshape(rows, *stored.shape[1:])

    def values(self, name: str, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of a checked tensor, in floating point."""
        encoding = self.encoding(name, shape)
        if encoding == "int4":
            if tuple(self.read(f"{name}_shape")) != shape:
                raise CheckpointError(f"{self.tensors[f'{name}_shape'].file}: {name}_shape is not {list(shape)}")
            packed, scale = (self.read(name + part, first, last) for part in ("_packed", "_scale"))
            return unpack_int4(packed, scale, (last - first, shape[1]))
        if encoding == "fp8":
            start = first // BLOCK * BLOCK  # scales are for whole blocks
            scale_inv = self.read(f"{name}_scale_inv", start // BLOCK, -(-last // BLOCK))
            return dequantise_fp8(self.read(name, start, last), scale_inv)[first - start :]
        return self.read(name, first, last)


def raise_problems(source, problems: list[str]):
    """One error that lists the first 50 problems and counts them; none, no error."""
    if problems:
        shown = "\n  ".join(problems[:50]) + ("\n  ..." if len(problems) > 50 else "")
        raise CheckpointError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}\n  {shown}")
