"""What the engine is asked, and which of it can be answered, what it answers, and the sizes it is built with."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from k25_jax.config import K25Config
from k25_jax.sampling.sample import PromptError, SampleConfig, check_prompts
from k25_jax.text.turn import TurnForm
from k25_jax.vision.patchpack import Clip

CACHE_TOKENS = 2**16  # of all answers under way, as `fitting` has it


class EngineError(RuntimeError):
    """The engine cannot do what was asked of it; the message says why and what to do."""


class Overloaded(EngineError):
    """The queue is full: ask again later."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. A program is compiled for each pair of `rows` and `pieces`, and for each of `vision_patches`.

    The cache takes pages x page_size x layers x (kv_lora_rank + qk_rope_dim) numbers. Rows, pieces and pages are those of
    all devices, which have equal shares of them, rounded up; a request lies on one device with all its pages.
    """

    rows: tuple[int, ...] = (1, 8, 32)  # sequences that decode in a step; the largest is how many run at once
    pieces: tuple[int, ...] = (1, 8)  # pieces of prompts that are read in a step beside them
    piece: int = 32  # tokens of a piece, at most
    pages: int = 1024
    page_size: int = 16  # tokens of a page
    max_length: int | None = None  # tokens of a prompt and its answer; None: what model and pages allow
    queue: int = 256  # samples that may wait
    vision_patches: tuple[int, ...] = (256, 1024)  # patches that are encoded at once; the largest bounds an image
    vision_tokens: int = 2048  # encoded tokens of images that are held; bounds those of one prompt
    alternatives: int = 0  # likeliest tokens that a request may ask for beside each drawn one
    dtype: str = "float32"  # of weights and cache
    tensor: int = (
        0  # devices that share out heads, widths, vocabulary; 0: the fewest that leave a divisor of the experts
    )

    def __post_init__(self):
        for name in ("rows", "pieces", "vision_patches"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or min(sizes, default=1) < 1 or not (sizes or name[0] == "v"):
                raise ValueError(f"engine.{name}={sizes} must be positive numbers in rising order")
        for name in ("piece", "pages", "page_size", "queue", "vision_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name}={getattr(self, name)} must be at least 1")
        if self.alternatives < 0 or (self.max_length is not None and self.max_length < 2):
            raise ValueError(
                f"engine.alternatives={self.alternatives} must not be negative, max_length={self.max_length} at least 2"
            )
        if self.tensor < 0:
            raise ValueError(f"engine.tensor={self.tensor} must not be negative")
        jnp.dtype(self.dtype)

    def share(self, devices: int) -> "EngineConfig":
        """The sizes that each of `devices` has; buffers of images are common to all."""
        rows, pieces = (tuple(sorted({-(-n // devices) for n in sizes})) for sizes in (self.rows, self.pieces))
        return dataclasses.replace(self, rows=rows, pieces=pieces, pages=-(-self.pages // devices))


def fitting(
    config: K25Config,
    batch: int,
    length: int | None = None,
    patches: int = 16384,
    dtype: str = "float32",
    devices: int = 1,
) -> EngineConfig:
    """Sizes for `batch` answers at once, up to `length` tokens each with its prompt; None: all that the model has.

    Each device has room for its share of them up to CACHE_TOKENS, and for one in any case. An image, or a chunk of video,
    has up to `patches` patches. There are few programs, and those for images are compiled when one of that size comes.
    """
    most = config.text.max_length
    length = min(length or most, most)
    largest = 2 * patches + 8  # whole groups can double the patches of a long image
    return EngineConfig(
        rows=(batch,),
        pieces=(max(8, batch // 4),),
        piece=32 if most <= 8192 else 128,
        pages=devices * -(-max(length, min(-(-batch // devices) * length, CACHE_TOKENS)) // EngineConfig.page_size),
        max_length=length,
        queue=batch,
        vision_patches=(*(64 * 4**i for i in range(16) if 64 * 4**i < largest), largest),
        vision_tokens=max(length, 4096),
        dtype=dtype,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, one media_pad per vision token, with its images and video chunks, and how to answer it `n` times.

    `stop` are texts that end an answer (`text.stops`), and need the engine's tokenizer; `form` is that of the turn in which
    they are looked for, and without one the answer is a text from end to end. Sample i draws its token at place t with
    fold_in(fold_in(key(seed), i), t), whatever else the engine does.
    """

    tokens: Sequence[int]
    clips: Sequence[Clip] = ()
    sampling: SampleConfig = SampleConfig()
    n: int = 1
    stop: tuple[str, ...] = ()
    alternatives: int = 0
    form: TurnForm | None = None


