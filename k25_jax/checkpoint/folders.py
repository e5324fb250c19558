"""What a folder holds, by its files: one of our runs, or a checkpoint in the public format. Imports nothing heavy."""

import pathlib

from k25_jax.config import ConfigError, Experiment, from_dict
from k25_jax.config.json_file import read_object
from k25_jax.runtime.paths import AnyPath, is_remote, names, to_path

BASE = pathlib.Path(__file__).parent / "base"
COMMITTED = "commit_success.txt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


def find(directory: str | AnyPath) -> tuple[AnyPath, bool]:
    """(the folder, whether it is a run of ours) of a model; "base" is the one of the package. Raises CheckpointError."""
    folder = BASE if str(directory) == "base" else to_path(directory)
    if (folder / "experiment.json").is_file():
        return folder, True
    if (folder / "config.json").exists():  # what is no file is named by its reader
        return folder, False
    raise CheckpointError(
        f"{folder} is neither a run (experiment.json) nor a public checkpoint (config.json); name the folder that "
        "holds one of these"
    )


def read_experiment(directory: AnyPath) -> Experiment:
    """The configuration that a run was started with."""
    try:
        values = read_object(directory / "experiment.json")
    except ValueError as error:
        raise CheckpointError(f"{error}; restore it from the experiment file") from error
    model = values.get("model")
    if isinstance(model, dict) and "eos_id" in model:  # as runs were written when they had one end token
        model["eos_ids"] = [model.pop("eos_id")]
    return from_dict(Experiment, values)


def check_same_model(experiment: Experiment, directory: AnyPath) -> None:
    """Raise ConfigError where `directory` holds a run of another model."""
    if (directory / "experiment.json").exists() and read_experiment(directory).model != experiment.model:
        raise ConfigError(f"{directory} holds a run of another model; choose another --workdir")


def complete_steps(directory: str | AnyPath) -> list[int]:
    """The steps with a complete checkpoint under `directory`: by the names of its folders, which Orbax renames when they
    are whole; in a bucket, which has no renaming, by the object that it writes last.
    """
    directory = to_path(directory)
    try:
        steps = sorted(int(name) for name in names(directory) if name.isdigit())
    except (FileNotFoundError, NotADirectoryError):  # nothing yet
        return []
    return [step for step in steps if not is_remote(directory) or (directory / str(step) / COMMITTED).exists()]
