"""The learning rate at its corners, and against optax in between."""

import numpy as np
import optax

from k25_jax.config import OptimConfig
from k25_jax.optim.schedules import warmup_stable_decay


def test_warm_up_constant_decay():
    config = OptimConfig(peak_lr=2e-4, end_lr=2e-5, warmup_steps=10, decay_steps=40)
    rate = warmup_stable_decay(config, 100)
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [2e-5, 1e-4, 2e-4], rtol=1e-6)
    np.testing.assert_allclose([rate(step) for step in (10, 35, 60)], 2e-4, rtol=1e-6)
    np.testing.assert_allclose([rate(80), rate(100), rate(500)], [1.1e-4, 2e-5, 2e-5], rtol=1e-5)
    cosine = optax.cosine_decay_schedule(2e-4, 40, alpha=0.1)
    np.testing.assert_allclose([rate(60 + i) for i in range(41)], [cosine(i) for i in range(41)], rtol=1e-5)


def test_without_decay_it_stays():
    rate = warmup_stable_decay(OptimConfig(peak_lr=1e-3, warmup_steps=1, decay_steps=0), 100)
    np.testing.assert_allclose([rate(step) for step in (0, 50, 99)], 1e-3, rtol=1e-6)
