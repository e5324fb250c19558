"""Checkpoints in the public format, written one tensor at a time by one process or by all of a pod (K2.5 §3.2, §3.8).

Each process writes whole files, every so-manieth, of tensors that it reads itself. A file has its name only when all of it is
there, so that an export that was killed goes on with the files that are missing. The index is written last.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import BinaryIO

import jax
import numpy as np

from k25_jax.checkpoint import quantised
from k25_jax.checkpoint.folders import CheckpointError
from k25_jax.checkpoint.hf_config import GENERATION, write_config, write_token_ids
from k25_jax.checkpoint.layout import LANGUAGE, Bound, bind
from k25_jax.checkpoint.tensor_files import DTYPES, INDEX
from k25_jax.checkpoint.tensors import WORDS, Tensors
from k25_jax.config import K25Config
from k25_jax.runtime.paths import AnyPath, drafted, is_remote, make_folder, names, write
from k25_jax.sharding import processes

WRITTEN = (INDEX, "config.json", GENERATION)
PLAN = "export.json"  # what an unfinished export is of
SUMS = ".sums"  # beside an unfinished export's files: the sums of what went into them


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write: its place in the leaves, its encoding, and dtype and shape of each stored part."""

    bound: Bound
    place: tuple[int, ...]
    encoding: str
    parts: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def layer(self) -> int:
        return self.bound.first_layer + sum(self.place[:1])

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Form:
    """How a checkpoint is written; the fields are those of `huggingface.save_params`."""

    dtype: str = "bfloat16"
    quantise: str = ""
    shard_bytes: float = 5e9
    text_only: bool = False

    def files(self, config: K25Config) -> dict[str, list[Entry]]:
        """The tensors of each file, layer by layer. Raises CheckpointError."""
        names = {np.dtype(kind).name: name for name, kind in DTYPES.items() if name in quantised.FLOATS}
        if self.dtype not in names or self.quantise not in quantised.ENCODINGS:
            raise CheckpointError(f"cannot write dtype={self.dtype}, quantise={self.quantise!r}")
        entries = _entries(bind(config, self.text_only), names[self.dtype], self.quantise, self.text_only)
        shards = _split(entries, self.shard_bytes)
        return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}

    def configs(self, config: K25Config, generation: dict | None) -> dict[str, dict]:
        """The contents of the files beside the weights."""
        contents = write_config(config, self.text_only) | {"dtype": self.dtype}
        if self.quantise:
            of_text = contents if self.text_only else contents["text_config"]
            of_text["quantization_config"] = quantised.describe(self.quantise)
        return {"config.json": contents, GENERATION: (generation or {}) | write_token_ids(config)}


