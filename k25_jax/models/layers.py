"""Small shared pieces: parameter declaration, norms, activations, the dense feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(self.std)
        declare(self, "gate", (self.layers, self.d_model, self.ffn_dim), ("layers", "embed", "mlp"), init)
        declare(self, "up", (self.layers, self.d_model, self.ffn_dim), ("layers", "embed", "mlp"), init)
        declare(self, "down", (self.layers, self.ffn_dim, self.d_model), ("layers", "mlp", "embed"), init)


def rms_norm(x, scale, eps: float):
    """RMSNorm, computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x, p, eps: float):
    """LayerNorm with scale and bias, computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    y = (x32 - mean) * jax.lax.rsqrt(variance + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def swiglu(p, x):
    """SwiGLU feed-forward over the last axis of `x`."""
    hidden = jax.nn.silu(x @ p["gate"]) * (x @ p["up"])
    return hidden @ p["down"]