def check_request(
    request: Request, config: K25Config, settings: EngineConfig, max_length: int, finds_texts: bool, sees: bool
) -> None:
    """Raise PromptError for a request that an engine can never answer.

    It takes `max_length` tokens of a prompt and its answer, `finds_texts` with a tokenizer, and `sees` with an encoder.
    """
    s, sampling, length = settings, request.sampling, len(request.tokens)
    check_prompts([request.tokens], [request.clips], sampling.max_tokens, config)
    if length + sampling.max_tokens > max_length:
        raise PromptError(
            f"{length} tokens and max_tokens={sampling.max_tokens} exceed the {max_length} that this engine takes "
            "(engine.max_length, engine.pages); shorten the prompt or lower max_tokens"
        )
    if not 1 <= request.n <= s.queue:
        raise PromptError(f"n={request.n} must lie between 1 and the queue's {s.queue}")
    if not 0 <= sampling.seed < 2**32:
        raise PromptError(f"seed={sampling.seed} must lie in [0, 2**32)")
    if not 0 <= request.alternatives <= s.alternatives:
        raise PromptError(
            f"alternatives={request.alternatives} must lie between 0 and engine.alternatives={s.alternatives}"
        )
    if "" in request.stop or (request.stop and not finds_texts):
        raise PromptError("stop texts must not be empty, and an engine that is to find them needs a tokenizer")
    if request.clips and not sees:
        raise PromptError("this engine takes no images or video: no vision encoder, or engine.vision_patches=()")
    for clip in request.clips:
        if len(clip.patches) > s.vision_patches[-1] or clip.patches.shape[1] != config.vision.patch_dim:
            raise PromptError(
                f"{clip.source or 'image'}: patches {clip.patches.shape} for an engine that takes up to "
                f"{s.vision_patches[-1]} of {config.vision.patch_dim} values; use a smaller image or raise "
                "engine.vision_patches"
            )
    if sum(clip.tokens for clip in request.clips) > s.vision_tokens:
        raise PromptError(f"the images take more than engine.vision_tokens={s.vision_tokens} tokens; give fewer")


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """A token of sample `sample` of request `request`.

    `logprob` is that of the unmodified distribution, `version` that of the weights that gave it; `alternatives` are the
    likeliest tokens there, (token, logprob).
    """

    request: int
    sample: int
    token: int
    logprob: float
    version: int
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class FinishEvent:
    """The end of one sample: "stop", "length", "abort" or "error".

    `stopped_by` is the token id or the text that ended it; its tokens were given like any other. `error` says what
    went wrong.
    """

    request: int
    sample: int
    reason: str
    stopped_by: int | str | None = None
    error: str = ""


Event = TokenEvent | FinishEvent


@dataclasses.dataclass
class Completion:
    """All events of one sample, put together."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    alternatives: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
    reason: str = ""
    stopped_by: int | str | None = None
    error: str = ""

    def add(self, event: Event) -> None:
        """The next event of this sample."""
        if isinstance(event, FinishEvent):
            self.reason, self.stopped_by, self.error = event.reason, event.stopped_by, event.error
            return
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.versions.append(event.version)
        self.alternatives.append(event.alternatives)
