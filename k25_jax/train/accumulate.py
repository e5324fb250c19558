"""A batch in parts that the backbone takes one after the other, their gradients added up (K2.5 §3.8).

The encoder has run over the whole batch before, and its backward pass runs once, after the last part.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from k25_jax.sharding.rules import RULES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulated(function, params, frozen, x_ABLD, parts):
    """(the sum of the losses, what was seen, one of each part); `function(params, frozen, x_BLD, part)` gives both.

    Each part's gradient is taken at once, so that nothing of one part is held while the next one runs. `frozen` has none.
    The third result of `function` is `params`, as they are. The sum of the gradients so far is the gradient of these, so
    that who has the parameters in hand last adds to the sum in place, and no gradient stands beside it.
    """

    def one(total, piece):
        loss, seen, _ = function(params, frozen, *piece)
        return total + loss, seen

    return jax.lax.scan(one, jnp.zeros(()), (x_ABLD, parts))


def _forward(function, params, frozen, x_ABLD, parts):
    def one(carry, piece):
        (total, dparams), (x_BLD, part) = carry, piece

        def outputs(params, x_BLD):
            loss, seen, passed = function(params, frozen, x_BLD, part)
            return (loss, passed), seen

        (loss, _), pull, seen = jax.vjp(outputs, params, x_BLD, has_aux=True)
        dparams, dx_BLD = pull((jnp.ones_like(loss), dparams))
        return (total + loss, dparams), (seen, dx_BLD)

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (total, dparams), (seen, dx_ABLD) = jax.lax.scan(one, start, (x_ABLD, parts))
    return (total, seen), (dparams, dx_ABLD)


def _backward(function, saved, gradients):
    dtotal, _ = gradients
    dparams, dx_ABLD = jax.tree.map(lambda a: a * dtotal.astype(a.dtype), saved)
    return dparams, None, dx_ABLD, None


accumulated.defvjp(_forward, _backward)


def in_parts(a, parts: int):
    """[B, ...] to [A, B / A, ...]: a part has as many rows of each device as any other, so that none moves."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return rearrange(a, "(a b) ... -> a b ...", a=parts)
    devices = 1
    for axis in RULES["batch"]:
        devices *= mesh.shape[axis]
    split = rearrange(a, "(d a b) ... -> a (d b) ...", a=parts, d=devices)
    return jax.lax.with_sharding_constraint(split, PartitionSpec(None, RULES["batch"], RULES["length"]))
