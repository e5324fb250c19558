"""Float32 masters of weights, cast where they are used, so that all that adds up their gradients holds float32 (K2.5 §3.8).

Products run in the dtype of their inputs. The gradient of a master is a float32 sum over the tokens of a product, over
microbatches and parts of a batch, and over devices; of experts' matrices `moe.reduce_dtype` says the last.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k25_jax.sharding.mesh import platform


class Master(NamedTuple):
    """A weight that is cast already: the gradient is that of `master`, whose values nothing reads."""

    master: jax.Array
    narrow: jax.Array


def cast_from(w, dtype) -> Master:
    """A weight beside its copy in `dtype`; made before a weight is sent anywhere, it makes the copy travel alone."""
    return w if isinstance(w, Master) else Master(w, w.astype(dtype))


def product(equation: str, x, w):
    """einsum(equation, x, w) in the dtype of x. Every letter of w stands in x or in the result."""
    master, narrow = cast_from(w, x.dtype)
    return _product(equation, str(master.dtype), x, narrow, master)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation, dtype, x, narrow, master):
    return jnp.einsum(equation, x, narrow)


def _product_forward(equation, dtype, x, narrow, master):
    return jnp.einsum(equation, x, narrow), (x, narrow)


def _product_backward(equation, dtype, saved, dy):
    inputs, out = equation.split("->")
    of_x, of_w = inputs.split(",")
    x, narrow = saved
    dx = jnp.einsum(f"{out},{of_w}->{of_x}", dy, narrow)
    if platform() == "cpu":  # XLA lacks some of these products there; float32 inputs give the same bits
        x, dy = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, dy))
    dw = jnp.einsum(f"{of_x},{out}->{of_w}", x, dy, preferred_element_type=jnp.float32)
    return dx, None, dw.astype(dtype)


_product.defvjp(_product_forward, _product_backward)


def whole(w, dtype, axes: tuple[str, ...] = (), axis: int = 0, reduce_dtype="float32"):
    """All of a weight in `dtype`, where devices along the mesh's `axes` hold pieces of its `axis`; inside shard_map.

    What is gathered is cast before. The gradient is added up over these devices in `reduce_dtype`.
    """
    master, narrow = cast_from(w, dtype)
    return _whole(axes, axis, reduce_dtype, str(master.dtype), narrow, master)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _whole(axes, axis, reduce_dtype, dtype, narrow, master):
    return jax.lax.all_gather(narrow, axes, axis=axis, tiled=True) if axes else narrow


def _whole_backward(axes, axis, reduce_dtype, dtype, _, dw):
    if axes:
        dw = jax.lax.psum_scatter(dw.astype(reduce_dtype), axes, scatter_dimension=axis, tiled=True)
    return None, dw.astype(dtype)


_whole.defvjp(lambda *arguments: (_whole(*arguments), None), _whole_backward)


def biased(y, bias):
    """y + bias in the dtype of y; the sum, and so that of the bias's gradient, is float32."""
    return (y + bias.astype(jnp.float32)).astype(y.dtype)
