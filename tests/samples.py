"""Samples drawn at random: a prompt with pictures or without, then turns of the model and of its tools by turns."""

import numpy as np

from k25_jax.config import K25Config
from k25_jax.data.packing import Example, make_sample
from k25_jax.vision.patchpack import Clip

WORDS = 60  # token ids from 2 to this one


def draw_sample(rng, model: K25Config, name: str, pictures: int = 1, longest: int = 8) -> Example:
    """Two turns of the model with an observation between; log-probabilities around those of guessing, any advantage."""
    clips = []
    for _ in range(pictures):
        rows, columns = 2 * rng.integers(1, 3, 2)
        patches = rng.integers(0, 256, (rows * columns, model.vision.patch_dim)).astype(np.uint8)
        clips.append(Clip(patches, (1, int(rows), int(columns))))
    tokens = [1, *[model.media_pad_id] * sum(clip.tokens for clip in clips)]
    sampled = [False] * len(tokens)
    for said in (False, True, False, True):
        words = rng.integers(2, WORDS, rng.integers(2, longest)).tolist()
        tokens += words
        sampled += [said] * len(words)
    logprobs = rng.normal(-np.log(model.text.vocab_size), 1.5, len(tokens))
    return make_sample(tokens, sampled, logprobs, rng.choice([-0.6, -0.2, 0.0, 0.4]), clips, model.media_pad_id, name)


def draw_samples(rng, model: K25Config, count: int, **how) -> list[Example]:
    """So many, every second with a picture."""
    return [draw_sample(rng, model, f"group-{i}", pictures=i % 2, **how) for i in range(count)]
