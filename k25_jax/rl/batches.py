"""Groups of traces to the batch that an update learns from, and to the metrics of it (K2.5 §3.5)."""

from collections.abc import Sequence

import numpy as np

from k25_jax.config import DataConfig, K25Config, RLConfig
from k25_jax.data.packing import Batch, make_sample, pack_samples
from k25_jax.rl.advantages import Group, advantages, rewards_of, unequal


def batch_of(
    groups: Sequence[Group], update: int, config: RLConfig, data: DataConfig, model: K25Config
) -> tuple[Batch, int]:
    """(the batch that update `update` learns from, how many groups have unequal rewards in it).

    With fewer of those than rl.min_groups all advantages are 0, by which the step knows that it must move nothing
    (train/step.py). Each trainable segment of a valid trace is a document. Raises PackingError for what finds no room.
    """
    kept = [group for group in groups if group.kept]
    found = [advantages(group, update, config) for group in kept]
    differing = sum(map(unequal, found))
    samples = [
        make_sample(
            segment.tokens,
            segment.sampled,
            segment.logprobs,
            advantage if differing >= config.min_groups else 0.0,
            [trace.clips[key] for key in segment.clips],
            model.media_pad_id,
            f"{trace.id}/{number}",
        )
        for group, values in zip(kept, found, strict=True)
        for trace, advantage in zip(group.valid, values.tolist(), strict=True)
        for number, segment in enumerate(trace.segments)
        if segment.trainable and segment.length
    ]
    return pack_samples(samples, data, model), differing


def metrics_of(groups: Sequence[Group], config: RLConfig) -> dict[str, float]:
    """What a batch's traces were worth, before Toggle: in all, by task and by ability; and how they ended."""
    traces = [trace for group in groups for trace in group.traces]
    valid = [trace for trace in traces if trace.valid]
    rewards = {id(group): rewards_of(group, config) for group in groups}
    out = {
        "cut": _share(trace.ending != "answer" for trace in valid),
        "infrastructure": _share(not trace.valid for trace in traces),
        "dropped_groups": sum(not group.kept for group in groups),
        "length_max": max((trace.length for trace in valid), default=0),
    }
    named = [("", groups)]
    for kind in ("task", "ability"):
        for name in sorted({getattr(group, kind) for group in groups}):
            named.append((f"/{name}", [group for group in groups if getattr(group, kind) == name]))
    for suffix, some in named:
        values = np.concatenate([rewards[id(group)] for group in some]) if some else np.zeros(0)
        if len(values):
            lengths = [trace.length for group in some for trace in group.valid]
            out |= {f"reward{suffix}": float(values.mean()), f"length{suffix}": float(np.mean(lengths))}
            out |= {f"pass_rate{suffix}": float(np.mean(values >= config.correct))}
    return out


def _share(of) -> float:
    return float(np.mean(list(of) or [0.0]))
