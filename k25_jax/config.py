"""Configuration: frozen dataclasses, strict parsing, presets, experiment files.

Experiment files hold `get_config(arg)` and return an `ml_collections.ConfigDict`; `load_experiment` turns it into the
dataclasses below. Nothing else in the package sees a ConfigDict.
"""

import ast
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import types
import typing
from dataclasses import dataclass, field

import ml_collections


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the remedy."""


# ---------------------------------------------------------------------------------------------------------------- model
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
        _require_positive(self, "layers width heads mlp_dim patch_size pos_height pos_width pos_time".split())
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
    grouped_matmul: str = "auto"  # auto | blocked | megablox | ragged | reference
    dispatch: str = "gather"  # gather | alltoall: how token copies reach experts on other devices

    def __post_init__(self):
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
        _one_of(self, "dispatch", ("gather", "alltoall"))
        _one_of(self, "grouped_matmul", ("auto", "blocked", "megablox", "ragged", "reference"))


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
        _require_positive(
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
    eos_id: int = 163586
    pad_id: int = 163839

    def __post_init__(self):
        if not 0 <= self.media_pad_id:
            raise ConfigError(f"media_pad_id={self.media_pad_id} must not be negative")


# ------------------------------------------------------------------------------------------------------------- training
Schedule = float | tuple[tuple[float, float], ...]  # a number, or steps ((progress, value), ..) from progress 0 on


@dataclass(frozen=True)
class SourceConfig:
    """One source of records: a folder, JSONL, Parquet, WebDataset tar, ArrayRecord shards, or a rendered task."""

    path: str = ""
    kind: str = "auto"  # auto | folder | jsonl | parquet | webdataset | arrayrecord | task
    weight: Schedule = 1.0  # its share of the tokens, beside the weights of the other sources of its modality
    modality: str = "auto"  # auto | text | vision; auto is vision when one of its records has images or videos
    max_epochs: float = 0.0  # how often its records are read at most; 0: without end

    def __post_init__(self):
        _one_of(self, "kind", ("auto", "folder", "jsonl", "parquet", "webdataset", "arrayrecord", "task"))
        _one_of(self, "modality", ("auto", "text", "vision"))
        if not self.path:
            raise ConfigError("data.sources: every source needs a path")
        _check_schedule(f"data.sources: weight={self.weight} of {self.path}", self.weight)
        if self.max_epochs < 0:
            raise ConfigError(f"data.sources: max_epochs={self.max_epochs} of {self.path} must not be negative")


@dataclass(frozen=True)
class DataConfig:
    """Packed batches: `batch_size` rows of `seq_len` tokens and `packs` vision packs of `pack_patches` patches.

    The batch is made of `lanes` independent streams, of batch_size / lanes rows and packs / lanes packs each, so that it
    is the same whatever number of hosts reads it. Packs are filled to the brim or left out, so give them about the
    patches that `vision_share` asks of a batch: batch_size x seq_len x vision_share x patches a token of vision sources.
    """

    sources: tuple[SourceConfig, ...] = ()
    batch_size: int = 8
    seq_len: int = 512
    packs: int = 1
    pack_patches: int = 1024
    max_image_patches: int = 16384
    max_frame_patches: int = 4096
    video_fps: float = 2.0
    tokenizer: str = ""  # a directory with tiktoken.model; empty: byte-level
    shuffle: bool = True
    seed: int = 0
    lanes: int = 1  # a multiple of the hosts that read
    vision_share: Schedule | None = None  # of all tokens, those of vision sources' documents; None: as the weights say
    text_tokens: int = 0  # of text sources in the whole run, exactly; 0: without end
    vision_tokens: int = 0  # of vision sources

    def __post_init__(self):
        _require_positive(self, "batch_size seq_len pack_patches max_image_patches max_frame_patches lanes".split())
        for name in ("batch_size", "packs"):
            if getattr(self, name) % self.lanes:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be a multiple of data.lanes={self.lanes}")
        for name in ("text_tokens", "vision_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name}={getattr(self, name)} must not be negative")
        if self.vision_share is not None:
            _check_schedule(f"data.vision_share={self.vision_share}", self.vision_share, zero=True, most=1.0)


@dataclass(frozen=True)
class OptimConfig:
    """MuonClip or AdamW with a warm-up, constant, cosine-decay schedule."""

    name: str = "adamw"  # adamw | muonclip
    peak_lr: float = 2e-4
    end_lr: float = 2e-5
    warmup_steps: int = 500
    decay_steps: int = 0  # the last steps, over which the rate falls to end_lr; 0: none
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    momentum: float = 0.95  # of Muon
    muon_dtype: str = "bfloat16"  # of Muon's products
    qk_clip: float = 100.0  # muonclip holds attention logits below this
    offload: bool = False  # on a mesh, the running means lie in the hosts' memory between their uses

    def __post_init__(self):
        _one_of(self, "name", ("adamw", "muonclip"))
        _one_of(self, "muon_dtype", ("float32", "bfloat16"))
        _require_positive(self, "peak_lr eps clip_norm qk_clip".split())
        for name in ("end_lr", "warmup_steps", "decay_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: length, logging, checkpoints, precision."""

    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 3
    max_bad_steps: int = 5  # NaN/inf steps in a row before the run stops
    remat: str = "none"  # none | full | dots
    accumulate: int = 1  # parts of a batch that the language model takes one after the other
    vision: str = "dep"  # on a mesh, who encodes which packs: dep | stage0 | plain (parallel/dep.py)
    compute_dtype: str = "float32"
    trainable: tuple[str, ...] = ()  # parts or paths that are trained, as "vision" or "moe/attention"; none: all
    siglip_weight: float = 0.0  # of the contrastive loss of the stage vit; 0: none
    init_from: str = ""  # a run or a public checkpoint to start from
    init_vision_from: str = ""  # a run whose encoder and projector to start from, or SigLIP-SO-400M weights

    def __post_init__(self):
        _one_of(self, "remat", ("none", "full", "dots"))
        _one_of(self, "vision", ("dep", "stage0", "plain"))
        _one_of(self, "compute_dtype", ("float32", "bfloat16"))
        _require_positive(self, "steps log_every checkpoint_every keep max_bad_steps accumulate".split())
        if self.siglip_weight < 0:
            raise ConfigError(f"train.siglip_weight={self.siglip_weight} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed={self.seed} must lie in [0, 2**32)")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (K2.5 §3.8); fsdp=-1 takes what the others leave.

    With pipe > 1 the MoE layers are a pipeline: a batch passes in `microbatches`, `repeats` times through each stage.
    Over several slices of a pod pipe alone crosses from one to another, or fsdp where pipe is no multiple of them.
    """

    pipe: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1  # devices that share out the tokens of a row
    repeats: int = 1
    microbatches: int = 0  # 0: as many as pipe

    def __post_init__(self):
        _require_positive(self, "pipe expert context repeats".split())
        if self.microbatches < 0 or self.microbatches % self.pipe:
            raise ConfigError(
                f"mesh.microbatches={self.microbatches} must be a multiple of mesh.pipe={self.pipe}, or 0 for as many"
            )
        if self.fsdp != -1 and self.fsdp < 1:
            raise ConfigError(f"mesh.fsdp={self.fsdp} must be positive, or -1 for the devices that are left")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs; saved with it as `config.json`."""

    name: str = "run"
    stage: str = "pretrain"  # pretrain | vit: which loss (train/stages.py)
    model: K25Config = field(default_factory=K25Config)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        _one_of(self, "stage", ("pretrain", "vit"))
        if self.stage != "vit" and self.train.siglip_weight:
            raise ConfigError(f"train.siglip_weight={self.train.siglip_weight} needs stage='vit', not {self.stage!r}")


