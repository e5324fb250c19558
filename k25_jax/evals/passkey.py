"""Passkey retrieval: how often a model gives back what was said once in a long text (K2.5 §3.3, §4)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.models.k25 import forward
from k25_jax.text.chat import render
from k25_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Found:
    """One question: where the passkey stood (0 the beginning, 1 the end), and whether all of it came back."""

    depth: float
    right: bool


def retrieval(
    params, config: K25Config, tokenizer: Tokenizer, task, indices: Sequence[int], batch: int = 10
) -> list[Found]:
    """The task `passkey` (data/tasks) at `indices`, answered greedily.

    The answer is read off one pass over question and gold answer: greedy decoding gives it if and only if each of its
    tokens, and the end of the turn, is the likeliest after those before.
    """
    answered = functools.partial(_likeliest, config=config)
    data = DataConfig(batch_size=batch, seq_len=task.length, packs=0)
    found = []
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        rendered = [render(task.record(i)["messages"], tokenizer) for i in part]
        examples = [make_example(r.tokens, r.weights, [], config.media_pad_id) for r in rendered]
        rows = pack_examples(examples, data, config)
        asked_BL = rows.loss_weights_BL > 0
        right_B = (~asked_BL | (np.asarray(answered(params, rows)) == rows.targets_BL)).all(axis=1)
        found += [Found(task.depth(i), bool(right)) for i, right in zip(part, right_B, strict=False)]
    return found


@functools.partial(jax.jit, static_argnames="config")
def _likeliest(params, rows, config: K25Config):
    return forward(params, rows, config).argmax(axis=-1)


def by_depth(found: Sequence[Found], bins: int) -> list[float]:
    """The share that came back, by equal parts of the depth; nan where nothing was asked."""
    out = []
    for b in range(bins):
        here = [f.right for f in found if min(int(f.depth * bins), bins - 1) == b]
        out.append(float(np.mean(here)) if here else float("nan"))
    return out
