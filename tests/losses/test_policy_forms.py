"""The policy losses against sums over tokens that are written by hand in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.config import ConfigError, RLConfig
from k25_jax.losses.lm import vocabulary_scores
from k25_jax.losses.policy import LARGE, mismatch_weights, policy_loss, token_weights, totals

LOW, HIGH, TAU = math.log(0.5), math.log(5.0), 1e-3
K25, NO_TAU = RLConfig(), RLConfig(tau=0.0)
SHAPE = (4, 30)


class Drawn:
    """Rows of tokens of which some were sampled, with log-ratios on both sides of both bounds, none near one."""

    def __init__(self, seed: int = 0, shape=SHAPE):
        rng = np.random.default_rng(seed)
        log_ratios = rng.choice([rng.uniform(-2, LOW - 0.05), *rng.uniform(LOW + 0.05, HIGH - 0.05, 3), 2.5], shape)
        self.old = (-rng.exponential(2, shape)).astype(np.float32)
        self.logprobs = (self.old + log_ratios).astype(np.float32)
        self.advantages = rng.choice([-0.75, -0.25, 0, 0.25, 0.75], shape).astype(np.float32)
        self.sampled = rng.random(shape) < 0.6
        self.segments = np.sort(rng.integers(0, 4, shape), axis=1)[:, ::-1].copy()

    @property
    def given(self):
        """What `policy_loss` takes."""
        return self.logprobs, self.old, self.advantages, token_weights(self.sampled, self.segments, "k25")

    def by_hand(self, tau: float = TAU):
        """(loss, gradient) of K2.5's form, token by token."""
        logprobs, old, advantages = (a.astype(np.float64) for a in (self.logprobs, self.old, self.advantages))
        loss, gradient, tokens = 0.0, np.zeros(logprobs.shape), self.sampled.sum()
        for at in zip(*np.nonzero(self.sampled), strict=True):
            log_ratio = logprobs[at] - old[at]
            inside = LOW < log_ratio < HIGH
            policy = math.exp(log_ratio) * advantages[at] if inside else 0.0
            loss += (tau * log_ratio**2 - policy) / tokens
            gradient[at] = (2 * tau * log_ratio - policy) / tokens
        return loss, gradient


LOSS = jax.jit(policy_loss, static_argnums=4)
LOSS_AND_GRADIENT = jax.jit(jax.value_and_grad(policy_loss, has_aux=True), static_argnums=4)


def loss_of(*given, config: RLConfig = K25, **how):
    return LOSS(*given, config, **how)


def gradient_of(*given, config: RLConfig = K25):
    return np.asarray(LOSS_AND_GRADIENT(*given, config)[1])


# ------------------------------------------------------------------------------------------------------------- K2.5's form
def test_loss_and_gradient_are_the_masked_sum_by_hand():
    for seed in range(3):
        drawn = Drawn(seed)
        loss, gradient = drawn.by_hand()
        got = gradient_of(*drawn.given)
        np.testing.assert_allclose(loss_of(*drawn.given)[0], loss, atol=1e-6 * np.abs(gradient).sum())
        np.testing.assert_allclose(got, gradient, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())
        assert not got[~drawn.sampled].any()