# -------------------------------------------------------------------------------------------------------------- presets
# Byte-level models: 256 bytes, then the special tokens of text/tokenizer.py.
BYTE_IDS = dict(media_begin_id=261, media_end_id=263, media_pad_id=264, bos_id=256, eos_id=258, pad_id=276)


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
    raise ConfigError(f"no preset {name!r} (there are {', '.join(PRESETS)}){_nearest(name, PRESETS)}")


PRESETS = ("k25_1t", "moonlight_16b", "1b", "100m", "tiny")


# -------------------------------------------------------------------------------------------------------------- parsing
def from_dict(cls: type, values: typing.Mapping, where: str = ""):
    """Build dataclass `cls` from nested mappings; unknown or ill-typed keys raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where or cls.__name__}: unknown key {key!r}{_nearest(str(key), names)}")
    prefix = f"{where}." if where else ""
    return cls(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def to_dict(config) -> dict:
    """The inverse of `from_dict`: nested dictionaries, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, tuple) else config


def _coerce(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        if hint is K25Config and isinstance(value, str):
            return preset(value)
        if isinstance(value, hint):
            return value
        if not isinstance(value, typing.Mapping):
            raise ConfigError(f"{where} must be a mapping with the fields of {hint.__name__}, not {value!r}")
        return from_dict(hint, value, where)
    if isinstance(hint, types.UnionType):  # of a scalar, a tuple, None
        options = {typing.get_origin(option) or option: option for option in typing.get_args(hint)}
        if value is None and types.NoneType in options:
            return None
        return _coerce(options[tuple] if isinstance(value, (list, tuple)) else options[float], value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where} must have {len(args)} entries, not {len(value)}")
        return tuple(_coerce(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r} ({type(value).__name__})")
    return value


def _nearest(word: str, options) -> str:
    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""


def _require_positive(config, names):
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{type(config).__name__}.{name}={getattr(config, name)} must be positive")


def _check_schedule(what: str, schedule: Schedule, zero: bool = False, most: float = math.inf):
    """Steps begin at progress 0 and rise below 1; values lie in [0, most]. A constant is positive, unless `zero`."""
    if isinstance(schedule, tuple):
        begins = [begin for begin, _ in schedule]
        if begins[:1] != [0.0] or sorted(set(begins)) != begins or begins[-1] >= 1:
            raise ConfigError(f"{what}: the steps (progress, value) must begin at progress 0.0 and rise below 1")
    values = [value for _, value in schedule] if isinstance(schedule, tuple) else [schedule]
    if min(values) < 0 or max(values) > most:
        raise ConfigError(f"{what} must lie in [0, {most}]" if most < math.inf else f"{what} must be positive")
    if not zero and max(values) == 0:
        raise ConfigError(f"{what} must be positive")


def _one_of(config, name, options):
    value = getattr(config, name)
    if value not in options:
        raise ConfigError(f"{type(config).__name__}.{name}={value!r}{_nearest(str(value), options)} (one of {options})")


# ----------------------------------------------------------------------------------------------------- experiment files
def load_experiment(spec: str, overrides: typing.Sequence[str] = ()) -> Experiment:
    """Read `path/to/file.py[:arg]`, apply `section.key=value` overrides, return the dataclasses."""
    path, _, arg = spec.partition(":")
    module = import_file(path)
    config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config must return an ml_collections.ConfigDict, not {type(config).__name__}")
    values = config.to_dict()
    if isinstance(values.get("model"), str):
        values["model"] = to_dict(preset(values["model"]))
    for item in overrides:
        _override(values, item)
    return from_dict(Experiment, values)


def run_local(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """An experiment shrunk to a laptop: the tiny model, tasks that need no download, four steps."""
    tasks = (("words:train", 25.0), ("shapes:train", 28.0), ("library:train", 47.0))
    values = config.to_dict()
    data = dict(batch_size=4, seq_len=128, packs=2, pack_patches=128, max_image_patches=64)
    data["sources"] = [dict(path=path, kind="task", weight=weight) for path, weight in tasks]
    optim = values["optim"] | dict(warmup_steps=2, decay_steps=2)
    train = values["train"] | dict(
        steps=4, log_every=1, checkpoint_every=2, accumulate=1, init_from="", init_vision_from=""
    )
    return ml_collections.ConfigDict(values | dict(model="tiny", data=data, optim=optim, train=train, mesh={}))


def import_file(path: str) -> types.ModuleType:
    """An experiment file as a module; raises ConfigError."""
    file = pathlib.Path(path)
    if not file.is_file():
        siblings = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        raise ConfigError(f"no experiment file {path}{_nearest(path, siblings)}")
    module_spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg)")
    return module


def _override(values: dict, item: str):
    dotted, sep, text = item.partition("=")
    if not sep:
        raise ConfigError(f"override {item!r} must read section.key=value")
    *parents, last = dotted.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {item!r}: {name} is not a section")
    try:
        values[last] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        values[last] = text
