"""`config.json` and `generation_config.json` of Hugging Face: reads every spelling, writes one for all (K2.5 §3.2).

The public checkpoint and `transformers` name the vision fields differently (`vt_hidden_size`, `hidden_size`). A
language model alone (Kimi K2, Moonlight, DeepSeek-V3) has the text fields at the top level. What `K25Config` cannot
represent raises `CheckpointError` with the file, the field and its value.
"""

import math

from k25_jax.checkpoint.store import CheckpointError
from k25_jax.config import ConfigError, K25Config, MoEConfig, RopeConfig, TextConfig, VisionConfig, from_dict
from k25_jax.config.json_file import read_object, shown
from k25_jax.runtime.paths import AnyPath, to_path

MOST = 2**31  # no size in a config is this large
TEXT_TYPES = ("kimi_k2", "deepseek_v3")

# field, its public name, its name in transformers, and the default of both
VISION_FIELDS = (
    ("layers", "vt_num_hidden_layers", "num_hidden_layers", 27),
    ("width", "vt_hidden_size", "hidden_size", 1152),
    ("heads", "vt_num_attention_heads", "num_attention_heads", 16),
    ("mlp_dim", "vt_intermediate_size", "intermediate_size", 4304),
    ("patch_size", "patch_size", "patch_size", 14),
    ("pos_height", "init_pos_emb_height", "pos_emb_height", 64),
    ("pos_width", "init_pos_emb_width", "pos_emb_width", 64),
    ("pos_time", "init_pos_emb_time", "pos_emb_time", 4),
)
# field, its name, its default in transformers
TEXT_FIELDS = (
    ("vocab_size", "vocab_size", 129280),
    ("d_model", "hidden_size", 7168),
    ("layers", "num_hidden_layers", 61),
    ("ffn_dim", "intermediate_size", 18432),
    ("heads", "num_attention_heads", 128),
    ("kv_lora_rank", "kv_lora_rank", 512),
    ("qk_nope_dim", "qk_nope_head_dim", 128),
    ("qk_rope_dim", "qk_rope_head_dim", 64),
    ("v_dim", "v_head_dim", 128),
    ("attention_bias", "attention_bias", False),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("init_std", "initializer_range", 0.02),
    ("max_length", "max_position_embeddings", 4096),
)
MOE_FIELDS = (
    ("experts", "n_routed_experts", 256),
    ("top_k", "num_experts_per_tok", 8),
    ("ffn_dim", "moe_intermediate_size", 2048),
    ("groups", "n_group", 8),
    ("top_groups", "topk_group", 4),
    ("normalise", "norm_topk_prob", True),
    ("scale", "routed_scaling_factor", 2.5),
)
# what the model always does: other values cannot be represented
TEXT_FIXED = {
    "hidden_act": "silu",
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
VISION_FIXED = {
    "merge_type": "sd2_tpool",
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
BOS_AND_PAD = ("bos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
YARN_FIXED = {"truncate": True, "partial_rotary_factor": 1.0, "attention_factor": None}


class _Section:
    """One object of a config file; `get` and `expect` name the file and the field in every complaint."""

    def __init__(self, values, where: str):
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be an object, not {shown(values)}")
        self.values, self.where = values, where

    def get(self, default, *names, null=None):
        """The value of the first of `names` that is there (they must agree), of the type of `default`.

        A null counts as absent, or as `null` where that is given.
        """
        found = {name: self._typed(name, default, null) for name in names if name in self.values}
        found = {name: value for name, value in found.items() if value is not None}
        if any(value != next(iter(found.values())) for value in found.values()):
            both = " and ".join(f"{name}={shown(value)}" for name, value in found.items())
            raise CheckpointError(f"{self.where}: {both} disagree")
        return next(iter(found.values()), default)

    def _typed(self, name, default, null):
        value, kind = self.values[name], type(default)
        if value is None:
            return null
        if kind is float and type(value) is int:
            value = float(max(min(value, MOST), -1))
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {name}={shown(value)} must be of type {kind.__name__}")
        if kind in (int, float) and not 0 <= value < (MOST if kind is int else math.inf):
            raise CheckpointError(f"{self.where}: {name}={shown(value)} must lie between 0 and {MOST:,}")
        return value

    def token_ids(self, name: str, vocabulary: int) -> list[int]:
        """A token id or a list of them; none where the field is absent or null."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(id_) is int and 0 <= id_ < vocabulary for id_ in ids):
            raise CheckpointError(
                f"{self.where}: {name}={shown(value)} must be a token id, or a list of them, below "
                f"vocab_size={vocabulary}"
            )
        return ids

    def expect(self, name: str, *supported):
        """Raise unless field `name` is absent, null or one of `supported`."""
        value = self.values.get(name)
        if value is not None and value not in supported:
            allowed = " or ".join(map(repr, supported)) or "absent"
            raise CheckpointError(f"{self.where}: {name}={shown(value)} is not supported; it can be {allowed}")

    def section(self, name: str) -> "_Section":
        value = self.values.get(name)
        return _Section({} if value is None else value, f"{self.where}: {name}")


# ------------------------------------------------------------------------------------------------------------- reading
def read_config(directory) -> K25Config:
    """The model that `directory` (or a config.json) describes.

    A language model alone gets the default vision encoder: its checkpoint fills only the text part of the parameters.
    """
    top = _top(directory)
    _encoding(top)
    try:
        return _language_model(top) if _is_language_model(top) else _whole_model(top)
    except ConfigError as error:
        raise CheckpointError(f"{top.where}: {error}") from error


def language_model_alone(directory) -> bool:
    """Whether `directory` (or a config.json) describes a language model without vision encoder."""
    top = _top(directory)
    return _is_language_model(top) or top.values.get("vision_config") is None


def declared_encoding(directory) -> str:
    """What quantization_config says of the weights: "" (nothing), "int4" or "fp8", as in quantised.py."""
    return _encoding(_top(directory))


def _top(directory) -> _Section:
    path = to_path(directory)
    path = path / "config.json" if path.is_dir() else path
    top = _Section(_read(path), str(path))
    model_type = top.values.get("model_type")
    if model_type not in ("kimi_k25", *TEXT_TYPES):
        raise CheckpointError(f"{path}: model_type={shown(model_type)} is not one of kimi_k25, {', '.join(TEXT_TYPES)}")
    return top


def _is_language_model(top: _Section) -> bool:
    return top.values["model_type"] in TEXT_TYPES


def _read(path: AnyPath) -> dict:
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _language_model(top: _Section) -> K25Config:
    text = _text(top, top.get(False, "tie_word_embeddings"))
    return K25Config(text=text, **_token_ids(top, top, text.vocab_size))


def _whole_model(top: _Section) -> K25Config:
    text, vision = top.section("text_config"), top.section("vision_config")
    text.expect("model_type", *TEXT_TYPES)
    by_transformers = "image_token_id" in top.values
    tied = top.get(True if by_transformers else text.get(False, "tie_word_embeddings"), "tie_word_embeddings")
    language = _text(text, tied)
    config = K25Config(
        vision=_vision(vision),
        text=language,
        projector_eps=_Section(vision.values | top.values, top.where).get(
            1e-5, "projector_ln_eps", "projection_layer_norm_eps"
        ),
        media_pad_id=top.get(163605, "media_placeholder_token_id", "image_token_id"),
        media_begin_id=top.get(163602, "vision_start_token_id"),
        media_end_id=top.get(163604, "vision_end_token_id"),
        **_token_ids(top, text, language.vocab_size),
    )
    for section, name in ((top, "projection_hidden_size"), (vision, "mm_hidden_size")):
        section.expect(name, config.vision.width)
    vision.expect("text_hidden_size", config.text.d_model)
    return config


def _vision(section: _Section) -> VisionConfig:
    for name, value in VISION_FIXED.items():
        section.expect(name, value)
    section.expect("hidden_act", "gelu_pytorch_tanh")
    rope = section.section("rope_parameters")
    rope.expect("rope_type", "axial", "default")
    fields = {field: section.get(default, public, other) for field, public, other, default in VISION_FIELDS}
    fields |= {"merge": section.get([2, 2], "merge_kernel_size"), "rope_theta": rope.get(10000.0, "rope_theta")}
    return from_dict(VisionConfig, fields, "vision_config")


def _text(section: _Section, tied: bool) -> TextConfig:
    fields = {field: section.get(default, name) for field, name, default in TEXT_FIELDS}
    for name, value in TEXT_FIXED.items():
        section.expect(name, value)
    section.expect("num_key_value_heads", fields["heads"])
    experts = {field: section.get(default, name) for field, name, default in MOE_FIELDS}
    return TextConfig(
        **fields,
        dense_layers=min(section.get(3, "first_k_dense_replace"), fields["layers"]),
        q_lora_rank=section.get(1536, "q_lora_rank", null=0),
        tie_embeddings=tied,
        moe=MoEConfig(**experts, shared_experts=section.get(1, "n_shared_experts", null=0)),
        rope=_rope(section, fields["max_length"]),
    )


def _rope(section: _Section, max_length: int) -> RopeConfig:
    """`rope_theta` and `rope_scaling` (public), or `rope_parameters` (transformers)."""
    name = "rope_scaling" if section.values.get("rope_scaling") else "rope_parameters"
    rope = section.section(name)
    theta = rope.get(section.get(10000.0, "rope_theta"), "rope_theta")
    kind = rope.get("default", "rope_type", "type")
    if kind == "default":
        return RopeConfig(theta=theta, original_length=max_length)
    if kind != "yarn":
        raise CheckpointError(f"{rope.where}: rope type {kind!r} is not supported; it can be 'default' or 'yarn'")
    known = {*YARN_FIELDS, *YARN_FIXED, "rope_theta", "rope_type", "type"}
    for field in set(rope.values) - known:
        rope.expect(field)
    for field, value in YARN_FIXED.items():
        rope.expect(field, value)
    original = rope.get(max_length, "original_max_position_embeddings")
    if not original:
        raise CheckpointError(f"{rope.where}: original_max_position_embeddings=0 must be positive")
    return RopeConfig(
        theta=theta,
        yarn=True,
        original_length=original,
        factor=rope.get(max_length / original, "factor"),
        beta_fast=rope.get(32.0, "beta_fast"),
        beta_slow=rope.get(1.0, "beta_slow"),
        mscale=rope.get(0.0, "mscale"),  # 0: not given, which has a meaning of its own
        mscale_all_dim=rope.get(0.0, "mscale_all_dim"),
    )


def _token_ids(top: _Section, text: _Section, vocabulary: int) -> dict:
    """Begin, padding and all ends: those of generation_config.json, of the top level and of text_config together."""
    defaults, folder = K25Config(), to_path(top.where).parent
    generation = _Section(read_generation(folder), str(folder / GENERATION))
    bos, pad = (top.token_ids(name, vocabulary) or text.token_ids(name, vocabulary) for name in BOS_AND_PAD)
    ends = [id_ for part in (generation, top, text) for id_ in part.token_ids("eos_token_id", vocabulary)]
    ends = tuple(dict.fromkeys(ends)) or defaults.eos_ids
    return {"bos_id": (bos or [defaults.bos_id])[0], "eos_ids": ends, "pad_id": (pad or ends)[0]}


def read_generation(directory: AnyPath) -> dict:
    """What generation_config.json says; {} where there is none."""
    path = directory / GENERATION
    return _read(path) if path.exists() else {}


def _encoding(top: _Section) -> str:
    """Raises CheckpointError where a scheme is not one that quantised.py reads, or two of them differ."""
    found = {_scheme(part.section("quantization_config")) for part in (top, top.section("text_config"))} - {""}
    if len(found) > 1:
        raise CheckpointError(f"{top.where}: quantization_config says {' and '.join(sorted(found))}")
    return next(iter(found), "")


def _scheme(section: _Section) -> str:
    """The encoding that one quantization_config describes."""
    if not section.values:
        return ""
    section.expect("quant_method", "compressed-tensors", "fp8")
    if section.values.get("quant_method") == "fp8":
        section.expect("weight_block_size", [128, 128])
        section.expect("fmt", "e4m3")
        return "fp8"
    section.expect("format", "pack-quantized")
    groups = section.section("config_groups")
    for name in groups.values:
        weights = groups.section(name).section("weights")
        for field, value in INT4.items():
            weights.expect(field, value)
    return "int4"


# ------------------------------------------------------------------------------------------------------------- writing
def write_config(config: K25Config, text_only: bool = False) -> dict:
    """The contents of config.json: public names, and beside them those that `transformers` reads.

    `text_only` gives the layout of a language model alone.
    """
    _check_writable(config)
    v, ids = config.vision, write_token_ids(config)
    if text_only:
        return _text_section(config.text) | ids
    vision = {name: getattr(v, field) for field, *names, _ in VISION_FIELDS for name in names}
    vision |= VISION_FIXED | {
        "hidden_act": "gelu_pytorch_tanh",
        "merge_kernel_size": list(v.merge),
        "mm_hidden_size": v.width,
        "text_hidden_size": config.text.d_model,
        "projector_ln_eps": config.projector_eps,
        "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        "model_type": "kimi_k25_vision",
    }
    return {
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        **ids,
        "media_placeholder_token_id": config.media_pad_id,
        "image_token_id": config.media_pad_id,
        "vision_start_token_id": config.media_begin_id,
        "vision_end_token_id": config.media_end_id,
        "projection_hidden_size": v.width,
        "projection_layer_norm_eps": config.projector_eps,
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": _text_section(config.text) | ids,
        "vision_config": vision,
    }


def _text_section(text: TextConfig) -> dict:
    rope = text.rope
    scaling = None
    if rope.yarn:
        values = (rope.factor, rope.original_length, rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim)
        scaling = {"type": "yarn"} | dict(zip(YARN_FIELDS, values, strict=True))
        scaling = {name: value for name, value in scaling.items() if value or not name.startswith("mscale")}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: getattr(text, field) for field, name, _ in TEXT_FIELDS},
        **{name: getattr(text.moe, field) for field, name, _ in MOE_FIELDS},
        **TEXT_FIXED,
        "num_key_value_heads": text.heads,
        "first_k_dense_replace": text.dense_layers,
        "q_lora_rank": text.q_lora_rank or None,
        "n_shared_experts": text.moe.shared_experts,
        "num_nextn_predict_layers": 0,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": text.tie_embeddings,
    }


def write_token_ids(config: K25Config) -> dict:
    """As both config files have them: several ends are a list."""
    ends = list(config.eos_ids) if len(config.eos_ids) > 1 else config.eos_ids[0]
    return {"bos_token_id": config.bos_id, "eos_token_id": ends, "pad_token_id": config.pad_id}


def _check_writable(config: K25Config):
    if config.vision.norm_eps != 1e-5:
        raise CheckpointError(
            f"vision.norm_eps={config.vision.norm_eps} has no field in config.json: it is always 1e-5"
        )
    if config.pad_id >= config.text.vocab_size:
        raise CheckpointError(f"pad_id={config.pad_id} lies outside text.vocab_size={config.text.vocab_size}")
