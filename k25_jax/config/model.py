"""The model: encoder, language model, token ids (K2.5 §3.1, §3.2)."""

from dataclasses import dataclass, field

from k25_jax.config.checks import ConfigError, one_of, require_positive


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT-3D (K2.5 §3.2)."""

    layers: int = 27
    width: int = 1152
    heads: int = 16
    mlp_dim: int = 4304
    patch_size: int = 14
    merge: tuple[int, int] = (2, 2)  # patches (rows, columns) that become one token
    pos_height: int = 64  # learned position table, resampled to each grid
    pos_width: int = 64
    pos_time: int = 4  # frames in a chunk, at most
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        require_positive(self, "layers width heads mlp_dim patch_size pos_height pos_width pos_time".split())
        if min(self.merge) < 1:
            raise ConfigError(f"vision.merge={self.merge} must be positive")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ConfigError(
                f"vision.width={self.width} must be heads={self.heads} times a multiple of 4 (axial RoPE turns pairs "
                "of dimensions for each of two axes)"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def group(self) -> int:
        """Patches in one token."""
        return self.merge[0] * self.merge[1]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; YaRN when `factor` > 1 (K2.5 §3.1, §3.3)."""

    theta: float = 50000.0
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    yarn: bool = False

    def __post_init__(self):
        if self.factor < 1.0:
            raise ConfigError(f"rope.factor={self.factor} must be at least 1")
        if self.factor > 1.0 and not self.yarn:
            raise ConfigError("rope.factor > 1 needs rope.yarn=True")


@dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts (K2.5 §3.1)."""

    experts: int = 384
    top_k: int = 8
    ffn_dim: int = 2048
    shared_experts: int = 1
    groups: int = 1  # experts are chosen inside the best `top_groups` groups
    top_groups: int = 1
    normalise: bool = True
    scale: float = 2.827
    bias_rate: float = 1e-3  # step of the sign rule that balances the load
    grouped_matmul: str = "auto"  # auto | blocked | megablox | triton | ragged | reference
    dispatch: str = "gather"  # gather | alltoall: how token copies reach experts on other devices
    chunk: int = 0  # tokens of a device that experts on a mesh take at a time, if it has more; 0: all
    reduce_dtype: str = "float32"  # float32 | bfloat16: in which devices add up their gradients of an expert's matrices

    def __post_init__(self):
        require_positive(self, "experts ffn_dim groups".split())
        if self.chunk < 0:
            raise ConfigError(f"moe.chunk={self.chunk} must not be negative")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"moe.top_k={self.top_k} must lie between 1 and moe.experts={self.experts}")
        if self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ConfigError(
                f"moe.groups={self.groups} must divide moe.experts={self.experts} and be at least top_groups"
            )
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ConfigError(f"moe.top_k={self.top_k} exceeds the experts of moe.top_groups={self.top_groups} groups")
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ConfigError("moe.groups needs at least 2 experts a group")
        one_of(self, "dispatch", ("gather", "alltoall"))
        one_of(self, "reduce_dtype", ("float32", "bfloat16"))
        one_of(self, "grouped_matmul", ("auto", "blocked", "megablox", "triton", "ragged", "reference"))


@dataclass(frozen=True)
class TextConfig:
    """The language model: Kimi K2, a DeepSeek-V3 layout with MLA and MoE (K2.5 §3.1)."""

    vocab_size: int = 163840
    d_model: int = 7168
    layers: int = 61
    dense_layers: int = 1  # the first layers have a dense feed-forward
    ffn_dim: int = 18432
    heads: int = 64
    q_lora_rank: int = 1536  # 0: queries straight from the residual stream (Moonlight)
    kv_lora_rank: int = 512
    qk_nope_dim: int = 128
    qk_rope_dim: int = 64
    v_dim: int = 128
    attention_bias: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_length: int = 262144
    tie_embeddings: bool = False
    moe: MoEConfig = field(default_factory=MoEConfig)
    rope: RopeConfig = field(
        default_factory=lambda: RopeConfig(factor=64.0, original_length=4096, beta_fast=1.0, yarn=True)
    )

    def __post_init__(self):
        require_positive(
            self,
            "vocab_size d_model layers ffn_dim heads kv_lora_rank qk_nope_dim qk_rope_dim v_dim max_length".split(),
        )
        if not 0 <= self.dense_layers <= self.layers:
            raise ConfigError(f"text.dense_layers={self.dense_layers} must lie between 0 and layers={self.layers}")
        if self.qk_rope_dim % 2:
            raise ConfigError(f"text.qk_rope_dim={self.qk_rope_dim} must be even")

    @property
    def qk_dim(self) -> int:
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers


@dataclass(frozen=True)
class K25Config:
    """The whole model. Token ids of the media markers belong to it, as in the public `config.json`."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projector_eps: float = 1e-5
    media_pad_id: int = 163605
    media_begin_id: int = 163602
    media_end_id: int = 163604
    bos_id: int = 163584
    eos_ids: tuple[int, ...] = (163586, 163585)  # each of them ends an answer
    pad_id: int = 163839

    def __post_init__(self):
        if not 0 <= self.media_pad_id:
            raise ConfigError(f"media_pad_id={self.media_pad_id} must not be negative")
        if min(self.eos_ids, default=-1) < 0:
            raise ConfigError(f"eos_ids={self.eos_ids} must be one or more token ids, none of them negative")
