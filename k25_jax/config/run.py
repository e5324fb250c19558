"""A run: data, optimizer, loop, mesh, and the experiment that holds them all."""

from dataclasses import dataclass, field

from k25_jax.config.checks import ConfigError, Schedule, check_schedule, one_of, require_positive
from k25_jax.config.model import K25Config
from k25_jax.config.rl import RLConfig


@dataclass(frozen=True)
class SourceConfig:
    """One source of records: a folder, JSONL, Parquet, WebDataset tar, ArrayRecord shards, or a rendered task."""

    path: str = ""
    kind: str = "auto"  # auto | folder | jsonl | parquet | webdataset | arrayrecord | task
    weight: Schedule = 1.0  # its share of the tokens, beside the weights of the other sources of its modality
    modality: str = "auto"  # auto | text | vision; auto is vision when one of its records has images or videos
    max_epochs: float = 0.0  # how often its records are read at most; 0: without end

    def __post_init__(self):
        one_of(self, "kind", ("auto", "folder", "jsonl", "parquet", "webdataset", "arrayrecord", "task"))
        one_of(self, "modality", ("auto", "text", "vision"))
        if not self.path:
            raise ConfigError("data.sources: every source needs a path")
        check_schedule(f"data.sources: weight={self.weight} of {self.path}", self.weight)
        if self.max_epochs < 0:
            raise ConfigError(f"data.sources: max_epochs={self.max_epochs} of {self.path} must not be negative")


@dataclass(frozen=True)
class ValidationConfig:
    """Data that is never trained on: sources of their own, or one in so many records of each source of the training."""

    sources: tuple[SourceConfig, ...] = ()
    one_in: int = 0  # of the records of data.sources, by a seeded draw; 0: none
    batches: int = 8  # of a validation, always the same; their shape is that of the training's

    def __post_init__(self):
        require_positive(self, ["batches"])
        if self.one_in < 0 or self.one_in == 1:
            raise ConfigError(f"data.validation.one_in={self.one_in} must be at least 2, or 0 for none")
        if self.one_in and self.sources:
            raise ConfigError(
                f"data.validation.one_in={self.one_in} and data.validation.sources exclude each other; leave out one"
            )


@dataclass(frozen=True)
class DataConfig:
    """Packed batches: `batch_size` rows of `seq_len` tokens and `packs` vision packs of `pack_patches` patches.

    The batch is made of `lanes` independent streams, of batch_size / lanes rows and packs / lanes packs each, so that it
    is the same whatever number of hosts reads it; where none are given, each host that reads has one. Packs are filled
    to the brim or left out, so give them about the patches that `vision_share` asks of a batch: batch_size x seq_len x
    vision_share x patches a token of vision sources.
    """

    sources: tuple[SourceConfig, ...] = ()
    batch_size: int = 8
    seq_len: int = 512
    packs: int = 1
    pack_patches: int = 1024
    max_image_patches: int = 16384
    max_frame_patches: int = 4096
    video_fps: float = 2.0
    tokenizer: str = ""  # a directory with tiktoken.model or tokenizer.json; empty: byte-level
    shuffle: bool = True
    seed: int = 0
    lanes: int = 0  # a multiple of the hosts that read; 0: as many
    vision_share: Schedule | None = None  # of all tokens, those of vision sources' documents; None: as the weights say
    text_tokens: int = 0  # of text sources in the whole run, exactly; 0: without end
    vision_tokens: int = 0  # of vision sources
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self):
        require_positive(self, "batch_size seq_len pack_patches max_image_patches max_frame_patches".split())
        if self.lanes < 0:
            raise ConfigError(f"data.lanes={self.lanes} must be positive, or 0 for as many as hosts that read")
        for name in ("batch_size", "packs"):
            if self.lanes and getattr(self, name) % self.lanes:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be a multiple of data.lanes={self.lanes}")
        for name in ("text_tokens", "vision_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name}={getattr(self, name)} must not be negative")
        if self.vision_share is not None:
            check_schedule(f"data.vision_share={self.vision_share}", self.vision_share, zero=True, most=1.0)


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
        one_of(self, "name", ("adamw", "muonclip"))
        one_of(self, "muon_dtype", ("float32", "bfloat16"))
        require_positive(self, "peak_lr eps clip_norm qk_clip".split())
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
    checkpoint_minutes: float = 0.0  # also after so long without one, by the clock of process 0; 0: by steps alone
    eval_every: int = 0  # steps between two validations (data.validation), and one at the end; 0: none
    keep: int = 3
    max_bad_steps: int = 5  # NaN/inf steps in a row before the run stops
    remat: str = "none"  # none | full | dots: what of a layer is kept for its gradient; in a pipeline always as full
    accumulate: int = 1  # parts of a batch that the language model takes one after the other
    vision: str = "dep"  # on a mesh, who encodes which packs: dep | stage0 | plain (parallel/dep.py)
    vision_rounds: int = 0  # in which features come to the tokens of a part; 0: as many as any batch can need
    compute_dtype: str = "float32"
    trainable: tuple[str, ...] = ()  # parts or paths that are trained, as "vision" or "moe/attention"; none: all
    siglip_weight: float = 0.0  # of the contrastive loss of the stage vit; 0: none
    init_from: str = ""  # a run or a public checkpoint to start from
    init_vision_from: str = ""  # a run whose encoder and projector to start from, or SigLIP-SO-400M weights

    def __post_init__(self):
        one_of(self, "remat", ("none", "full", "dots"))
        one_of(self, "vision", ("dep", "stage0", "plain"))
        one_of(self, "compute_dtype", ("float32", "bfloat16"))
        require_positive(self, "steps log_every checkpoint_every keep max_bad_steps accumulate".split())
        for name in ("siglip_weight", "vision_rounds", "checkpoint_minutes", "eval_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative")
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
        require_positive(self, "pipe expert context repeats".split())
        if self.microbatches < 0 or self.microbatches % self.pipe:
            raise ConfigError(
                f"mesh.microbatches={self.microbatches} must be a multiple of mesh.pipe={self.pipe}, or 0 for as many"
            )
        if self.fsdp != -1 and self.fsdp < 1:
            raise ConfigError(f"mesh.fsdp={self.fsdp} must be positive, or -1 for the devices that are left")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of what host and devices do in some steps, for TensorBoard: WORKDIR/profile (train/profiling.py)."""

    start: int = 0  # the first step that is traced; 0: none. Choose one after the compilation
    steps: int = 3
    everywhere: bool = False  # in all processes, not process 0 alone

    def __post_init__(self):
        require_positive(self, ["steps"])
        if self.start < 0:
            raise ConfigError(f"profile.start={self.start} must not be negative; 0 traces nothing")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs; saved with it as `config.json`."""

    name: str = "run"
    stage: str = "pretrain"  # pretrain | vit | rl: which loss (train/stages.py)
    model: K25Config = field(default_factory=K25Config)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    rl: RLConfig = field(default_factory=RLConfig)  # of the stage rl

    def __post_init__(self):
        one_of(self, "stage", ("pretrain", "vit", "rl"))
        held_out = self.data.validation
        if self.train.eval_every and not (held_out.sources or held_out.one_in):
            raise ConfigError(
                f"train.eval_every={self.train.eval_every} needs data to validate on: set data.validation.sources, or "
                "data.validation.one_in"
            )
        if self.stage != "vit" and self.train.siglip_weight:
            raise ConfigError(f"train.siglip_weight={self.train.siglip_weight} needs stage='vit', not {self.stage!r}")
