"""Generation: prefill a prompt with its images, then decode token by token from the latent cache (K2.5 §4).

This is the plain form, one static batch from beginning to end, and the first to read. Many requests at once, of any lengths,
are for sampling/engine.py, whose benchmark runs against it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from k25_jax.config import K25Config
from k25_jax.models import decoder
from k25_jax.models.k25 import cast, embed, splice, vision_features
from k25_jax.sampling.latent_cache import grow
from k25_jax.vision.patchpack import Clip, pack_clips

SEEDS = (-(2**63), 2**63 - 1)  # the least and the greatest


def fold_seed(seed: int) -> int:
    """A seed of 64 bits as the 32 that keys are made of: those below 2**32 as they are, others mixed."""
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "big", signed=True), digest_size=4).digest(), "big")


class PromptError(ValueError):
    """A prompt that the model cannot take; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How to sample. Temperature 0 is greedy; `top_p` keeps the smallest set of tokens with that much probability."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be at least 1, temperature={self.temperature} at least 0, "
                f"top_p={self.top_p} in (0, 1]"
            )


def sample_token(key, logits_BV, temperature: float, top_p: float):
    """Draw a token a row: (tokens_B, logprobs_B). The log-probability is that of the unmodified distribution."""
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
    if temperature == 0:
        tokens_B = logits_BV.argmax(axis=-1)
    else:
        tokens_B = jax.random.categorical(key, keep_top_p(logits_BV / temperature, top_p))
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def keep_top_p(logits_BV, top_p):
    """-inf outside the smallest set of tokens whose probabilities sum to `top_p`; the likeliest always stays.

    `top_p` is a number or an array [B, 1]. The least probability that stays is found bit by bit: a vocabulary is not
    sorted. Tokens as likely as the last one stay too.
    """
    p_BV = jax.nn.softmax(logits_BV.astype(jnp.float32))
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)  # in the order of the numbers, none of which is negative

    def with_bit(i, least_B1):
        tried_B1 = least_B1 | (1 << 29) >> i
        mass_B1 = jnp.where(bits_BV >= tried_B1, p_BV, 0).sum(axis=-1, keepdims=True)
        return jnp.where(mass_B1 >= top_p, tried_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 30, with_bit, jnp.zeros((len(logits_BV), 1), jnp.int32))
    return jnp.where((bits_BV >= least_B1) | (jnp.asarray(top_p) >= 1), logits_BV, -jnp.inf)


class Sampler:
    """A model ready to generate, a static batch at a time: the simple reference beside `sampling.engine.Engine`.

    Shapes are rounded up to powers of two, so that few programs are compiled.
    """

    def __init__(self, params, config: K25Config, dtype=jnp.float32):
        self.config = config
        self.params = jax.jit(decoder.unstack)(cast(params, dtype))
        self._vision = jax.jit(functools.partial(vision_features, config=config, dtype=dtype))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        clips: Sequence[Sequence[Clip]] = (),
        sampling: SampleConfig | None = None,
    ) -> Iterator[list[tuple[int, float] | None]]:
        """Yield, a step at a time, one (token, logprob) a prompt; None for prompts that have ended.

        `prompts` hold one media_pad per vision token; `clips` are each prompt's images and video chunks in order.
        """
        sampling = sampling or SampleConfig()
        clips = list(clips) or [[] for _ in prompts]
        check_prompts(prompts, clips, sampling.max_tokens, self.config)
        features_MD, starts = self._features(clips)
        tokens_BL, media_BL = lay_out(prompts, clips, starts, self.config.media_pad_id)
        lengths_B = jnp.asarray([len(p) for p in prompts], jnp.int32)
        slots = _round_up(max(map(len, prompts)) + sampling.max_tokens)
        how = dict(config=self.config, temperature=sampling.temperature, top_p=sampling.top_p)
        key = jax.random.key(sampling.seed)
        drawn, state = _prefill(self.params, tokens_BL, media_BL, features_MD, lengths_B, key, slots=slots, **how)
        done = np.zeros(len(prompts), bool)
        for step in range(1, sampling.max_tokens + 1):
            tokens_B, logprobs_B = drawn
            if step < sampling.max_tokens:  # dispatched before this step's tokens are read
                drawn, state = _step(self.params, tokens_B, state, **how)
            tokens_B, logprobs_B = np.asarray(tokens_B), np.asarray(logprobs_B)
            yield [None if d else (int(t), float(p)) for d, t, p in zip(done, tokens_B, logprobs_B, strict=True)]
            done |= np.isin(tokens_B, sampling.stop_ids)
            if done.all():
                return

    def _features(self, clips):
        """Vision features of all clips in one pack, and each clip's first row in them."""
        flat = [clip for row in clips for clip in row]
        if not flat:
            return None, []
        if "vision" not in self.params:
            raise PromptError("this checkpoint is a language model without vision encoder: it takes no images or video")
        slots = _round_up(sum(len(clip.patches) for clip in flat))
        pack, starts = pack_clips(flat, 1, slots, self.config.vision.merge, self.config.vision.patch_dim)
        return self._vision(self.params, pack), list(starts)