def export(
    tensors: Tensors,
    config: K25Config,
    target: AnyPath,
    form: Form,
    source: str = "",
    expected: dict[str, int] | None = None,
    generation: dict | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a checkpoint into the folder `target`, which appears whole or not at all; all processes call this.

    In a bucket, which has no renaming, `target` is a folder that was empty, and no checkpoint before its index is there.

    In an older checkpoint's place the folder keeps the files that are not weights. With a `source`, a name of what is
    written, an export that was killed goes on where it was. `expected` are the sums of the bits of its leaves.
    `progress(file, done, total)` is called after each file of this process.
    """
    tensors.check(target, bind(config, form.text_only))
    files = form.files(config)
    plan = {"source": source, "files": len(files)} | dataclasses.asdict(form) if source else None
    own = list(files)[jax.process_index() :: jax.process_count()]
    with _replacing(target, plan) as folder:
        for number, name in enumerate(own, 1):
            if not (folder / name).exists():
                _write_file(folder / name, files[name], tensors)
            if progress:
                progress(name, number, len(own))
        processes.met("export: all files are written")
        if jax.process_index() == 0:
            if expected:
                _compare(folder, files, expected, source)
            weight_map = {part: name for name, shard in files.items() for entry in shard for part in entry.parts}
            total = sum(entry.size for shard in files.values() for entry in shard)
            index = {INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}}
            for name, values in (form.configs(config, generation) | index).items():
                write(folder / name, json.dumps(values, indent=2) + "\n")
    processes.met("export: done")


def _entries(rows: list[Bound], dtype: str, quantise: str, text_only: bool) -> list[Entry]:
    """All tensors, layer by layer."""
    entries, groups = [], [bound.tensor.name.partition("{layer}")[0] for bound in rows]
    for bound in rows:
        encoding = quantise if quantise in bound.tensor.encodings else ""
        kept = "F32" if bound.tensor.float32 else dtype
        for place in np.ndindex(bound.stack):
            name = bound.name(place).removeprefix(LANGUAGE if text_only else "")
            stored = quantised.parts(name, bound.shape, encoding)
            parts = {name: (dtypes[0] if encoding else kept, shape) for name, (dtypes, shape) in stored.items()}
            entries.append(Entry(bound, place, encoding, parts))
    entries.sort(key=lambda entry: (groups.index(entry.bound.tensor.name.partition("{layer}")[0]), entry.layer))
    return entries


def _split(entries: list[Entry], shard_bytes: float) -> list[list[Entry]]:
    """Runs of entries of at most `shard_bytes`, but at least one."""
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def _write_file(path: AnyPath, shard: list[Entry], tensors: Tensors) -> None:
    """A safetensors file; its larger types come first, so that every tensor is aligned."""
    parts = {name: kind for entry in shard for name, kind in entry.parts.items()}
    header, starts, position = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, (dtype, shape) in sorted(parts.items(), key=lambda part: -DTYPES[part[1][0]].itemsize):
        starts[name], position = position, position + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], position]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with drafted(path) as draft, open(draft, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in shard:
            _write_tensor(file, entry, {name: 8 + len(head) + starts[name] for name in entry.parts}, tensors)
        file.flush()
        os.fsync(file.fileno())
        if sums := tensors.sums():
            write(path.with_name(path.name + SUMS), json.dumps(sums))


def _write_tensor(file: BinaryIO, entry: Entry, starts: dict[str, int], tensors: Tensors) -> None:
    """Read a tensor and write its parts where they start; nothing of it is held afterwards."""
    try:
        arrays = quantised.encode(tensors.read(entry.bound, entry.place), entry.encoding)
    except ValueError as error:
        raise CheckpointError(f"{entry.bound.name(entry.place)} {error}") from error
    for (name, (dtype, _)), array in zip(entry.parts.items(), arrays, strict=True):
        file.seek(starts[name])
        file.write(np.ascontiguousarray(array, DTYPES[dtype]).view(np.uint8))


def _compare(folder: AnyPath, files, expected: dict[str, int], source: str) -> None:
    """Raise CheckpointError where what went into the files is not what the run had saved."""
    read: dict[str, int] = {}
    for name in files:
        for leaf, number in json.loads((folder / (name + SUMS)).read_text()).items():
            read[leaf] = (read.get(leaf, 0) + number) % WORDS
    damaged = [leaf for leaf, number in read.items() if expected.get(leaf) != number]
    if damaged:
        raise CheckpointError(
            f"{source}: checkpoint is damaged ({len(damaged)} arrays, as {damaged[0]}); delete that folder to export an "
            "earlier one"
        )


# ----------------------------------------------------------------------------------------------------------- the folder
@contextlib.contextmanager
def _replacing(target: AnyPath, plan: dict | None) -> Iterator[AnyPath]:
    """A folder that takes the place of `target` once all of it is written; on an error, nothing has changed.

    With a `plan` it stays for the next try, which goes on with it if its plan is the same.
    """
    first = jax.process_index() == 0
    remote = is_remote(target)
    if first and not remote and target.exists() and not _replaceable(target):
        raise CheckpointError(f"{target} is in the way and is not a checkpoint: choose an empty or new folder")
    folder = target if remote else target.with_name(f".{target.name}.partial" + ("" if plan else f"-{os.getpid()}"))
    try:
        if first:
            _prepare(folder, plan)
        processes.met("export: the folder is there")
        if plan and not (folder / PLAN).exists():
            raise CheckpointError(
                f"--output={target} is another folder in process {jax.process_index()}: choose one that all processes share"
            )
        yield folder
        if first:
            _forget_plan(folder)
            if not remote:
                _put(folder, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}; it is as it was") from error
    except CheckpointError:  # of what is read: what was written is of no use
        plan = None
        raise
    finally:
        if first and not plan and not remote:
            shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: AnyPath, plan: dict | None) -> None:
    """An empty folder, or the one of an export by the same plan that did not come to its end."""
    if plan and folder.exists():
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / PLAN).read_text()) == plan:
                return
        if not is_remote(folder):
            shutil.rmtree(folder)
    if is_remote(folder) and folder.exists():
        raise CheckpointError(f"{folder} is in the way: what is in a bucket is not replaced; choose an empty folder")
    make_folder(folder)
    if plan:
        write(folder / PLAN, json.dumps(plan))


def _forget_plan(folder: AnyPath) -> None:
    """What only an export that goes on needs."""
    for name in names(folder):
        if name == PLAN or name.endswith(SUMS):
            (folder / name).unlink()


def _put(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Give a finished folder its name."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists():
            for item in target.iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.copytree(item, folder / item.name, symlinks=True)
                elif item.name not in WRITTEN and item.suffix != ".safetensors":
                    shutil.copy2(item, folder / item.name, follow_symlinks=False)
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(target: pathlib.Path) -> bool:
    if not target.is_dir():
        return False
    names = [item.name for item in target.iterdir()]
    return not names or ("config.json" in names and any(name.endswith(".safetensors") for name in names))
