"""What stands in a traced program (a jaxpr), however deep inside loops, branches, checkpoints and shard_maps."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

CHECKPOINTS = {"checkpoint", "remat", "remat2"}  # what different versions of JAX call them


def equations(jaxpr, inside: tuple[str, ...] = ()) -> Iterator[tuple]:
    """(equation, the names of those around it, outermost first) of all equations, an outer one before those inside it."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for program in inner(eqn):
            yield from equations(program, (*inside, eqn.primitive.name))


def inner(eqn) -> list:
    """The programs that an equation runs."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)
    return [value for value in values if _is_program(value)]


def _is_program(value) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
