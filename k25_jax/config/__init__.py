"""Configuration: frozen dataclasses, strict parsing, presets, experiment files.

Experiment files hold `get_config(arg)` and return an `ml_collections.ConfigDict`; `load_experiment` turns it into
dataclasses. Nothing else in the package sees a ConfigDict.
"""

from k25_jax.config.checks import ConfigError, Schedule
from k25_jax.config.model import K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig
from k25_jax.config.parsing import argument, from_dict, import_file, load_experiment, run_local, to_dict
from k25_jax.config.presets import BYTE_IDS, PRESETS, preset
from k25_jax.config.rl import EpisodeConfig, ProblemsConfig, RLConfig, ToggleConfig, check_rl
from k25_jax.config.run import (
    DataConfig,
    Experiment,
    MeshConfig,
    OptimConfig,
    ProfileConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "BYTE_IDS", "PRESETS", "ConfigError", "DataConfig", "EpisodeConfig", "Experiment", "K25Config", "MeshConfig",
    "MoEConfig", "OptimConfig", "ProblemsConfig", "ProfileConfig", "RLConfig", "RopeConfig", "Schedule", "SourceConfig",
    "TextConfig", "ToggleConfig", "TrainConfig", "ValidationConfig", "VisionConfig", "argument", "check_rl", "from_dict",
    "import_file", "load_experiment", "preset", "run_local", "to_dict",
]  # fmt: skip