@pytest.mark.parametrize("chunk", [50, 7])
def test_the_gradient_of_hidden_states_and_head_is_the_sum_by_hand(chunk):
    """Through the vocabulary, a chunk at a time: d log p / d scores is the target less the probabilities."""
    drawn, rng = Drawn(5), np.random.default_rng(5)
    x, head = (rng.normal(size=shape).astype(np.float32) / 2 for shape in ((*SHAPE, 6), (6, 19)))
    targets = rng.integers(0, 19, SHAPE)
    scores = x.astype(np.float64) @ head.astype(np.float64)
    probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    at_target = np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0]
    log_ratios = drawn.logprobs - drawn.old
    drawn.logprobs, drawn.old = np.log(at_target), np.log(at_target) - log_ratios
    dscores = (np.eye(19)[targets] - probabilities) * drawn.by_hand()[1][..., None]

    @jax.jit
    def gradients(x, head, old):
        def loss(x, head):
            normaliser, target, _ = vocabulary_scores(x, head, jnp.asarray(targets), chunk)
            return policy_loss(target - normaliser, old, *drawn.given[2:], K25)[0]

        return jax.grad(loss, argnums=(0, 1))(x, head)

    dx, dhead = gradients(x, head, drawn.old.astype(np.float32))
    for got, want in ((dx, dscores @ head.T), (dhead, np.einsum("bld,blv->dv", x, dscores))):
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_the_gradient_is_that_of_finite_differences():
    """In double precision, token by token: the mask is a constant, so that steps inside of the bounds see all of it."""
    drawn, step = Drawn(1), 1e-6
    with jax.enable_x64(True):
        logprobs, *rest = (jnp.asarray(a, jnp.float64) for a in drawn.given)
        loss = jax.jit(lambda a: policy_loss(a, *rest, K25)[0])
        gradient, differences = gradient_of(logprobs, *rest), np.zeros(SHAPE)
        assert gradient.dtype == np.float64
        for at in np.ndindex(SHAPE):
            up, down = (float(loss(logprobs.at[at].add(move))) for move in (step, -step))
            differences[at] = (up - down) / (2 * step)
    assert np.abs(gradient - differences).max() <= 1e-4 * np.abs(gradient).max()


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_outside_of_the_bounds_a_token_has_the_gradient_of_tau_alone(advantage):
    log_ratios = np.array([[-3.0, LOW - 1e-3, LOW + 1e-3, 0.5, HIGH - 1e-3, HIGH + 1e-3, 4.0]], np.float32)
    old, ones = np.full_like(log_ratios, -5.0), np.ones_like(log_ratios)
    got = gradient_of(old + log_ratios, old, advantage * ones, ones, config=NO_TAU)[0]
    inside = np.array([0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(got, -inside * np.exp(log_ratios[0]) * advantage / 7, rtol=1e-5)
    drawn_back = gradient_of(old + log_ratios, old, 0 * ones, ones)[0]
    np.testing.assert_allclose(drawn_back, 2 * TAU * log_ratios[0] / 7, rtol=1e-5)


def test_flipping_all_advantages_flips_the_policy_gradient_exactly():
    drawn = Drawn(2)
    logprobs, old, advantages, weights = drawn.given
    one, other = (gradient_of(logprobs, old, sign * advantages, weights, config=NO_TAU) for sign in (1, -1))
    np.testing.assert_array_equal(one, -other)
    outside = drawn.sampled & ((logprobs - old < LOW) | (logprobs - old > HIGH)) & (advantages != 0)
    assert outside.any() and not one[outside].any() and one[drawn.sampled & ~outside].any()


@pytest.mark.parametrize("form", ["k25", "grpo", "ppo"])
def test_what_was_not_sampled_changes_no_bit(form):
    drawn, config = Drawn(3), RLConfig(loss=form)
    weights = token_weights(drawn.sampled, drawn.segments, form)
    logprobs, old, advantages, _ = drawn.given

    def bits(a, b, c):
        given = [np.where(drawn.sampled, x, np.float32(y)) for x, y in ((logprobs, a), (old, b), (advantages, c))]
        (loss, metrics), gradient = LOSS_AND_GRADIENT(*given, weights, config, None, given[0])
        return [np.asarray(x).tobytes() for x in (loss, gradient, *metrics.values())]

    want, odd = bits(0, 0, 0), (np.nan, np.inf, -np.inf, 1e38)
    assert all(bits(a, b, c) == want for a in odd for b in odd for c in (np.nan, np.inf))


def test_log_ratios_of_hundreds_have_finite_gradients():
    log_ratios = np.array([[-500.0, 0.1, 500.0]], np.float32)
    ones = np.ones_like(log_ratios)
    for form in ("k25", "grpo", "ppo"):
        for advantage in (-1, 0, 1):
            config = RLConfig(loss=form)
            assert np.isfinite(gradient_of(log_ratios, 0 * ones, advantage * ones, ones, config=config)[0, :2]).all()
    assert np.isfinite(gradient_of(log_ratios, 0 * ones, ones, ones)).all()


def test_shares_of_rows_add_up_and_the_largest_stays():
    """Rows of unlike many sampled tokens, the last of none."""
    drawn = Drawn(4)
    drawn.sampled &= np.arange(SHAPE[1]) < np.array([30, 12, 3, 0])[:, None]
    given = drawn.given
    loss, seen = loss_of(*given, entropy_BL=drawn.old)
    whole = totals(given[-1])
    parts = [
        loss_of(*(a[i : i + 1] for a in given), whole=whole, entropy_BL=drawn.old[i : i + 1]) for i in range(SHAPE[0])
    ]
    np.testing.assert_allclose(sum(part for part, _ in parts), loss, rtol=1e-6)
    for name, value in seen.items():
        together = max if name.endswith("_max") else sum
        np.testing.assert_allclose(together(part[name] for _, part in parts), value, rtol=1e-6, err_msg=name)


def test_metrics_by_hand():
    drawn = Drawn(6)
    log_ratio = (drawn.logprobs.astype(np.float64) - drawn.old)[drawn.sampled]
    log_ratio[:2] = 0.5 * LARGE, 2 * LARGE
    drawn.logprobs[drawn.sampled] = drawn.old[drawn.sampled] + log_ratio
    loss, seen = loss_of(*drawn.given, entropy_BL=-drawn.old)
    want = {
        "loss": loss,
        "mismatch": np.abs(log_ratio).mean(),
        "mismatch_large": (np.abs(log_ratio) > LARGE).mean(),
        "mismatch_max": np.abs(log_ratio).max(),
        "ratio": np.exp(log_ratio).mean(),
        "ratio_max": np.exp(log_ratio).max(),
        "clipped_low": (log_ratio < LOW).mean(),
        "clipped_high": (log_ratio > HIGH).mean(),
        "sampled_tokens": len(log_ratio),
        "entropy": -drawn.old[drawn.sampled].mean(),
    }
    assert (
        seen.keys() == want.keys() and 0 < want["mismatch_large"] < 1 and want["clipped_low"] and want["clipped_high"]
    )
    for name, value in want.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-5, err_msg=name)


def test_a_batch_without_a_sampled_token_has_loss_and_gradient_zero():
    drawn = Drawn()
    drawn.sampled[:] = False
    assert loss_of(*drawn.given)[0] == 0 and not gradient_of(*drawn.given).any()


# --------------------------------------------------------------------------------------------------- forms to compare with
@pytest.mark.parametrize("form", ["grpo", "ppo"])
def test_the_other_forms_by_hand(form):
    """The smaller of two products; GRPO takes the mean of each answer, a segment of a row, before that of the answers."""
    drawn = Drawn(7)
    logprobs, old, advantages = (a.astype(np.float64) for a in (drawn.logprobs, drawn.old, drawn.advantages))
    ratio = np.exp(logprobs - old)
    held = np.clip(ratio, 0.5, 5.0)
    policy = np.minimum(ratio * advantages, held * advantages)
    moved = np.where((ratio == held) | (ratio * advantages < held * advantages), ratio * advantages, 0.0)
    weights = np.zeros(SHAPE)
    for row in range(SHAPE[0]):
        for answer in range(4):
            own = drawn.sampled[row] & (drawn.segments[row] == answer)
            weights[row, own] = 1 / own.sum() if form == "grpo" else 1.0
    weights /= weights.sum()
    loss = ((TAU * (logprobs - old) ** 2 - policy) * weights).sum()
    gradient = (2 * TAU * (logprobs - old) - moved) * weights
    given = (*drawn.given[:3], token_weights(drawn.sampled, drawn.segments, form))
    np.testing.assert_allclose(loss_of(*given, config=RLConfig(loss=form))[0], loss, rtol=1e-5)
    got = gradient_of(*given, config=RLConfig(loss=form))
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())
    assert (np.abs(got - gradient_of(*drawn.given)) > 1e-3 * np.abs(got).max()).any()


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(loss="k2.5"), "RLConfig.loss='k2.5'; did you mean 'k25'"),
        (dict(clip_low=1.5), "rl.clip_low=1.5 and rl.clip_high=5.0 are ratios"),
        (dict(clip_high=0.9), "0 < clip_low < 1 < clip_high"),
        (dict(tau=-1.0), "rl.tau=-1.0 must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        RLConfig(**fields)


# ---------------------------------------------------------------------------------------------------- sampler and learner
@pytest.mark.parametrize("how", ["none", "truncate", "mask"])
def test_the_factor_for_a_sampler_that_computes_otherwise(how):
    ratio = np.array([[0.1, 0.9, 1.0, 4.0, 6.0, 1e30, 1.0]], np.float32)
    engine = np.array([[-3, -2, -1, -2, -3, -4, np.nan]], np.float32)
    trainer, sampled = np.where(np.isnan(engine), np.inf, engine + np.log(ratio)), ~np.isnan(engine)
    weights, metrics = jax.jit(mismatch_weights, static_argnums=3)(trainer, engine, sampled, how)
    want = {"none": np.ones(6), "truncate": [0.1, 0.9, 1, 4, 5, 5], "mask": [0, 0.9, 1, 4, 0, 0]}[how]
    np.testing.assert_allclose(weights[0, :6], want, rtol=1e-5)
    assert np.isfinite(weights).all()
    gaps = np.abs(np.log(ratio[0, :6].astype(np.float64)))
    for name, value in {"": gaps.mean(), "_large": 5 / 6, "_max": gaps.max()}.items():
        np.testing.assert_allclose(metrics[f"engine_mismatch{name}"], value, rtol=1e-5)
    assert metrics["engine_corrected"] == pytest.approx(3 / 6)
