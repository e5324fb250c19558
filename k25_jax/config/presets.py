"""Models by name."""

from k25_jax.config.checks import ConfigError, nearest
from k25_jax.config.model import K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig

# Byte-level models: 256 bytes, then the special tokens of text/tokenizer.py.
BYTE_IDS = dict(media_begin_id=261, media_end_id=263, media_pad_id=264, bos_id=256, eos_ids=(258,), pad_id=276)


def preset(name: str) -> K25Config:
    """A model by name: k25_1t, moonlight_16b, 1b, 100m, tiny."""
    if name == "k25_1t":
        return K25Config()
    if name == "moonlight_16b":  # the layout of Moonlight-16B-A3B behind the real vision encoder
        moe = MoEConfig(experts=64, top_k=6, ffn_dim=1408, shared_experts=2, scale=2.446)
        text = TextConfig(
            d_model=2048, layers=27, ffn_dim=11264, heads=16, q_lora_rank=0, norm_eps=1e-5, max_length=8192, moe=moe,
            rope=RopeConfig(original_length=8192),
        )  # fmt: skip
        return K25Config(text=text)
    if name == "1b":
        moe = MoEConfig(experts=32, top_k=4, ffn_dim=512, scale=2.0)
        text = TextConfig(
            d_model=1024, layers=14, ffn_dim=4096, heads=16, q_lora_rank=512, kv_lora_rank=256, qk_nope_dim=64,
            qk_rope_dim=32, v_dim=64, max_length=8192, moe=moe, rope=RopeConfig(original_length=8192),
        )  # fmt: skip
        return K25Config(text=text, vision=VisionConfig(layers=12, width=768, heads=12, mlp_dim=3072))
    if name == "100m":
        moe = MoEConfig(experts=32, top_k=4, ffn_dim=256, scale=2.0)
        text = TextConfig(
            vocab_size=512, d_model=512, layers=8, ffn_dim=2048, heads=8, q_lora_rank=256, kv_lora_rank=128,
            qk_nope_dim=64, qk_rope_dim=32, v_dim=64, init_std=0.04, max_length=4096, moe=moe,
            rope=RopeConfig(original_length=4096),
        )  # fmt: skip
        return K25Config(text=text, vision=VisionConfig(layers=6, width=256, heads=4, mlp_dim=1024), **BYTE_IDS)
    if name == "tiny":
        moe = MoEConfig(experts=8, top_k=2, ffn_dim=64, scale=2.0)
        text = TextConfig(
            vocab_size=288, d_model=96, layers=3, ffn_dim=256, heads=4, q_lora_rank=48, kv_lora_rank=32,
            qk_nope_dim=16, qk_rope_dim=8, v_dim=16, init_std=0.08, max_length=1024, moe=moe,
            rope=RopeConfig(original_length=1024),
        )  # fmt: skip
        return K25Config(text=text, vision=VisionConfig(layers=2, width=64, heads=4, mlp_dim=128), **BYTE_IDS)
    raise ConfigError(f"no preset {name!r} (there are {', '.join(PRESETS)}){nearest(name, PRESETS)}")


PRESETS = ("k25_1t", "moonlight_16b", "1b", "100m", "tiny")
