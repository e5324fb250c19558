"""What runs here: the versions of this package and of JAX, and the revision in a checkout."""

import importlib.metadata

import k25_jax
from k25_jax.train.revision import revision


def versions() -> str:
    """One line."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "missing"
    known = revision()
    return f"k25_jax {k25_jax.__version__} (jax {jax}{f', revision {known}' if known != 'unknown' else ''})"
