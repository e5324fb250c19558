"""Where the tensors to be written come from, each read when it is its turn: a tree, a run on disk, or public files."""

import json
from typing import Protocol

import jax
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict

from k25_jax.checkpoint.folders import CheckpointError
from k25_jax.checkpoint.layout import Bound
from k25_jax.checkpoint.tensor_files import TensorFiles, raise_problems
from k25_jax.runtime.paths import AnyPath, is_remote

WORDS = 2**32  # the sums of bits in a checkpoint of ours are counted modulo this (store.py)


class Tensors(Protocol):
    """The tensors of a model."""

    def check(self, target, rows: list[Bound]) -> None:
        """Raise CheckpointError unless exactly those of `rows` are there; `target` is what they are for."""

    def read(self, bound: Bound, place: tuple[int, ...]) -> np.ndarray:
        """One of them, its axes as in the public files."""

    def sums(self) -> dict[str, int]:
        """For each leaf the sum of the bits that were read since the last call, where the source knows what it should be."""


class TreeTensors:
    """Those of a tree of parameters in memory, sharded or not."""

    def __init__(self, params: dict):
        self._flat = flatten_dict(params, sep="/")

    def check(self, target, rows: list[Bound]) -> None:
        """See `Tensors`."""
        problems = compared({path: tuple(leaf.shape) for path, leaf in self._flat.items()}, rows)
        for path, leaf in self._flat.items():
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                problems.append(
                    f"parameter {path} is spread over several processes: export a checkpoint of the run instead"
                )
        raise_problems(target, problems)

    def read(self, bound: Bound, place: tuple[int, ...]) -> np.ndarray:
        """See `Tensors`."""
        leaves = [_fetch(self._flat[path], place) for path in bound.leaves]
        return bound.to_file(np.concatenate(leaves, axis=-1))

    def sums(self) -> dict[str, int]:
        """None: memory does not rot."""
        return {}


class RunTensors:
    """Those of a checkpoint of a run, read from its arrays on disk or in a bucket without a device, in parts."""

    def __init__(self, step: AnyPath):
        """`step` is the folder of the checkpoint."""
        self._step, self._sums = step, {}
        state = step / "state"
        try:
            tree = json.loads((state / "_METADATA").read_text())
            keys = [[key["key"] for key in leaf["key_metadata"]] for leaf in tree["tree_metadata"].values()]
            driver = "zarr3" if tree["use_zarr3"] else "zarr"
            base = f"{state}/" if is_remote(state) else f"file://{state.absolute()}/"
            specs = {
                "/".join(path[1:]): {
                    "driver": driver,
                    "kvstore": {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"},
                }
                for path in keys
                if path[0] == "params"
            }
            opened = {path: ts.open(spec, read=True, open=True) for path, spec in specs.items()}
            self._arrays = {path: future.result() for path, future in opened.items()}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{step}: its arrays cannot be opened ({str(error).splitlines()[0][:300]}); take an earlier checkpoint"
            ) from error

    def check(self, target, rows: list[Bound]) -> None:
        """See `Tensors`."""
        raise_problems(self._step, compared({path: tuple(array.shape) for path, array in self._arrays.items()}, rows))

    def read(self, bound: Bound, place: tuple[int, ...]) -> np.ndarray:
        """See `Tensors`."""
        leaves = [self.part(path, place) for path in bound.leaves]
        return bound.to_file(np.concatenate(leaves, axis=-1) if len(leaves) > 1 else leaves[0])

    def part(self, path: str, place: tuple[int, ...]) -> np.ndarray:
        """One layer, or one expert of a layer, of a leaf; nothing else of the array is read but what is stored with it."""
        try:
            array = np.ascontiguousarray(self._arrays[path][place].read().result())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._step}: {path} cannot be read ({str(error).splitlines()[0][:300]})"
            ) from error
        words = array.view(f"uint{8 * array.dtype.itemsize}").sum(dtype=np.uint32)
        name = f"params/{path}"
        self._sums[name] = (self._sums.get(name, 0) + int(words)) % WORDS
        return array

    def sums(self) -> dict[str, int]:
        """See `Tensors`."""
        taken, self._sums = self._sums, {}
        return taken


class PublicTensors:
    """Those of public files that were checked (huggingface.py: open_files)."""

    def __init__(self, files: TensorFiles):
        self._files = files

    def check(self, target, rows: list[Bound]) -> None:
        """Nothing is left to be checked."""

    def read(self, bound: Bound, place: tuple[int, ...]) -> np.ndarray:
        """See `Tensors`."""
        return self._files.values(bound.name(place), bound.shape, 0, bound.shape[0]).astype(np.float32)

    def sums(self) -> dict[str, int]:
        """None: the files have no sums."""
        return {}


def compared(shapes: dict[str, tuple[int, ...]], rows: list[Bound]) -> list[str]:
    """What is wrong with leaves of these shapes."""
    expected = {path: tuple(shape) for bound in rows for path, shape in bound.leaves.items()}
    problems = [f"parameter {path} is missing" for path in expected.keys() - shapes.keys()]
    problems += [f"parameter {path} is not part of this model" for path in shapes.keys() - expected.keys()]
    for path in expected.keys() & shapes.keys():
        if shapes[path] != expected[path]:
            problems.append(f"parameter {path} has shape {shapes[path]}; the config asks for {expected[path]}")
    return problems


def _fetch(leaf, place: tuple[int, ...]) -> np.ndarray:
    """One layer and expert of a leaf, on the host; from a sharded leaf, without gathering the rest."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[place]
    out = np.empty(leaf.shape[len(place) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        spans = [cut.indices(size)[:2] for cut, size in zip(shard.index, leaf.shape, strict=True)]
        inside = all(first <= i < last for i, (first, last) in zip(place, spans, strict=False))
        if shard.replica_id == 0 and inside:
            local = tuple(i - first for i, (first, _) in zip(place, spans, strict=False))
            out[tuple(slice(*span) for span in spans[len(place) :])] = np.asarray(_pick(shard.data, local))
    return out


@jax.jit
def _pick(array, place):
    """array[place], compiled once for all places."""
    rest = array.shape[len(place) :]
    starts = (*place, *[0] * len(rest))
    return jax.lax.dynamic_slice(array, starts, (*[1] * len(place), *rest)).reshape(rest)
