"""Experiment files and nested mappings to dataclasses, strictly: an unknown key raises with the nearest valid name."""

import ast
import dataclasses
import importlib.util
import re
import types
import typing

import ml_collections

from k25_jax.config import experiments
from k25_jax.config.checks import ConfigError, nearest
from k25_jax.config.model import K25Config
from k25_jax.config.presets import preset
from k25_jax.config.run import Experiment

INDEX = re.compile(r"-?[0-9]+")  # of an entry of a list


def from_dict(cls: type, values: typing.Mapping, where: str = ""):
    """Build dataclass `cls` from nested mappings; unknown or ill-typed keys raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where or cls.__name__}: unknown key {key!r}{nearest(str(key), names)}")
    prefix = f"{where}." if where else ""
    return cls(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def to_dict(config) -> dict:
    """The inverse of `from_dict`: nested dictionaries, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, tuple) else config


def _coerce(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        if hint is K25Config and isinstance(value, str):
            return preset(value)
        if isinstance(value, hint):
            return value
        if not isinstance(value, typing.Mapping):
            raise ConfigError(f"{where} must be a mapping with the fields of {hint.__name__}, not {value!r}")
        return from_dict(hint, value, where)
    if isinstance(hint, types.UnionType):  # of a scalar, a tuple, None
        options = {typing.get_origin(option) or option: option for option in typing.get_args(hint)}
        if value is None and types.NoneType in options:
            return None
        return _coerce(options[tuple] if isinstance(value, (list, tuple)) else options[float], value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where} must have {len(args)} entries, not {len(value)}")
        return tuple(_coerce(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r} ({type(value).__name__})")
    return value


def load_experiment(spec: str, overrides: typing.Sequence[str] = ()) -> Experiment:
    """Read `path/to/file.py[:arg]`, apply `section.key=value` overrides, return the dataclasses.

    The file may also be one of the package, by its name (config/experiments.py). In a list a key is a number from 0 on:
    `data.sources.1.weight=10`.
    """
    path, arg = experiments.split(spec)
    module = import_file(path)
    config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config must return an ml_collections.ConfigDict, not {type(config).__name__}")
    values = config.to_dict()
    if isinstance(values.get("model"), str):
        values["model"] = to_dict(preset(values["model"]))
    for item in overrides:
        values = _override(values, item)
    return from_dict(Experiment, values)


def run_local(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """An experiment shrunk to a laptop: the tiny model, tasks that need no download, four steps."""
    tasks = (("words:train", 25.0), ("shapes:train", 28.0), ("library:train", 47.0))
    values = config.to_dict()
    data = dict(batch_size=4, seq_len=128, packs=2, pack_patches=128, max_image_patches=64)
    data["sources"] = [dict(path=path, kind="task", weight=weight) for path, weight in tasks]
    held_out = [dict(path=path.replace(":train", ":test"), kind="task", weight=weight) for path, weight in tasks]
    data["validation"] = dict(sources=held_out, batches=1)
    optim = values["optim"] | dict(warmup_steps=2, decay_steps=2)
    train = values["train"] | dict(
        steps=4, log_every=1, checkpoint_every=2, accumulate=1, init_from="", init_vision_from=""
    )
    return ml_collections.ConfigDict(values | dict(model="tiny", data=data, optim=optim, train=train, mesh={}))


def argument(arg: str, choices: typing.Sequence[str], file: str) -> tuple[str, bool]:
    """(one of `choices`, else the first; whether to shrink) of what follows an experiment file: "CHOICE,runlocal"."""
    words = [word for word in arg.split(",") if word]
    chosen = [word for word in words if word != "runlocal"] or [choices[0]]
    if len(chosen) > 1 or chosen[0] not in choices:
        raise ConfigError(f"{file}: unknown argument {arg!r}; it can be one of {', '.join(choices)}, and runlocal")
    return chosen[0], "runlocal" in words


def import_file(path: str) -> types.ModuleType:
    """An experiment file as a module; raises ConfigError."""
    file = experiments.find(path)
    module_spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg)")
    return module


def _override(values: dict, item: str) -> dict:
    """`values` with one of them replaced."""
    dotted, sep, text = item.partition("=")
    keys = re.sub(r"\[(-?\d+)\]", r".\1", dotted).split(".")
    if not sep or not all(keys):
        raise ConfigError(f"override {item!r} must read section.key=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if any(INDEX.fullmatch(key) for key in keys):
        values = to_dict(from_dict(Experiment, values))  # with the lists that the file leaves as they are by default
    return _replaced(values, keys, value, f"override {item!r}", "")


def _replaced(node, keys: typing.Sequence[str], value, what: str, where: str):
    """A copy of `node` with `value` at `keys`, which are names in a section and numbers in a list."""
    if not keys:
        return value
    key, rest, inner = keys[0], keys[1:], f"{where}.{keys[0]}".lstrip(".")
    if isinstance(node, dict):
        return node | {key: _replaced(node.get(key, {}), rest, value, what, inner)}
    if not isinstance(node, (list, tuple)):
        raise ConfigError(f"{what}: {where.rpartition('.')[2]} is not a section")
    count = len(node)
    if not INDEX.fullmatch(key):
        raise ConfigError(f"{what}: {where} is a list; name an entry by its number, as {where}.0.{'.'.join(keys)}=..")
    if not -count <= int(key) < count:
        entries = f"has entries 0 to {count - 1}" if count else "is empty"
        raise ConfigError(f"{what}: {where} {entries}; to add one, give the whole list as {where}=[..]")
    out = list(node)
    out[int(key)] = _replaced(out[int(key)], rest, value, what, inner)
    return out
