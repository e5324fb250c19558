"""The MLP projector between MoonViT-3D and the language model (K2.5 §3.2)."""

import flax.linen as nn
import jax

from k25_jax.config import K25Config
from k25_jax.models.layers import LayerNorm, declare, fan_in, layer_norm, zeros
from k25_jax.models.masters import biased, product


class Projector(nn.Module):
    """Weights: a LayerNorm over each patch, then two layers over the four patches of a token."""

    config: K25Config

    @nn.compact
    def __call__(self):
        width, d_model = self.config.vision.width, self.config.text.d_model
        grouped = width * self.config.vision.group
        LayerNorm(width, name="norm")()
        declare(self, "fc0", (grouped, grouped), ("vision", "vision_mlp"), fan_in(grouped))
        declare(self, "fc0_bias", (grouped,), ("norm",), zeros)
        declare(self, "fc1", (grouped, d_model), ("vision_mlp", "vision"), fan_in(grouped))
        declare(self, "fc1_bias", (d_model,), ("norm",), zeros)


@jax.named_scope("projector")
def project(p, pooled, config: K25Config):
    """[..., M, 4, W] -> [..., M, D], one language-model token per group of patches."""
    x = layer_norm(pooled, p["norm"], config.projector_eps)
    x = x.reshape(*x.shape[:-2], -1)
    hidden = jax.nn.gelu(biased(product("...g,gf->...f", x, p["fc0"]), p["fc0_bias"]), approximate=False)
    return biased(product("...f,fd->...d", hidden, p["fc1"]), p["fc1_bias"])
