"""A batch in parts that the backbone takes one after the other, their gradients added up (K2.5 §3.8).

The encoder has run over the whole batch before, and its backward pass runs once, after the last part.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from k25_jax.sharding.rules import RULES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulated(function, params, frozen, parts):
    """(the sum of the losses, what was seen, one of each part); `function(params, frozen, part)` gives both.

    Each part's gradient is taken at once, so that nothing of one part is held while the next one runs. `frozen` has none.
    The third result of `function` is `params`, as they are. The sum of the gradients so far is the gradient of these, so
    that who has the parameters in hand last adds to the sum in place, and no gradient stands beside it.
    """

    def one(total, part):
        loss, seen, _ = function(params, frozen, part)
        return total + loss, seen

    return jax.lax.scan(one, jnp.zeros(()), parts)


def _forward(function, params, frozen, parts):
    def one(carry, part):
        total, dparams = carry

        def outputs(params):
            loss, seen, passed = function(params, frozen, part)
            return (loss, passed), seen

        (loss, _), pull, seen = jax.vjp(outputs, params, has_aux=True)
        return (total + loss, pull((jnp.ones_like(loss), dparams))[0]), seen

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (total, dparams), seen = jax.lax.scan(one, start, parts)
    return (total, seen), dparams


def _backward(function, dparams, gradients):
    dtotal, _ = gradients
    return jax.tree.map(lambda a: a * dtotal.astype(a.dtype), dparams), None, None


accumulated.defvjp(_forward, _backward)


def first_part(batch):
    """All rows of a batch as its only part: without packs, which are the encoder's."""
    routes = batch.routes and batch.routes._replace(
        spread_XJZU=None, pick_AXJZU=batch.routes.pick_AXJZU[0], land_AXJZU=batch.routes.land_AXJZU[0]
    )
    return batch.replace(vision=None, routes=routes)


def in_parts(batch, parts: int):
    """The rows [B,L] of a batch as [A,B/A,L]: a part has as many of each device as any other, so that none moves.

    Tables have a first axis of parts already (parallel/dep.py); packs are the encoder's.
    """

    def rows(a):
        split = rearrange(a, "(d a b) l -> a (d b) l", a=parts, d=_devices())
        return _laid(split, PartitionSpec(None, RULES["batch"], RULES["length"]))

    routes = batch.routes and batch.routes._replace(spread_XJZU=None)
    return jax.tree.map(rows, batch.replace(vision=None, routes=None)).replace(routes=routes)


def whole_rows(a_ABL):
    """An array of the parts of `in_parts` as rows of their batch, [B,L]."""
    rows = rearrange(a_ABL, "a (d b) l -> (d a b) l", d=_devices())
    return _laid(rows, PartitionSpec(RULES["batch"], RULES["length"]))


def _devices() -> int:
    """Over how many devices the mesh in use (jax.set_mesh) shares out rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def _laid(a, spec: PartitionSpec):
    return a if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(a, spec)
