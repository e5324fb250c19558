"""MoonViT-3D: a packed vision encoder for images and clips of up to 4 frames (K2.5 §3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from k25_jax.config import VisionConfig
from k25_jax.kernels.attention import attention
from k25_jax.models.layers import LayerNorm, declare, fan_in, layer_norm, zeros
from k25_jax.models.masters import biased, product
from k25_jax.models.rope import axial_tables, rotate
from k25_jax.vision.patchpack import VisionPack

WEIGHTS_KEPT = 2048  # patches; the real encoder's attention weights of such a pack are 3.6 GB in bfloat16


class Blocks(nn.Module):
    """Weights of the stacked encoder blocks; query, key and value fused."""

    config: VisionConfig

    @nn.compact
    def __call__(self):
        c = self.config
        y, w, f, h, k = c.layers, c.width, c.mlp_dim, c.heads, c.head_dim
        LayerNorm(w, (y,), name="norm0")()
        LayerNorm(w, (y,), name="norm1")()
        declare(self, "qkv", (y, w, 3, h, k), ("layers", "vision", None, "vision_heads", None), fan_in(w))
        declare(self, "qkv_bias", (y, 3, h, k), ("layers", None, "vision_heads", None), zeros)
        declare(self, "out", (y, h, k, w), ("layers", "vision_heads", None, "vision"), fan_in(w))
        declare(self, "out_bias", (y, w), ("layers", "norm"), zeros)
        declare(self, "fc0", (y, w, f), ("layers", "vision", "vision_mlp"), fan_in(w))
        declare(self, "fc0_bias", (y, f), ("layers", "norm"), zeros)
        declare(self, "fc1", (y, f, w), ("layers", "vision_mlp", "vision"), fan_in(f))
        declare(self, "fc1_bias", (y, w), ("layers", "norm"), zeros)


class PatchEmbed(nn.Module):
    """The 14x14x3 convolution as a matrix; its rows run channel, row, column."""

    config: VisionConfig

    @nn.compact
    def __call__(self):
        c = self.config
        declare(self, "kernel", (c.patch_dim, c.width), (None, "vision"), fan_in(c.patch_dim))
        declare(self, "bias", (c.width,), ("norm",), zeros)


class MoonViT3D(nn.Module):
    """Weights of the vision encoder."""

    config: VisionConfig

    @nn.compact
    def __call__(self):
        c = self.config
        PatchEmbed(c, name="patch_embed")()
        declare(self, "pos_table", (c.pos_height, c.pos_width, c.width), (None, None, "vision"))
        Blocks(c, name="blocks")()
        LayerNorm(c.width, name="final_norm")()


def normalise(patches):
    """Raw uint8 pixel values to [-1, 1]; floating-point patches are taken as normalised already."""
    if patches.dtype == jnp.uint8:
        return (patches.astype(jnp.float32) / 255.0 - 0.5) / 0.5
    return patches


def cubic_taps(index_N, size_N, side: int):
    """The 4 table entries and weights [N,4] that resample an axis of `side` entries to `size` (Keys, a = -0.75)."""
    source_N = (index_N.astype(jnp.float32) + 0.5) * side / jnp.maximum(size_N, 1) - 0.5
    floor_N = jnp.floor(source_N)
    offsets = jnp.arange(-1, 3)
    taps_N4 = jnp.clip(floor_N.astype(jnp.int32)[:, None] + offsets, 0, side - 1)
    d = jnp.abs(source_N[:, None] - floor_N[:, None] - offsets)
    a = -0.75
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return taps_N4, jnp.where(d <= 1, near, far)


def positions(p, coords_N5, config: VisionConfig):
    """Position embedding of every patch: the table resampled to its grid, plus its frame's sinusoid."""
    frames, rows, columns, heights, widths = coords_N5.T
    row_taps, row_weights = cubic_taps(rows, heights, config.pos_height)
    column_taps, column_weights = cubic_taps(columns, widths, config.pos_width)
    table = p["pos_table"].astype(jnp.float32)
    out_NW = 0.0
    for i in range(4):
        for j in range(4):
            weight_N = row_weights[:, i] * column_weights[:, j]
            out_NW += table[row_taps[:, i], column_taps[:, j]] * weight_N[:, None]
    return out_NW + time_table(config)[frames]


