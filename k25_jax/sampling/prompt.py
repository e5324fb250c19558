"""From messages or token ids with media to what the sampler takes: tokens with media_pads expanded, and clips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from k25_jax.checkpoint.load import Model
from k25_jax.config import K25Config
from k25_jax.data.packing import expand_media
from k25_jax.sampling.sample import PromptError
from k25_jax.text.chat import render
from k25_jax.text.tokenizer import PUBLIC_SPECIAL, Tokenizer
from k25_jax.vision.image import MAX_PIXELS, load_image, preprocess
from k25_jax.vision.patchpack import Clip
from k25_jax.vision.video import chunks, format_timestamp, load_video


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with one media_pad per vision token, and the clips in order."""

    tokens: list[int]
    clips: list[Clip]


@dataclass(frozen=True)
class MediaReader:
    """Reads images and videos for one model.

    `max_image_patches` and `max_frame_patches` bound the tokens they take: what is larger is scaled down. `max_pixels` bounds
    what is decoded: a larger picture is refused, as is a video that takes longer than `video_seconds`.
    """

    config: K25Config
    max_image_patches: int = 16384
    max_frame_patches: int = 4096
    fps: float = 2.0
    max_frames: int = 256
    max_pixels: int = MAX_PIXELS
    video_seconds: float = math.inf

    def image(self, source, name: str = "") -> Clip:
        """One image from a path, bytes or a uint8 RGB array; `name` stands for it in errors."""
        name = name or ("image" if isinstance(source, (np.ndarray, bytes)) else str(source))
        pixels = source if isinstance(source, np.ndarray) else load_image(source, self.max_pixels, name)
        return preprocess(pixels, self.config.vision, self.max_image_patches, name)

    def video(self, source, name: str = "") -> list[tuple[str, Clip]]:
        """Chunks of up to four frames, each with its time; an array holds frames, `fps` of them a second."""
        vision, limits = self.config.vision, (self.max_frames, self.max_frame_patches)
        name = name or ("video" if isinstance(source, (np.ndarray, bytes)) else str(source))
        frames, times = load_video(
            source, self.fps, *limits, vision, max_pixels=self.max_pixels, name=name, seconds=self.video_seconds
        )
        return [(format_timestamp(time), clip) for time, clip in chunks(frames, times, vision, name)]

    def load(self, part: Mapping) -> list[tuple[str | None, Clip]]:
        """A part of a message, for `text.chat.render`; it may have a `name` for errors."""
        name = part.get("name", "")
        return self.video(part["video"], name) if "video" in part else [(None, self.image(part["image"], name))]


def default_mode(model: Model) -> str:
    """How answers of a model begin where nobody says: weights from elsewhere with Kimi's vocabulary think first."""
    kimi = model.tokenizer.special.get("<|im_end|>") == PUBLIC_SPECIAL["<|im_end|>"]
    return "thinking" if kimi and model.experiment is None else "plain"


def from_messages(
    messages: Sequence[Mapping],
    tokenizer: Tokenizer,
    reader: MediaReader,
    mode: str = "plain",
    tools: Sequence[Mapping] = (),
    keep_thinking: bool = True,
) -> Prompt:
    """A conversation, ready for the assistant's turn; mode and tools as in `text.chat.render`."""
    rendered = render(messages, tokenizer, reader.load, True, mode, tools, keep_thinking)
    pad = tokenizer.special["<|media_pad|>"]
    if pad != reader.config.media_pad_id:
        raise PromptError(
            f"the tokenizer's <|media_pad|> is {pad}, the model's {reader.config.media_pad_id}: use the model's "
            "tokenizer"
        )
    return from_ids(rendered.tokens, rendered.clips, reader.config)


def from_ids(tokens: Sequence[int], clips: Sequence[Clip], config: K25Config) -> Prompt:
    """Token ids in which one media_pad stands for each clip; it is repeated once per vision token."""
    if bad := [token for token in tokens if not 0 <= token < 2**31]:
        raise PromptError(f"{bad[:5]} are not token ids")
    pads = sum(token == config.media_pad_id for token in tokens)
    if pads != len(clips):
        raise PromptError(
            f"the prompt has {pads} media_pad tokens (id {config.media_pad_id}) for {len(clips)} images or video "
            "chunks: write it once for each"
        )
    expanded = expand_media(tokens, [clip.tokens for clip in clips], config.media_pad_id)
    return Prompt(expanded.tolist(), list(clips))
