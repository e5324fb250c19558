"""Any checkpoint to a folder in the public format, with its vocabulary and what else lies beside the weights."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable

import jax

from k25_jax.checkpoint.export import WRITTEN, Form, export
from k25_jax.checkpoint.folders import CheckpointError, find, read_experiment
from k25_jax.checkpoint.hf_config import language_model_alone, read_config, read_generation
from k25_jax.checkpoint.huggingface import open_files
from k25_jax.checkpoint.load import is_byte_level
from k25_jax.checkpoint.store import newest_step
from k25_jax.checkpoint.tensors import PublicTensors, RunTensors
from k25_jax.config import K25Config
from k25_jax.runtime.paths import (
    AnyPath,
    absolute,
    is_remote,
    lexists,
    names,
    read_range,
    size_and_time,
    to_path,
    write,
)
from k25_jax.text.tokenizer import VOCABULARIES, TokenizerError, find_vocabulary
from k25_jax.text.tokenizer_json import byte_level_files

WEIGHTS = ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .npy .zip .tar .gz .tflite .part".split()
VOCABULARY = ("tokeniz", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges", *VOCABULARIES)
MOST_BYTES = 200_000_000  # of a file that is carried
SHOWN = 10  # names in a line


def convert(
    checkpoint: str,
    output: str,
    dtype: str = "bfloat16",
    quantise: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    shard_bytes: float = 5e9,
) -> list[str]:
    """Write `checkpoint` to `output`, and return what to say: where it is, and which files were left.

    Each tensor is read when it is written (export.py), by whichever of several processes writes it; all of them call this.
    A language model alone stays one. Of a public checkpoint all small files that are not weights are carried, of a run
    of ours those of its vocabulary; what is in `output` already stays. Raises CheckpointError.
    """
    (source, is_run), target = find(checkpoint), to_path(output, "--output")
    if is_run:
        experiment = read_experiment(source)
        config, text_only, generation = experiment.model, False, {}
        step, expected = newest_step(source / "checkpoints")
        tensors, name = RunTensors(step), str(step)
        beside = experiment.data.tokenizer
        files = [path for path in _files(beside) if _of_vocabulary(path)] if beside else []
    else:
        config, text_only, generation = read_config(source), language_model_alone(source), read_generation(source)
        stored = open_files(source, config, text_only)
        changed = max(size_and_time(file)[1] for file in {tensor.file for tensor in stored.tensors.values()})
        tensors, name, expected = PublicTensors(stored), f"{absolute(source)} of {changed}", None
        converted = {*WRITTEN, *(tensor.file.name for tensor in stored.tensors.values())}
        files = [path for path in _files(source) if path.name not in converted]
    form = Form(dtype, quantise or "", shard_bytes, text_only)
    export(tensors, config, absolute(target), form, name, expected, generation, progress)
    if jax.process_index():
        return []
    left = _carry(files, target) if absolute(target) != absolute(source) else []
    _write_byte_level(config, target)
    return [f"wrote {output}", *([f"left in {source}: {_few(left)}"] if left else [])]


def _files(folder) -> list[AnyPath]:
    """What lies in a folder."""
    folder = to_path(folder)
    try:
        return [folder / name for name in names(folder)]
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from error


def _carry(files: list[AnyPath], target: AnyPath) -> list[str]:
    """Copy files to `target` unless one of that name is there; returns the names of those that were left.

    Those are folders, weights of another format, large files, and links that lead out of the source.
    """
    left = []
    for path in files:
        if not _can_be_carried(path):
            left.append(path.name + "/" * path.is_dir())
        elif not lexists(target / path.name):
            _copy(path, target / path.name)
    return left


def _copy(path: AnyPath, target: AnyPath) -> None:
    if is_remote(path) or is_remote(target):
        write(target, read_range(path, MOST_BYTES, 0))
    else:
        shutil.copy2(path, target)


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


def _write_byte_level(config: K25Config, target: AnyPath):
    """The byte-level vocabulary for other software, beside a model that has it and no files of another."""
    with contextlib.suppress(TokenizerError):  # a vocabulary that is not read is there
        if is_byte_level(config) and find_vocabulary(target) is None:
            for name, contents in byte_level_files().items():
                if not (target / name).exists():
                    text = json.dumps(contents, ensure_ascii=False, indent=1)
                    write(target / name, text + "\n")
