"""Hugging Face checkpoints of Kimi K2.5, read and written one tensor at a time (K2.5 §3.1, §3.2).

Files are in the safetensors format (tensor_files.py). Their names and axes are those of layout.py. Experts may be
INT4, matrices FP8 (quantised.py).
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from k25_jax.checkpoint.export import Form, export
from k25_jax.checkpoint.hf_config import declared_encoding
from k25_jax.checkpoint.layout import LANGUAGE, VISION, Bound, axes_of, bind, public_name
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import TensorFiles
from k25_jax.checkpoint.tensors import TreeTensors
from k25_jax.config import K25Config
from k25_jax.runtime.paths import absolute, to_path

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
    files, rows = open_files(directory, config, text_only), bind(config, text_only)
    shardings = flatten_dict(shardings, sep="/") if shardings is not None else None
    tree, total = {}, sum(len(bound.leaves) for bound in rows)
    for bound in rows:
        for path, shape in bound.leaves.items():
            leaf_dtype = np.dtype(np.float32 if "router" in path else dtype)
            tree[path] = _leaf(files, bound, path, shape, leaf_dtype, shardings and shardings[path])
            if progress:
                progress(path, len(tree), total)
    return unflatten_dict(tree, sep="/")


def open_files(directory, config: K25Config, text_only: bool = False) -> TensorFiles:
    """The tensors of a public checkpoint, or CheckpointError with all that is wrong with its files; reads no data yet."""
    files = TensorFiles(directory, public_name)
    _check_files(files, bind(config, text_only), config, text_only)
    return files


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
    generation_config.json. The folder appears whole or not at all (export.py).
    """
    form = Form(np.dtype(dtype).name, quantise or "", shard_bytes, text_only)
    target = absolute(to_path(directory))
    export(TreeTensors(params), config, target, form, generation=generation, progress=progress)
