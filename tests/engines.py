"""A minute engine under pressure, and what the plain forward pass says about its answers."""

import functools

import jax
import numpy as np

import reference
from k25_jax.config import K25Config, MoEConfig, TextConfig, VisionConfig
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import forward
from k25_jax.sampling.requests import Completion, EngineConfig, FinishEvent
from k25_jax.vision.patchpack import Clip, pack_clips

TEXT = TextConfig(
    vocab_size=59, d_model=24, layers=2, ffn_dim=20, heads=2, q_lora_rank=8, kv_lora_rank=10, qk_nope_dim=6,
    qk_rope_dim=4, v_dim=5, max_length=48, moe=MoEConfig(experts=4, top_k=2, ffn_dim=12, scale=2.0),
)  # fmt: skip
VISION = VisionConfig(layers=1, width=16, heads=2, mlp_dim=12, patch_size=4, pos_height=4, pos_width=4)
PAD = 50
CONFIG = K25Config(text=TEXT, vision=VISION, media_pad_id=PAD, media_begin_id=51, media_end_id=52, eos_ids=(53,))
PARAMS = reference.random_params(CONFIG, seed=1, std=0.25)
SETTINGS = EngineConfig(
    rows=(5,), pieces=(3,), piece=5, pages=12, page_size=4, queue=64, vision_patches=(32,), vision_tokens=10,
    alternatives=3,
)  # fmt: skip
ROWS, PATCHES = 12, 256


def clip(seed: int, rows: int = 4, columns: int = 4) -> Clip:
    return reference.draw_clip(np.random.default_rng([seed, 9]), CONFIG, 1, rows, columns)


def prompts() -> list[tuple[list[int], list[Clip]]]:
    """Some begin alike, some show images, the same ones or others at the same places; 12 of 3 to 30 tokens."""
    rng = np.random.default_rng(5)
    words = lambda count: reference.draw_words(rng, CONFIG, count)  # noqa: E731
    base, one, two, three = words(21), clip(1), clip(2), clip(3)
    shown = [*words(2), *[PAD] * 4, *words(5)]
    return [
        (words(3), []), (words(9), []), (words(30), []),
        (base, []), (base[:16] + words(3), []), (base[:13], []), (base + words(8), []),
        (shown, [one]), (shown, [two]), (shown + words(7), [three]),
        ([*words(1), *[PAD] * 8, *words(4)], [two, one]), ([PAD] * 4 + words(4), [three]),
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _logprobs(params, batch, config):
    return jax.nn.log_softmax(forward(params, batch, config))


def logprobs(rows: list[tuple[list[int], list[Clip]]], params=PARAMS) -> list[np.ndarray]:
    """Log-probabilities behind every token of each row, by the plain forward pass over whole rows: [its tokens, V]."""
    out = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        part += [([1], [])] * (ROWS - len(part))
        pack, starts = pack_clips([c for _, own in part for c in own], 1, PATCHES, patch_dim=VISION.patch_dim)
        tokens_BL, media_BL = (np.full((ROWS, TEXT.max_length), blank, np.int32) for blank in (0, -1))
        first = iter(starts)
        for row, (tokens, clips) in enumerate(part):
            tokens_BL[row, : len(tokens)] = tokens
            features = [next(first) + np.arange(one.tokens) for one in clips]
            places = np.flatnonzero(tokens_BL[row] == PAD)[
                : sum(map(len, features))
            ]  # others were drawn, and show nothing
            media_BL[row, places] = np.concatenate([*features, []])
        lengths_B = np.array([len(tokens) for tokens, _ in part])
        positions_BL = np.broadcast_to(np.arange(TEXT.max_length, dtype=np.int32), tokens_BL.shape)
        segments_BL = (positions_BL < lengths_B[:, None]).astype(np.int32)
        batch = Batch(tokens_BL, tokens_BL, segments_BL, segments_BL, positions_BL, media_BL, pack)
        found = np.asarray(_logprobs(params, batch, CONFIG))
        out += [row[:length] for row, length in zip(found, lengths_B, strict=True)]
    return out[: len(rows)]


def greedy(rows: list[tuple[list[int], list[Clip]]], count: int, params=PARAMS) -> list[list[int]]:
    """`count` likeliest tokens for each row, one after the other, by the plain forward pass over everything each time."""
    out = [[] for _ in rows]
    for _ in range(count):
        grown = [(tokens + new, clips) for (tokens, clips), new in zip(rows, out, strict=True)]
        for new, row in zip(out, logprobs(grown, params), strict=True):
            new.append(int(row[-1].argmax()))
    return out


def drain(engine, answers: dict, events=None) -> None:
    """One step's events, or those given, into answers[request, sample]."""
    for event in engine.step() if events is None else events:
        answer = answers.setdefault((event.request, event.sample), Completion())
        assert not answer.reason, "an event behind the end"
        answer.add(event)
        assert isinstance(event, FinishEvent) == bool(answer.reason)
