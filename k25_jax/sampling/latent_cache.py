"""The latent cache of decoding: per layer and token the normed latent and the shared rotary key (K2.5 §3.1).

`grow` makes one of a row for each prompt, `page_pools` one of pages that requests share (sampling/paged_cache.py).
"""

import jax.numpy as jnp

from k25_jax.config import TextConfig


def cache_bytes(config: TextConfig, rows: int, slots: int, dtype=jnp.float32) -> int:
    """Bytes of a cache: layers x rows x slots x (kv_lora_rank + qk_rope_dim) numbers; or of pages x places of a page."""
    return config.layers * rows * slots * (config.kv_lora_rank + config.qk_rope_dim) * jnp.dtype(dtype).itemsize


def grow(cache, slots: int):
    """The cache of a prefill, padded with free slots to `slots`."""
    return [
        tuple(jnp.pad(a, ((0, 0), (0, slots - a.shape[1]), (0, 0))) for a in (c_BLR, r_BLK)) for c_BLR, r_BLK in cache
    ]


def page_pools(config: TextConfig, devices: int, pages: int, size: int, dtype=jnp.float32):
    """Empty pages of `size` places, `pages` a device: (c_ZQOR, r_ZQOK) a layer."""
    widths = config.kv_lora_rank, config.qk_rope_dim
    return [tuple(jnp.zeros((devices, pages, size, width), dtype) for width in widths) for _ in range(config.layers)]