def time_table(config: VisionConfig):
    """Sinusoids of the frame number, [1 + pos_time, W]; row 0 is zero and serves clips of one frame."""
    exponents = jnp.arange(0, config.width, 2, dtype=jnp.float32) / config.width
    angles = jnp.arange(config.pos_time, dtype=jnp.float32)[:, None] / 10000.0**exponents
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.concatenate([jnp.zeros((1, config.width)), table])


def encoder_block(p, x_NW, rope, segments_N, config: VisionConfig, keep_weights: bool = False):
    """Pre-norm attention inside each segment, then the GELU feed-forward; `keep_weights` is that of the attention."""
    h_NW = layer_norm(x_NW, p["norm0"], config.norm_eps)
    qkv = biased(product("nw,wthk->tnhk", h_NW, p["qkv"]), p["qkv_bias"][:, None])
    cos, sin = rope[0][:, None], rope[1][:, None]
    q, k = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin)
    scale = config.head_dim**-0.5
    qkv_segments = q[None], k[None], qkv[2][None], segments_N[None]
    out, _ = attention(*qkv_segments, scale=scale, causal=False, keep_weights=keep_weights)
    x_NW = x_NW + biased(product("nhk,hkw->nw", out[0], p["out"]), p["out_bias"])
    h_NW = layer_norm(x_NW, p["norm1"], config.norm_eps)
    hidden = jax.nn.gelu(biased(product("nw,wf->nf", h_NW, p["fc0"]), p["fc0_bias"]), approximate=True)
    return x_NW + biased(product("nf,fw->nw", hidden, p["fc1"]), p["fc1_bias"])


def vision_hidden(p, patches_NC, segments_N, coords_N5, config: VisionConfig, keep_weights: bool = False):
    """Every patch of one pack after the last LayerNorm, [N,W]."""
    x_NW = biased(product("nc,cw->nw", patches_NC, p["patch_embed"]["kernel"]), p["patch_embed"]["bias"])
    x_NW = x_NW + positions(p, coords_N5, config).astype(x_NW.dtype)
    rope = axial_tables(config, coords_N5[:, 1], coords_N5[:, 2])

    def step(x_NW, layer):
        return encoder_block(layer, x_NW, rope, segments_N, config, keep_weights), None

    x_NW, _ = jax.lax.scan(step, x_NW, p["blocks"])
    return layer_norm(x_NW, p["final_norm"], config.norm_eps)


def pool(x_NW, slots_N, weights_N, config: VisionConfig):
    """Mean over the frames of a chunk and grouping of spatial neighbours: [N,W] -> [M, 4, W] (temporal pooling)."""
    patches = x_NW.shape[0]
    pooled = jax.ops.segment_sum(x_NW * weights_N[:, None], slots_N, patches).astype(x_NW.dtype)
    return pooled.reshape(patches // config.group, config.group, -1)


@jax.named_scope("vision")
def encode(p, pack: VisionPack, config: VisionConfig, dtype=jnp.float32, one_at_a_time: bool = False):
    """Pooled patches of one pack, its arrays without their axis P: [M, 4, W].

    `one_at_a_time` says that the backward pass recomputes one pack after the other. Then there is memory to keep the
    attention weights of a short pack: a fifth of the backward FLOPs of the attention are saved.
    """
    patches_NC = normalise(pack.patches_PNC).astype(dtype)
    keep_weights = one_at_a_time and len(patches_NC) <= WEIGHTS_KEPT
    x_NW = vision_hidden(p, patches_NC, pack.segments_PN, pack.coords_PN5, config, keep_weights)
    return pool(x_NW, pack.slots_PN, pack.weights_PN, config)
