"""The experiment files that come with the package: found by name, listed, copied to start from.

In a checkout they are the folder experiments/ at its top, to which `k25_jax/experiments` is a link; a wheel has them there.
"""

import ast
import pathlib
import re

from k25_jax.config.checks import ConfigError, nearest
from k25_jax.runtime.paths import local_only

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"


def names() -> list[str]:
    """All of them, such as "pretrain/demo"."""
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.glob("*/*.py"))


def packaged(name: str) -> pathlib.Path | None:
    """The file of that name, with or without experiments/ before it and .py behind it; None where there is none."""
    short = name.removeprefix("experiments/").removesuffix(".py")
    return FOLDER / f"{short}.py" if short in names() else None


def split(spec: str) -> tuple[str, str]:
    """FILE:ARG as its two parts; PathError for a file in a bucket."""
    local_only(spec, "--config", "an experiment file is code of this machine; copy it here")
    path, _, arg = spec.partition(":")
    return path, arg


def find(path: str) -> pathlib.Path:
    """The file at a path, else the packaged one of that name; raises ConfigError with the nearest of both."""
    file = pathlib.Path(path)
    if file.is_file():
        return file
    if (found := packaged(path)) is not None:
        return found
    siblings = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
    own = names() if not file.is_absolute() else []
    raise ConfigError(f"no experiment file {path}{nearest(path, [*siblings, *own])}")


def titles() -> dict[str, str]:
    """What each is, by name: the first sentence of its docstring."""
    found = {}
    for name in names():
        text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
        found[name] = re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0].replace("\n", " ")
    return found


def copy(name: str, output: str | None = None) -> pathlib.Path:
    """Write a packaged experiment to `output`, else to its own name here; what exists is left as it is."""
    file = packaged(name)
    if file is None:
        raise ConfigError(
            f"no experiment {name!r} in the package{nearest(name, names())}; `k25 experiments` lists them"
        )
    target = local_only(output or file.name, "--output", "an experiment file is code of this machine")
    if target.is_dir():
        target /= file.name
    try:
        with open(target, "x") as out:
            out.write(file.read_text())
    except FileExistsError:
        raise ConfigError(f"{target} exists; choose another --output") from None
    return target