@functools.partial(jax.jit, static_argnames=("slots", "config", "temperature", "top_p"))
def _prefill(params, tokens_BL, media_BL, features_MD, lengths_B, key, *, slots, config, temperature, top_p):
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    x_BLD = splice(params, tokens_BL, media_BL, features_MD, config)
    x_BLD, cache = decoder.prefill(params, x_BLD, segments_BL, positions_BL, config.text)
    last_BD = jnp.take_along_axis(x_BLD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    key, draw = jax.random.split(key)
    drawn = sample_token(draw, decoder.logits(params, last_BD), temperature, top_p)
    return drawn, (grow(cache, slots), lengths_B, key)


@functools.partial(jax.jit, static_argnames=("config", "temperature", "top_p"), donate_argnames=("state",))
def _step(params, tokens_B, state, *, config, temperature, top_p):
    cache, positions_B, key = state
    x_B1D = embed(params, tokens_B, config)[:, None]
    x_B1D, cache = decoder.decode_step(params, x_B1D, cache, positions_B, config.text)
    key, draw = jax.random.split(key)
    drawn = sample_token(draw, decoder.logits(params, x_B1D[:, 0]), temperature, top_p)
    return drawn, (cache, positions_B + 1, key)


def lay_out(prompts, clips, starts, media_pad_id: int):
    """Prompts as rows padded to a common width, and for each media_pad the index of its vision feature."""
    width = _round_up(max(map(len, prompts)))
    tokens_BL = np.zeros((len(prompts), width), np.int32)
    media_BL = np.full((len(prompts), width), -1, np.int32)
    starts = iter(starts)
    for row, (prompt, row_clips) in enumerate(zip(prompts, clips, strict=True)):
        tokens_BL[row, : len(prompt)] = prompt
        places = np.flatnonzero(tokens_BL[row, : len(prompt)] == media_pad_id)
        features = [np.arange(clip.tokens) + next(starts) for clip in row_clips]
        if features:
            media_BL[row, places] = np.concatenate(features)
    return tokens_BL, media_BL


def check_prompts(prompts, clips, max_tokens: int, config: K25Config) -> None:
    """Raise PromptError for what cannot be generated from."""
    if not prompts or len(prompts) != len(clips):
        raise PromptError(f"{len(prompts)} prompts and {len(clips)} lists of clips: give one list a prompt")
    for i, (prompt, row_clips) in enumerate(zip(prompts, clips, strict=True)):
        if not len(prompt):
            raise PromptError(f"prompt {i} is empty")
        bad = [t for t in prompt if not 0 <= t < config.text.vocab_size and t != config.media_pad_id]
        if bad:
            raise PromptError(f"prompt {i}: token ids {bad[:5]} are not below vocab_size={config.text.vocab_size}")
        pads, needed = sum(t == config.media_pad_id for t in prompt), sum(clip.tokens for clip in row_clips)
        if pads != needed:
            raise PromptError(
                f"prompt {i} has {pads} media_pad tokens (id {config.media_pad_id}) but its images take {needed}"
            )
        if len(prompt) + max_tokens > config.text.max_length:
            raise PromptError(
                f"prompt {i}: {len(prompt)} tokens and max_tokens={max_tokens} exceed the context of "
                f"{config.text.max_length}; shorten the prompt, use smaller images or lower max_tokens"
            )


def _round_up(n: int, minimum: int = 64) -> int:
    return max(minimum, 1 << (int(n) - 1).bit_length())
