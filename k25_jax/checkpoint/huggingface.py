"""Hugging Face checkpoints of Kimi K2.5, read and written one tensor at a time (K2.5 §3.1, §3.2).

Files are in the safetensors format (tensor_files.py). Their names and axes are those of layout.py. Experts may be
INT4, matrices FP8 (quantised.py).
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from k25_jax.checkpoint import quantised
from k25_jax.checkpoint.hf_config import GENERATION, declared_encoding, write_config, write_token_ids
from k25_jax.checkpoint.layout import LANGUAGE, VISION, Bound, axes_of, bind, public_name
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import DTYPES, INDEX, TensorFiles, raise_problems
from k25_jax.config import K25Config
from k25_jax.runtime.paths import UPLOAD, local_only

WRITTEN = (INDEX, "config.json", GENERATION)
EMBED, HEAD, NORM = (f"{LANGUAGE}{name}.weight" for name in ("model.embed_tokens", "lm_head", "model.norm"))
CHUNK = 2**22  # numbers that are compared at once


# ------------------------------------------------------------------------------------------------------------- reading
def load_params(
    directory,
    config: K25Config,
    shardings=None,
    dtype=jnp.float32,
    progress: Callable[[str, int, int], None] | None = None,
    text_only: bool = False,
):
    """The parameter tree in a checkpoint; the router stays float32 whatever `dtype` is.

    Each device's shard of a leaf is put together on its own, from the rows of the files that it needs, and handed over
    before the next. `shardings` is a tree like the parameters. `progress(leaf, done, total)` is called after each leaf.
    `text_only` leaves out the vision encoder and the projector. Raises CheckpointError with all that is wrong with the
    files before any data is read.
    """
    files, rows = TensorFiles(directory, public_name), bind(config, text_only)
    _check_files(files, rows, config, text_only)
    shardings = flatten_dict(shardings, sep="/") if shardings is not None else None
    tree, total = {}, sum(len(bound.leaves) for bound in rows)
    for bound in rows:
        for path, shape in bound.leaves.items():
            leaf_dtype = np.dtype(np.float32 if "router" in path else dtype)
            tree[path] = _leaf(files, bound, path, shape, leaf_dtype, shardings and shardings[path])
            if progress:
                progress(path, len(tree), total)
    return unflatten_dict(tree, sep="/")


def _check_files(files: TensorFiles, rows: list[Bound], config: K25Config, text_only: bool):
    """Raise CheckpointError unless the files hold this model: first what bounds the work, then each tensor."""
    present = files.tensors.keys() | files.lost
    if not text_only and present and not any(name.startswith(VISION) for name in present):
        raise CheckpointError(
            f"{files.source} holds a language model alone, but its config an encoder: fetch the other files, or load it with "
            "text_only=True"
        )
    asked = sum(math.prod(bound.stack) for bound in rows)
    if asked > 10 * len(present) + 10_000:
        sizes = f"num_hidden_layers={config.text.layers}, n_routed_experts={config.text.moe.experts}"
        raise CheckpointError(
            f"{files.source}: the config asks for {asked:,} tensors ({sizes}, vision layers={config.vision.layers}), the "
            f"files hold {len(present):,}: correct config.json, or fetch the files again"
        )
    _check_encoding(files)
    tied = config.text.tie_embeddings

    def harmless(name: str) -> bool:
        layer = re.match(r"language_model\.model\.layers\.(\d+)\.", name)
        return bool(
            name.endswith(".rotary_emb.inv_freq")
            or (layer and int(layer[1]) >= config.text.layers)  # multi-token prediction
            or (text_only and name.startswith(VISION))
            or (tied and name == HEAD)
        )

    files.check({bound.name(place): bound.shape for bound in rows for place in np.ndindex(bound.stack)}, harmless)
    if tied and HEAD in files.tensors:
        _check_tied(files, (config.text.vocab_size, config.text.d_model))
    if not files.read(NORM).any():
        raise CheckpointError(f"{files.tensors[NORM].file}: {NORM} is all zeros: these are not the weights of a model")


def _check_encoding(files: TensorFiles):
    """Raise CheckpointError where quantization_config says other than the files."""
    file = files.source / "config.json"
    declared = declared_encoding(file) if file.is_file() else ""
    for encoding, name in files.encodings().items():
        if declared not in ("", encoding):
            raise CheckpointError(
                f"{file}: quantization_config says {declared}, but {name} is stored as {encoding}: fetch both again"
            )


def _check_tied(files: TensorFiles, shape: tuple[int, int]):
    """Raise CheckpointError unless the head that the files keep beside a tied embedding is equal to it."""
    vocabulary, width = shape
    rows, equal = max(1, CHUNK // width), files.tensors[HEAD].shape == shape
    for first in range(0, vocabulary if equal else 0, rows):
        embed, head = (files.values(name, shape, first, min(first + rows, vocabulary)) for name in (EMBED, HEAD))
        equal = equal and bool((embed.astype(np.float32) == head.astype(np.float32)).all())
    if not equal:
        raise CheckpointError(
            f"{files.source}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight: set it to "
            "false in config.json to use both"
        )


def _leaf(files: TensorFiles, bound: Bound, path: str, shape, dtype: np.dtype, sharding) -> jax.Array:
    """A leaf on the devices of its sharding, one distinct shard after the other."""
    if sharding is None:
        return jax.device_put(_shard(files, bound, path, [(0, size) for size in shape], dtype))
    devices = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        spans = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        devices.setdefault(spans, []).append(device)
    shards = []
    for spans, holders in devices.items():
        host = _shard(files, bound, path, spans, dtype)
        shards += jax.block_until_ready([jax.device_put(host, device) for device in holders])
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def _shard(files: TensorFiles, bound: Bound, path: str, spans, dtype: np.dtype) -> np.ndarray:
    """The part of a leaf between `spans`, (first, last) along each axis, read from the files."""
    out = np.empty([last - first for first, last in spans], dtype)
    stacked, inner = spans[: len(bound.stack)], spans[len(bound.stack) :]
    for place in np.ndindex(*[last - first for first, last in stacked]):
        name = bound.name(tuple(i + first for i, (first, _) in zip(place, stacked, strict=True)))
        out[place] = _read(files, bound, path, name, inner)
    return out


def _read(files: TensorFiles, bound: Bound, path: str, name: str, spans) -> np.ndarray:
    """The part of one tensor that leaf `path` has between `spans`, its axes turned."""
    before, after = axes_of(bound.tensor)
    cuts = [slice(*span) for span in spans]
    if before[0] in after and len(bound.leaves) == 1:  # the file's rows are an axis of the leaf: read no others
        axis = after.index(before[0])
        array = files.values(name, bound.shape, *spans[axis])
        cuts[axis] = slice(None)
        return rearrange(array, bound.tensor.axes, **bound.lengths | {before[0]: len(array)})[tuple(cuts)]
    array = bound.to_leaf(files.values(name, bound.shape, 0, bound.shape[0]))
    paths = list(bound.leaves)
    offset = sum(bound.leaves[other][-1] for other in paths[: paths.index(path)])
    cuts[-1] = slice(spans[-1][0] + offset, spans[-1][1] + offset)
    return array[tuple(cuts)]


# ------------------------------------------------------------------------------------------------------------- writing
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


def save_params(
    params,
    config: K25Config,
    directory,
    dtype=jnp.bfloat16,
    quantise: str | None = None,
    shard_bytes: float = 5e9,
    progress: Callable[[str, int, int], None] | None = None,
    text_only: bool = False,
    generation: dict | None = None,
):
    """Write a checkpoint under the public names, with its index and configs, one tensor in memory at a time.

    `dtype` is float32, bfloat16 or float16. `quantise` is None, "int4" (routed experts) or "fp8" (the matrices of the
    language model's layers). `text_only` writes the layout of a language model alone; `generation` are further fields of
    generation_config.json. The folder appears whole or not at all; in an older checkpoint's place, it keeps the
    files that are not weights. `progress(file, done, total)` is called after each file.
    """
    names = {kind: name for name, kind in DTYPES.items() if name in quantised.FLOATS}
    if np.dtype(dtype) not in names or (quantise or "") not in quantised.ENCODINGS:
        raise CheckpointError(f"{directory}: cannot write dtype={np.dtype(dtype)}, quantise={quantise!r}")
    contents = write_config(config, text_only) | {"dtype": np.dtype(dtype).name}
    if quantise:
        (contents if text_only else contents["text_config"])["quantization_config"] = quantised.describe(quantise)
    configs = {"config.json": contents, GENERATION: (generation or {}) | write_token_ids(config)}
    flat = flatten_dict(params, sep="/")
    rows = bind(config, text_only)
    _check_tree(directory, flat, rows)
    shards = _split(_entries(rows, names[np.dtype(dtype)], quantise or "", text_only), shard_bytes)
    weight_map, total = {}, 0
    with _replacing(local_only(directory, "directory", UPLOAD).absolute()) as folder:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, shard, flat)
            weight_map |= {part: file for entry in shard for part in entry.parts}
            total += sum(entry.size for entry in shard)
            if progress:
                progress(file, number, len(shards))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for file, values in ({INDEX: index} | configs).items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_tree(directory, flat: dict, rows: list[Bound]):
    expected = {path: shape for bound in rows for path, shape in bound.leaves.items()}
    problems = [f"parameter {path} is missing" for path in expected.keys() - flat.keys()]
    problems += [f"parameter {path} is not part of this model" for path in flat.keys() - expected.keys()]
    for path in expected.keys() & flat.keys():
        if tuple(flat[path].shape) != tuple(expected[path]):
            problems.append(f"parameter {path} has shape {flat[path].shape}; the config asks for {expected[path]}")
        elif isinstance(flat[path], jax.Array) and not flat[path].is_fully_addressable:
            problems.append(f"parameter {path} is spread over several processes: gather it first")
    raise_problems(directory, problems)


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


def _write_shard(path: pathlib.Path, shard: list[Entry], flat: dict):
    """A safetensors file; its larger types come first, so that every tensor is aligned."""
    parts = {name: kind for entry in shard for name, kind in entry.parts.items()}
    header, starts, position = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, (dtype, shape) in sorted(parts.items(), key=lambda part: -DTYPES[part[1][0]].itemsize):
        starts[name], position = position, position + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], position]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in shard:
            leaves = [_fetch(flat[leaf], entry.place) for leaf in entry.bound.leaves]
            try:
                arrays = quantised.encode(entry.bound.to_file(np.concatenate(leaves, axis=-1)), entry.encoding)
            except ValueError as error:
                raise CheckpointError(f"{entry.bound.name(entry.place)} {error}") from error
            for (name, (dtype, _)), array in zip(entry.parts.items(), arrays, strict=True):
                file.seek(8 + len(head) + starts[name])
                file.write(np.ascontiguousarray(array, DTYPES[dtype]).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())


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


@contextlib.contextmanager
def _replacing(target: pathlib.Path):
    """A new folder that takes the place of `target` once all of it is written; on an error, nothing has changed."""
    if target.exists() and not _replaceable(target):
        raise CheckpointError(f"{target} is in the way and is not a checkpoint: choose an empty or new folder")
    folder, old = (target.with_name(f".{target.name}.{part}-{os.getpid()}") for part in ("partial", "old"))
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            for item in target.iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.copytree(item, folder / item.name, symlinks=True)
                elif item.name not in WRITTEN and item.suffix != ".safetensors":
                    shutil.copy2(item, folder / item.name, follow_symlinks=False)
            target.rename(old)
        folder.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}; it is as it was") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(target: pathlib.Path) -> bool:
    if not target.is_dir():
        return False
    names = [item.name for item in target.iterdir()]
    return not names or ("config.json" in names and any(name.endswith(".safetensors") for name in names))
