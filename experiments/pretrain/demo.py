"""A complete K2.5, small enough to learn to read on two CPU cores in minutes; `make demo` runs it."""

import ml_collections

from k25_jax.config import ConfigError

SOURCES = (  # percent of the tokens
    ("digits:train:size=28,variants=8", 53.0),
    ("words:train", 10.0),
    ("shapes:train", 16.0),
    ("photographs:train", 12.0),
    ("library:train", 9.0),
)


def get_config(arg: str = ""):
    """The demo's experiment; `runlocal` is the same, as it is small already."""
    if arg not in ("", "runlocal"):
        raise ConfigError(f"demo.py: unknown argument {arg!r}; it can be runlocal")
    config = ml_collections.ConfigDict()
    config.name = "demo"
    config.model = "tiny"
    config.data = dict(
        sources=[dict(path=path, kind="task", weight=weight) for path, weight in SOURCES],
        batch_size=8,
        seq_len=256,
        packs=2,
        pack_patches=256,
        max_image_patches=64,
        seed=0,
    )
    config.optim = dict(peak_lr=2e-3, end_lr=1e-4, warmup_steps=50, decay_steps=250, weight_decay=0.05)
    config.train = dict(steps=600, log_every=1, checkpoint_every=100, keep=2, seed=0)
    return config
