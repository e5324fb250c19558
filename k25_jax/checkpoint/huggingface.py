"""Hugging Face checkpoints of Kimi K2.5, read and written one tensor at a time (K2.5 §3.1, §3.2).

`TABLE` says which tensor of the files is which leaf of the parameter tree, and how its axes are turned; reading,
checking and writing all follow it. Files are in the safetensors format, under the public names; what `transformers`
writes, and a language model alone, is read through `ALIASES`. Experts may be INT4, matrices FP8 (see quantised.py).
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
from k25_jax.checkpoint.hf_config import write_config
from k25_jax.checkpoint.quantised import DTYPES, INDEX, TensorFiles, raise_problems
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.config import K25Config
from k25_jax.models.k25 import abstract_params

# ------------------------------------------------------------------------------------------------------------ the table
VECTOR, MATRIX = "d -> d", "o i -> i o"  # axes in the file -> axes of one layer (and expert) of the leaf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the files, one for each layer and expert if its name says so, and the leaf of the tree that it is.

    Where it is two leaves, it holds them joined along their last axis.
    """

    name: str
    leaves: str
    axes: str = VECTOR
    encodings: tuple[str, ...] = ()  # how `save_params` may quantise it
    float32: bool = False  # written in float32, whatever the dtype of the rest


def _table() -> tuple[Tensor, ...]:
    layer, block = "language_model.model.layers.{layer}.", "vision_tower.encoder.blocks.{layer}."
    experts = layer + "mlp.experts.{expert}."
    fp8, any_encoding = ("fp8",), ("fp8", "int4")
    tensors = [Tensor("language_model.model.embed_tokens.weight", "embed", "v d -> v d")]
    for stack in ("dense", "moe"):
        attention, leaf = layer + "self_attn.", f"{stack}/attention/"
        tensors += [
            Tensor(layer + "input_layernorm.weight", f"{stack}/attention_norm"),
            Tensor(attention + "q_proj.weight", leaf + "q", "(h d) i -> i h d", fp8),
            Tensor(attention + "q_a_proj.weight", leaf + "q_a", MATRIX, fp8),
            Tensor(attention + "q_a_proj.bias", leaf + "q_a_bias"),
            Tensor(attention + "q_a_layernorm.weight", leaf + "q_a_norm"),
            Tensor(attention + "q_b_proj.weight", leaf + "q_b", "(h d) i -> i h d", fp8),
            Tensor(attention + "kv_a_proj_with_mqa.weight", leaf + "kv_a", MATRIX, fp8),
            Tensor(attention + "kv_a_proj_with_mqa.bias", leaf + "kv_a_bias"),
            Tensor(attention + "kv_a_layernorm.weight", leaf + "kv_a_norm"),
            Tensor(attention + "kv_b_proj.weight", f"{leaf}k_b {leaf}v_b", "(h d) i -> i h d", fp8),
            Tensor(attention + "o_proj.weight", leaf + "o", "o (h d) -> h d o", fp8),
            Tensor(attention + "o_proj.bias", leaf + "o_bias"),
            Tensor(layer + "post_attention_layernorm.weight", f"{stack}/mlp_norm"),
        ]
    tensors += [
        Tensor(layer + "mlp.gate.weight", "moe/moe/router", MATRIX),
        Tensor(layer + "mlp.gate.e_score_correction_bias", "moe/moe/router_bias", float32=True),
    ]
    for part in ("gate", "up", "down"):
        tensors += [
            Tensor(f"{layer}mlp.{part}_proj.weight", f"dense/mlp/{part}", MATRIX, fp8),
            Tensor(f"{layer}mlp.shared_experts.{part}_proj.weight", f"moe/moe/shared/{part}", MATRIX, fp8),
            Tensor(f"{experts}{part}_proj.weight", f"moe/moe/experts/{part}", MATRIX, any_encoding),
        ]
    tensors += [
        Tensor("language_model.model.norm.weight", "final_norm"),
        Tensor("language_model.lm_head.weight", "head", MATRIX),
        Tensor("vision_tower.patch_embed.proj.weight", "vision/patch_embed/kernel", "o c h w -> (c h w) o"),
        Tensor("vision_tower.patch_embed.proj.bias", "vision/patch_embed/bias"),
        Tensor("vision_tower.patch_embed.pos_emb.weight", "vision/pos_table", "y x d -> y x d"),
        Tensor(block + "wqkv.weight", "vision/blocks/qkv", "(t h d) i -> i t h d"),
        Tensor(block + "wqkv.bias", "vision/blocks/qkv_bias", "(t h d) -> t h d"),
        Tensor(block + "wo.weight", "vision/blocks/out", "o (h d) -> h d o"),
        Tensor(block + "wo.bias", "vision/blocks/out_bias"),
    ]
    for layer_norm, leaf in (
        (block + "norm0", "vision/blocks/norm0"),
        (block + "norm1", "vision/blocks/norm1"),
        ("vision_tower.encoder.final_layernorm", "vision/final_norm"),
        ("mm_projector.pre_norm", "projector/norm"),
    ):
        tensors += [Tensor(layer_norm + ".weight", leaf + "/scale"), Tensor(layer_norm + ".bias", leaf + "/bias")]
    for linear, leaf in (
        (block + "mlp.fc0", "vision/blocks/fc0"),
        (block + "mlp.fc1", "vision/blocks/fc1"),
        ("mm_projector.proj.0", "projector/fc0"),
        ("mm_projector.proj.2", "projector/fc1"),
    ):
        tensors += [Tensor(linear + ".weight", leaf, MATRIX), Tensor(linear + ".bias", leaf + "_bias")]
    return tuple(tensors)


TABLE = _table()


