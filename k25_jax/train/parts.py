"""Norms of gradients and updates by part of the model, with the parts read from its declared parameters (K2.5 §3.1)."""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from k25_jax.config import K25Config
from k25_jax.models.k25 import logical_axes

STACKED = ("layers", "stages")  # the first logical axis of weights that are stacked over layers
NORM = "norm"  # the last one of scales and biases, and what all of them that stand alone are called together


@functools.cache
def parts(config: K25Config) -> dict[tuple[str, ...], str]:
    """The part of each leaf, by its path: attention, experts, router, .., of all layers together; embed, vision, ...

    What is all stacked over layers is divided, by the innermost dictionary that holds nothing but weights, or else by the
    weight itself.
    """
    axes = flatten_dict(logical_axes(config))
    divided = {path[0] for path in axes} - {
        path[0] for path, spec in axes.items() if not spec or spec[0] not in STACKED
    }
    mixed = {path[:size] for path in axes for size in range(1, len(path) - 1)}  # dictionaries that hold dictionaries

    def part(path: tuple[str, ...]) -> str:
        if len(path) > 1 and path[0] not in divided:
            return path[0]
        if len(path) > 2 and path[:-1] not in mixed:
            return path[-2]
        return NORM if axes[path][-1] == NORM else path[-1]

    return {path: part(path) for path in axes}


@jax.named_scope("norms")
def squares(tree):
    """The sum of squares of each leaf, in float32; on a mesh each device adds up what it has."""
    return jax.tree.map(lambda a: jnp.sum(jnp.square(a.astype(jnp.float32))), tree)


def norms(sums: dict, config: K25Config, name: str) -> dict[str, jax.Array]:
    """Metrics NAME/PART from `squares` of a tree of parameters, or of a piece of one."""
    found: dict[str, jax.Array] = {}
    for path, total in flatten_dict(sums).items():
        part = parts(config).get(path, path[0])
        found[part] = found.get(part, 0.0) + total
    return {f"{name}/{part}": jnp.sqrt(total) for part, total in found.items()}
