"""Rotary position embeddings: YaRN for the language model, axial 2-D for the vision encoder (K2.5 §3.1, §3.2).

Rotary dimensions are stored interleaved, as in the public checkpoint: dimensions 2i and 2i+1 turn together.
"""

import math

import jax.numpy as jnp
import numpy as np

from k25_jax.config import RopeConfig, TextConfig, VisionConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature term, 0.1 * mscale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Angle per position of each of the dim // 2 pairs; float32.

    YaRN keeps the fast pairs, divides the slow ones by `factor`, and ramps in between. The ramp's ends are the pairs
    that turn beta_fast and beta_slow times over the original length.
    """
    wavelengths = _wavelengths(config.theta, dim)
    plain = np.float32(1.0) / wavelengths
    if not config.yarn:
        return plain

    def pair_that_turns(times: float) -> float:
        return dim * math.log(config.original_length / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    fast = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(width), 0, 1)
    stretched = np.float32(1.0) / (np.float32(config.factor) * wavelengths)
    return (stretched * (1 - fast) + plain * fast).astype(np.float32)


def _wavelengths(theta: float, dim: int) -> np.ndarray:
    """theta ** (2i / dim), rounded once to float32: an error here is multiplied by the position."""
    return (float(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)).astype(
        np.float32
    )


def rope_tables(config: RopeConfig, dim: int, positions):
    """Cosine and sine of every pair, [..., dim // 2] float32, for integer `positions` [...]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, dim)
    scale = 1.0
    if config.yarn and config.mscale and config.mscale_all_dim:
        scale = yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    elif config.yarn:
        scale = yarn_mscale(config.factor, 1.0)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def softmax_scale(config: TextConfig) -> float:
    """1/sqrt(qk_dim), times YaRN's squared temperature term when `mscale_all_dim` is set."""
    scale = config.qk_dim**-0.5
    if config.rope.yarn and config.rope.mscale_all_dim:
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def axial_tables(config: VisionConfig, rows_N, columns_N):
    """Cosine and sine [N, head_dim // 2] for patch coordinates; pairs alternate between column and row angles."""
    half = config.head_dim // 2
    frequencies = np.float32(1.0) / _wavelengths(config.rope_theta, half)
    places = jnp.stack([columns_N, rows_N], axis=-1).astype(jnp.float32)  # [N, 2]
    angles = (frequencies[:, None] * places[:, None, :]).reshape(places.shape[0], half)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Turn the interleaved pairs of the last axis of `x`; the tables broadcast against x[..., ::2]."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