# beginnings of names in other layouts -> the public ones
ALIASES = (
    ("language_model.model.blocks.", "language_model.model.layers."),  # transformers
    ("model.mm_projector.", "mm_projector."),
    ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ("model.layers.", "language_model.model.layers."),  # a language model alone
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
VISION = ("vision_tower.", "mm_projector.")


def public_name(name: str) -> str:
    """The public name of a tensor, whichever layout it was stored in."""
    for other, public in ALIASES:
        if name.startswith(other):
            return public + name[len(other) :]
    return name


@dataclasses.dataclass(frozen=True)
class Bound:
    """A row of the table in a model of known size.

    A `place` says which layer and expert of the stacked leaf: (), (y,) or (y, e).
    """

    tensor: Tensor
    leaves: dict[str, tuple[int, ...]]  # path in the tree -> shape
    stack: tuple[int, ...]  # leading sizes of the leaves: layers, experts
    first_layer: int  # number of layer y = 0 in the names
    lengths: dict[str, int]  # sizes of the axes that `tensor.axes` names
    shape: tuple[int, ...]  # in the files

    def name(self, place: tuple[int, ...]) -> str:
        layer, expert = (*place, 0, 0)[:2]
        return self.tensor.name.format(layer=self.first_layer + layer, expert=expert)

    def to_leaf(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, self.tensor.axes, **self.lengths)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, " -> ".join(reversed(self.tensor.axes.split(" -> "))), **self.lengths)


def _axes(tensor: Tensor) -> tuple[list[str], list[str]]:
    """The axes in the file and in the leaf: "(h d) i -> i h d" gives ["(h d)", "i"], ["i", "h", "d"]."""
    before, after = (re.findall(r"\([^)]*\)|\w+", side) for side in tensor.axes.split(" -> "))
    return before, after


def bind(config: K25Config, text_only: bool = False) -> list[Bound]:
    """The rows of the table that a model of this config has."""
    tree = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    if text_only:
        tree = {path: shape for path, shape in tree.items() if not path.startswith(("vision/", "projector/"))}
    rows = []
    for tensor in TABLE:
        leaves = {path: tree[path] for path in tensor.leaves.split() if path in tree}
        if not leaves:
            continue
        count = tensor.name.count("{")
        *shapes, last = (shape[count:] for shape in leaves.values())
        joined = (*last[:-1], last[-1] + sum(shape[-1] for shape in shapes))
        before, after = _axes(tensor)
        lengths = {"c": 3, "h": config.vision.patch_size, "w": config.vision.patch_size}
        lengths |= dict(zip(after, joined, strict=True))
        groups = [axis.strip("()").split() for axis in before]
        rows.append(
            Bound(
                tensor,
                leaves,
                stack=leaves[next(iter(leaves))][:count],
                first_layer=config.text.dense_layers if tensor.leaves.startswith("moe/") else 0,
                lengths={name: lengths[name] for group in groups for name in group},
                shape=tuple(math.prod(lengths[name] for name in group) for group in groups),
            )
        )
    return rows


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
    present = files.tensors.keys() | files.lost
    if not text_only and present and not any(name.startswith(VISION) for name in present):
        raise CheckpointError(f"{files.source} holds a language model alone: load it with text_only=True")

    def harmless(name: str) -> bool:
        layer = re.match(r"language_model\.model\.layers\.(\d+)\.", name)
        return bool(
            name.endswith(".rotary_emb.inv_freq")
            or (layer and int(layer[1]) >= config.text.layers)  # multi-token prediction
            or (text_only and name.startswith(VISION))
        )

    files.check({bound.name(place): bound.shape for bound in rows for place in np.ndindex(bound.stack)}, harmless)


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
    before, after = _axes(bound.tensor)
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
):
    """Write a checkpoint under the public names, with its index and config.json, one tensor in memory at a time.

    `dtype` is float32, bfloat16 or float16. `quantise` is None, "int4" (routed experts) or "fp8" (the matrices of the
    language model's layers). The folder appears whole or not at all; in an older checkpoint's place, it keeps the
    files that are not weights. `progress(file, done, total)` is called after each file.
    """
    names = {kind: name for name, kind in DTYPES.items() if name in quantised.FLOATS}
    if np.dtype(dtype) not in names or (quantise or "") not in quantised.ENCODINGS:
        raise CheckpointError(f"{directory}: cannot write dtype={np.dtype(dtype)}, quantise={quantise!r}")
    contents = write_config(config) | {"dtype": np.dtype(dtype).name}
    if quantise:
        contents["text_config"]["quantization_config"] = quantised.describe(quantise)
    flat = flatten_dict(params, sep="/")
    rows = bind(config)
    _check_tree(directory, flat, rows)
    shards = _split(_entries(rows, names[np.dtype(dtype)], quantise or ""), shard_bytes)
    weight_map, total = {}, 0
    with _replacing(pathlib.Path(directory).absolute()) as folder:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, shard, flat)
            weight_map |= {part: file for entry in shard for part in entry.parts}
            total += sum(entry.size for entry in shard)
            if progress:
                progress(file, number, len(shards))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for file, values in ((INDEX, index), ("config.json", contents)):
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


def _entries(rows: list[Bound], dtype: str, quantise: str) -> list[Entry]:
    """All tensors, layer by layer."""
    entries, groups = [], [bound.tensor.name.partition("{layer}")[0] for bound in rows]
    for bound in rows:
        encoding = quantise if quantise in bound.tensor.encodings else ""
        kept = "F32" if bound.tensor.float32 else dtype
        for place in np.ndindex(bound.stack):
            stored = quantised.parts(bound.name(place), bound.shape, encoding)
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
                if not (item.name in (INDEX, "config.json") or item.suffix == ".safetensors"):
                    (shutil.copytree if item.is_dir() else shutil.copy2)(item, folder / item.name)
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
