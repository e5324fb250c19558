"""Parameters drawn at random, and a minute model to draw them for; without PyTorch, which takes seconds to import."""

import jax
import jax.numpy as jnp
import numpy as np

from k25_jax.config import K25Config, MoEConfig, TextConfig, VisionConfig
from k25_jax.models.k25 import abstract_params

MINUTE = K25Config(
    text=TextConfig(
        vocab_size=64, d_model=32, layers=1, dense_layers=0, ffn_dim=16, heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_dim=8, qk_rope_dim=4, v_dim=8, max_length=64,
        moe=MoEConfig(experts=16, top_k=2, ffn_dim=8, shared_experts=0),
    ),
    vision=VisionConfig(layers=1, width=16, heads=2, mlp_dim=12, patch_size=4, pos_height=3, pos_width=3),
    media_pad_id=60, media_begin_id=61, media_end_id=62, bos_id=0, eos_ids=(1,),
)  # fmt: skip


def random_params(config: K25Config, seed: int = 0, std: float = 0.3):
    """Norms near one, all else near zero, nothing exactly so: a mistake would not show there."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        norm = any(word in path[-1].key for word in ("norm", "scale"))
        return jnp.asarray(norm + std * rng.standard_normal(a.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
