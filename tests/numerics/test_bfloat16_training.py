"""The tiny model trained in float32 and in bfloat16: the same losses, as far as seeds differ."""

import jax
import numpy as np
import pytest

from k25_jax.config import DataConfig, Experiment, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

STEPS, LAST, SEEDS = 200, 20, 3
DATA = DataConfig(batch_size=4, seq_len=64, packs=1, pack_patches=64)


def batches(seed: int):
    """Endless rows: an image of one of eight brightnesses and its number, then a text that counts on from there."""
    config, rng = preset("tiny"), np.random.default_rng(seed)
    while True:
        examples = []
        for _ in range(4):
            first, stride = rng.integers(0, 8), rng.integers(1, 4)
            pixels = np.clip(32 * first + rng.integers(0, 16, (16, config.vision.patch_dim)), 0, 255).astype(np.uint8)
            counted = (first + stride * np.arange(50)) % 97
            tokens = [config.media_pad_id, 100 + stride, *counted.tolist()]
            examples.append(make_example(tokens, [1.0] * len(tokens), [Clip(pixels, (1, 4, 4))], config.media_pad_id))
        yield pack_examples(examples, DATA, config)


def losses(seed: int, dtype: str) -> np.ndarray:
    train = TrainConfig(steps=STEPS, seed=seed, compute_dtype=dtype)
    optim = OptimConfig(name="muonclip", peak_lr=3e-3, warmup_steps=10)
    experiment = Experiment(model=preset("tiny"), data=DATA, optim=optim, train=train)
    state, step, out = init_state(experiment), make_step(experiment, loss_fn), []
    for _, batch in zip(range(STEPS), batches(seed), strict=False):
        state, metrics = step(state, batch)
        out.append(metrics["loss"])
    return np.asarray(jax.device_get(out))


@pytest.mark.slow
def test_two_hundred_steps_lose_in_bfloat16_what_they_lose_in_float32():
    """The mean of the last twenty losses: dtypes differ by no more than seeds do."""
    runs = {dtype: np.stack([losses(seed, dtype) for seed in range(SEEDS)]) for dtype in ("float32", "bfloat16")}
    assert all(np.isfinite(run).all() for run in runs.values())
    ends = {dtype: run[:, -LAST:].mean(axis=1) for dtype, run in runs.items()}
    print({dtype: end.round(4).tolist() for dtype, end in ends.items()})
    assert max(end.max() for end in ends.values()) < 0.5 * runs["float32"][:, 0].mean()
    spread = np.ptp(ends["float32"])
    assert abs(ends["bfloat16"].mean() - ends["float32"].mean()) <= spread, ends
