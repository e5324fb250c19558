"""Small shared pieces: parameter declaration, norms, activations, the dense feed-forward."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from k25_jax.models.masters import product


def declare(module: nn.Module, name: str, shape, axes, init=None) -> None:
    """Declare one float32 parameter with logical axis names; `axes` names each dimension of `shape`.

    Modules only declare. Their mathematics lives in free functions over the plain parameter tree.
    """
    init = nn.initializers.normal(0.02) if init is None else init
    module.param(name, nn.with_logical_partitioning(init, axes), tuple(shape), jnp.float32)


ones, zeros = nn.initializers.ones, nn.initializers.zeros


def fan_in(inputs: int):
    """Normal with a standard deviation of 1 / sqrt(inputs)."""
    return nn.initializers.normal(inputs**-0.5)


class LayerNorm(nn.Module):
    """Scale and bias of a stack of LayerNorms; `stack` is () or (layers,)."""

    width: int
    stack: tuple[int, ...] = ()

    @nn.compact
    def __call__(self):
        axes = ("layers",) * len(self.stack) + ("norm",)
        declare(self, "scale", (*self.stack, self.width), axes, ones)
        declare(self, "bias", (*self.stack, self.width), axes, zeros)


class SwiGLU(nn.Module):
    """Weights of a stack of SwiGLU feed-forwards, without biases (K2.5 §3.1)."""

    d_model: int
    ffn_dim: int
    layers: int
    std: float
    axis: str = "layers"  # logical name of the stack's axis

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(self.std)
        declare(self, "gate", (self.layers, self.d_model, self.ffn_dim), (self.axis, "embed", "mlp"), init)
        declare(self, "up", (self.layers, self.d_model, self.ffn_dim), (self.axis, "embed", "mlp"), init)
        declare(self, "down", (self.layers, self.ffn_dim, self.d_model), (self.axis, "mlp", "embed"), init)


def rms_norm(x, scale, eps: float):
    """RMSNorm, computed in float32, in the dtype of `x`."""
    return _normalised(x, scale, eps, False)


def layer_norm(x, p, eps: float):
    """LayerNorm with scale and bias, computed in float32, in the dtype of `x`."""
    return (_normalised(x.astype(jnp.float32), p["scale"], eps, True) + p["bias"]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normalised(x, scale, eps: float, centred: bool):
    """Rows of unit variance (of unit mean square, unless `centred`), times `scale`.

    The gradient is written out with its sums as products: XLA's CPU library takes ten times as long for the derived one.
    """
    return _normalised_forward(x, scale, eps, centred)[0]


def _normalised_forward(x, scale, eps, centred):
    unit, inverse = _unit(x, eps, centred)
    return (unit * scale).astype(x.dtype), (x, scale, inverse)


def _normalised_backward(eps, centred, saved, dy):
    x, scale, inverse = saved
    unit = _centre(x, centred) * inverse
    dy32 = dy.astype(jnp.float32)
    dunit = dy32 * scale.astype(jnp.float32)
    dx = dunit - unit * _mean_product(dunit, unit)
    if centred:
        dx -= _mean_product(dunit, jnp.ones_like(dunit))
    rows = (-1, x.shape[-1])
    dscale = jnp.einsum("nd,nd->d", unit.reshape(rows), dy32.reshape(rows), precision="highest")
    return (dx * inverse).astype(x.dtype), dscale.astype(scale.dtype)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _unit(x, eps, centred):
    centre = _centre(x, centred)
    inverse = jax.lax.rsqrt(_mean_product(centre, centre) + eps)
    return centre * inverse, inverse


def _centre(x, centred):
    x = x.astype(jnp.float32)
    return x - jnp.mean(x, axis=-1, keepdims=True) if centred else x


def _mean_product(a, b):
    return jnp.einsum("...d,...d->...", a, b, precision="highest")[..., None] / a.shape[-1]


@jax.named_scope("mlp")
def swiglu(p, x):
    """SwiGLU feed-forward over the last axis of `x`."""
    hidden = jax.nn.silu(product("...d,df->...f", x, p["gate"])) * product("...d,df->...f", x, p["up"])
    return product("...f,fd->...d", hidden, p["down"])


def rematerialised(body, remat: str):
    """The body of a scan, its backward pass as `train.remat` says.

    "none" keeps every intermediate result for it, "dots" the results of products and kernels, "full" none at all.
    """
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attention", "experts")
    )
    policy = {"dots": kept, "full": policies.nothing_saveable}[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
