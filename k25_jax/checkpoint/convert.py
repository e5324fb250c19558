"""Any checkpoint to a folder in the public format, with its vocabulary and what else lies beside the weights."""

import contextlib
import json
import pathlib
import shutil

import jax.numpy as jnp

from k25_jax.checkpoint.folders import CheckpointError, find, read_experiment
from k25_jax.checkpoint.hf_config import language_model_alone, read_config, read_generation
from k25_jax.checkpoint.huggingface import WRITTEN, load_params, save_params
from k25_jax.checkpoint.layout import public_name
from k25_jax.checkpoint.load import is_byte_level
from k25_jax.checkpoint.store import restore_params
from k25_jax.checkpoint.tensor_files import TensorFiles
from k25_jax.config import K25Config
from k25_jax.models.k25 import abstract_params
from k25_jax.runtime.paths import (
    UPLOAD,
    AnyPath,
    absolute,
    download,
    is_remote,
    local_only,
    names,
    size_and_time,
    to_path,
)
from k25_jax.text.tokenizer import VOCABULARIES, TokenizerError, find_vocabulary
from k25_jax.text.tokenizer_json import byte_level_files

WEIGHTS = ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .npy .zip .tar .gz .tflite .part".split()
VOCABULARY = ("tokeniz", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges", *VOCABULARIES)
MOST_BYTES = 200_000_000  # of a file that is carried
SHOWN = 10  # names in a line


def convert(checkpoint: str, output: str, dtype: str = "bfloat16", quantise: str | None = None) -> list[str]:
    """Write `checkpoint` to `output`, and return what to say: where it is, and which files were left.

    A language model alone stays one. Of a public checkpoint all small files that are not weights are carried, of a run
    of ours those of its vocabulary; what is in `output` already stays. Raises CheckpointError.
    """
    (source, is_run), target = find(checkpoint), local_only(output, "--output", UPLOAD)
    if is_run:
        experiment = read_experiment(source)
        config, text_only, generation = experiment.model, False, {}
        params = restore_params(source / "checkpoints", abstract_params(config))
        beside = experiment.data.tokenizer
        files = [path for path in _files(beside) if _of_vocabulary(path)] if beside else []
    else:
        config, text_only, generation = read_config(source), language_model_alone(source), read_generation(source)
        params = load_params(source, config, text_only=text_only)
        converted = {*WRITTEN, *(stored.file.name for stored in TensorFiles(source, public_name).tensors.values())}
        files = [path for path in _files(source) if path.name not in converted]
    save_params(params, config, target, jnp.dtype(dtype), quantise, text_only=text_only, generation=generation)
    left = _carry(files, target) if target.resolve() != absolute(source) else []
    _write_byte_level(config, target)
    return [f"wrote {output}", *([f"left in {source}: {_few(left)}"] if left else [])]


def _files(folder) -> list[AnyPath]:
    """What lies in a folder."""
    folder = to_path(folder)
    try:
        return [folder / name for name in names(folder)]
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from error


def _carry(files: list[AnyPath], target: pathlib.Path) -> list[str]:
    """Copy files to `target` unless one of that name is there; returns the names of those that were left.

    Those are folders, weights of another format, large files, and links that lead out of the source.
    """
    left = []
    for path in files:
        if not _can_be_carried(path):
            left.append(path.name + "/" * path.is_dir())
        elif not (target / path.name).exists() and not (target / path.name).is_symlink():
            (download if is_remote(path) else shutil.copy2)(path, target / path.name)
    return left


def _of_vocabulary(path: AnyPath) -> bool:
    return path.name.lower().startswith(VOCABULARY) or path.suffix.lower() in (".py", ".jinja")


def _can_be_carried(path: AnyPath) -> bool:
    if path.name.startswith(".") or not path.is_file() or size_and_time(path)[0] > MOST_BYTES:
        return False
    name = path.name.lower().removesuffix(".json").removesuffix(".index")  # the index of weights goes with them
    inside = is_remote(path) or path.resolve().is_relative_to(_root(path.parent).resolve())
    return inside and not name.endswith(tuple(WEIGHTS))


def _root(folder: pathlib.Path) -> pathlib.Path:
    """What a link may lead to: the folder, or in the cache of Hugging Face's hub all of the model's files."""
    folder = folder.absolute()
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names[:SHOWN]) + more


def _write_byte_level(config: K25Config, target: pathlib.Path):
    """The byte-level vocabulary for other software, beside a model that has it and no files of another."""
    with contextlib.suppress(TokenizerError):  # a vocabulary that is not read is there
        if is_byte_level(config) and find_vocabulary(target) is None:
            for name, contents in byte_level_files().items():
                if not (target / name).exists():
                    text = json.dumps(contents, ensure_ascii=False, indent=1)
                    (target / name).write_text(text + "\n", encoding="utf-8")
