"""The loss of the stage rl over packed samples with pictures: against PyTorch, the sampler, and itself packed otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.utils import logging

import reference
from drawn import MINUTE, random_params
from k25_jax.config import ConfigError, DataConfig, Experiment, RLConfig, TrainConfig
from k25_jax.data.packing import (
    PackingError,
    batch_stats,
    make_example,
    make_sample,
    pack_examples,
    pack_samples,
    truncate,
)
from k25_jax.losses.policy import mismatch_weights
from k25_jax.models.k25 import forward
from k25_jax.sampling.sample import SampleConfig, Sampler
from k25_jax.train.rl import logprobs, loss_fn
from k25_jax.train.stages import loss_of
from samples import draw_sample, draw_samples

DATA = DataConfig(batch_size=4, seq_len=64, packs=2, pack_patches=64)
PAD = MINUTE.media_pad_id
PARAMS = random_params(MINUTE)
GRAD = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)


def run_of(parts: int = 1, form: str = "k25", data: DataConfig = DATA, **fields) -> Experiment:
    train = TrainConfig(accumulate=parts)
    return Experiment(model=MINUTE, data=data, stage="rl", train=train, rl=RLConfig(loss=form, **fields))


def gradients(batch, experiment: Experiment | None = None):
    """(loss, metrics, gradients)"""
    (loss, (metrics, _)), grads = GRAD(PARAMS, batch, experiment or run_of())
    return jax.device_get((loss, metrics, grads))


def assert_close(got, want, bound: float = 1e-5):
    """Each tensor, to its largest entry; loss and metrics, sums that may cancel, to themselves or a hundredth."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-12 if np.ndim(b) else 1e-2)
        assert error <= bound, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def samples():
    return draw_samples(np.random.default_rng(0), MINUTE, 8)


@pytest.fixture(scope="module")
def batch(samples):
    return pack_samples(samples, DATA, MINUTE)


# -------------------------------------------------------------------------------------------------------------- PyTorch
@pytest.mark.parametrize("advantages", ["mixed", "negative"])
def test_every_gradient_is_that_of_pytorch(tmp_path, advantages):
    """Three pictures; log-ratios on both sides of both bounds, none so near that rounding decides."""
    logging.set_verbosity_error()
    model = reference.torch_model(reference.draw_config(52), 52)
    config, params = reference.ours(model, tmp_path / "weights")
    rng = np.random.default_rng(52)
    tokens, clips = reference.draw_prompt(rng, config, 60, 3)
    batch = reference.one_row_batch(tokens, clips, config)
    inputs = reference.torch_inputs(tokens, clips, config)
    logprobs_L = torch.log_softmax(model(**inputs).logits[0], dim=-1)
    logprobs_L = logprobs_L.gather(1, torch.from_numpy(batch.targets_BL[0]).long()[:, None])[:, 0]
    sampled = (batch.loss_weights_BL[0] > 0) & (rng.random(len(tokens)) < 0.7)
    drift = rng.choice([-1.5, -0.9, -0.5, 0.0, 0.3, 1.2, 1.9], len(tokens))
    old = np.where(sampled, logprobs_L.detach().numpy() - drift, np.nan).astype(np.float32)
    worth = rng.choice([-0.6, 0.4] if advantages == "mixed" else [-0.6, -0.1], len(tokens)).astype(np.float32)

    ratio_L = torch.exp(logprobs_L[sampled] - torch.from_numpy(old)[sampled])
    inside = ((ratio_L > 0.5) & (ratio_L < 5.0)).detach()
    expected = -(inside * ratio_L * torch.from_numpy(worth)[sampled]).sum() + 0.01 * (torch.log(ratio_L) ** 2).sum()
    expected = expected / int(sampled.sum())
    theirs = reference.gradients_of(model, expected, tmp_path / "gradients")

    batch = batch.replace(loss_weights_BL=sampled[None].astype(np.float32), old_logprobs_BL=old[None])
    batch = batch.replace(advantages_BL=np.where(sampled, worth, np.nan)[None].astype(np.float32))
    experiment = Experiment(model=config, stage="rl", train=TrainConfig(remat="full"), rl=RLConfig(tau=0.01))
    (loss, (metrics, _)), ours = GRAD(params, batch, experiment)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    assert metrics["clipped_low"] > 0.1 and metrics["clipped_high"] > 0.05
    reference.assert_same_gradients(ours, theirs, 1e-3)


# ---------------------------------------------------------------------------------------------------- what samplers recorded
def test_the_weights_that_sampled_have_a_ratio_of_one_at_every_token():
    """A prompt with a picture and one without, as the plain sampler answers them, to the last token of both."""
    rng = np.random.default_rng(1)
    asked = [draw_sample(rng, MINUTE, name, pictures) for name, pictures in (("seen", 2), ("read", 0))]
    prompts = [one.tokens[: np.flatnonzero(one.loss_weights)[0]].tolist() for one in asked]
    answers = [[], []]
    sampler = Sampler(PARAMS, MINUTE)
    for drawn in sampler.generate(prompts, [one.clips for one in asked], SampleConfig(12, top_p=1.0)):
        for answer, pair in zip(answers, drawn, strict=True):
            answer.append(pair)
    found = []
    for one, prompt, answer in zip(asked, prompts, answers, strict=True):
        tokens, logs = zip(*answer, strict=True)
        sampled = [False] * len(prompt) + [True] * len(tokens)
        given = [*prompt, *tokens], sampled, [*[np.nan] * len(prompt), *logs], 0.5
        found.append(make_sample(*given, one.clips, PAD, one.name))
    _, metrics, grads = gradients(pack_samples(found, DATA, MINUTE))
    assert metrics["sampled_tokens"] == 24 and metrics["mismatch"] <= 1e-5 and metrics["mismatch_large"] == 0
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4) and metrics["loss"] == pytest.approx(-0.5, abs=1e-4)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["vision"]))


def test_log_probabilities_by_the_trained_form_replace_those_of_the_sampler(batch):
    """In parts too; from then on the ratio is one, and advantages have the factor of the sampler's mismatch."""
    scores_BLV = jax.jit(forward, static_argnums=2)(PARAMS, batch, MINUTE)
    at_BL = np.take_along_axis(np.asarray(jax.nn.log_softmax(scores_BLV)), batch.targets_BL[..., None] % 64, -1)[..., 0]
    sampled_BL = batch.loss_weights_BL > 0
    old_BL = jax.jit(logprobs, static_argnums=2)(PARAMS, batch, run_of())
    for found_BL in (old_BL, jax.jit(logprobs, static_argnums=2)(PARAMS, batch, run_of(2))):
        np.testing.assert_allclose(found_BL[sampled_BL], at_BL[sampled_BL], atol=1e-5)
    weights_BL, seen = mismatch_weights(old_BL, batch.old_logprobs_BL, sampled_BL, "mask")
    assert 0 < seen["engine_corrected"] < 1 and seen["engine_mismatch"] > 0.1
    advantages_BL = batch.advantages_BL * weights_BL
    loss, metrics, _ = gradients(batch.replace(old_logprobs_BL=old_BL, advantages_BL=advantages_BL))
    assert metrics["mismatch_max"] <= 1e-5
    assert loss == pytest.approx(-np.asarray(advantages_BL)[sampled_BL].mean(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- invariance
@pytest.mark.parametrize("form", ["k25", *(pytest.param(form, marks=pytest.mark.slow) for form in ("grpo", "ppo"))])
def test_parts_rows_and_order_change_nothing(samples, batch, form):
    """Four rows of 64 places, in two parts; eight of 48 in another order, in four."""
    want = gradients(batch, run_of(form=form))
    assert want[1]["clipped_low"] > 0.05 and want[1]["clipped_high"] > 0.05 and want[1]["entropy"] > 1
    assert_close(gradients(batch, run_of(2, form)), want)
    wide = dataclasses.replace(DATA, batch_size=8, seq_len=48, packs=4, pack_patches=32)
    other = pack_examples(samples[::-1], wide, MINUTE)
    assert other.tokens_BL.shape != batch.tokens_BL.shape
    assert_close(gradients(other, run_of(4, form, wide)), want)


def test_what_was_not_sampled_changes_no_bit(batch):
    unsampled_BL, want = batch.loss_weights_BL == 0, gradients(batch)
    assert np.isnan(batch.old_logprobs_BL[unsampled_BL]).all() and np.isfinite(want[0])
    for value in (0.0, np.inf, -np.inf):
        odd = {
            name: np.where(unsampled_BL, np.float32(value), getattr(batch, name))
            for name in ("old_logprobs_BL", "advantages_BL")
        }
        for a, b in zip(jax.tree.leaves(gradients(batch.replace(**odd))), jax.tree.leaves(want), strict=True):
            assert a.tobytes() == b.tobytes()


def test_flipping_all_advantages_flips_every_gradient_exactly(batch):
    _, metrics, one = gradients(batch, run_of(tau=0.0))
    _, _, other = gradients(batch.replace(advantages_BL=-batch.advantages_BL), run_of(tau=0.0))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, -b)
    assert metrics["clipped_low"] + metrics["clipped_high"] < 1 and np.abs(one["head"]).max() > 0


def test_finite_differences(batch):
    """Along the gradient of each part of the model, by four points; every expert is chosen, so that no choice jumps."""
    moe = dataclasses.replace(MINUTE.text.moe, top_k=MINUTE.text.moe.experts)
    model = dataclasses.replace(MINUTE, text=dataclasses.replace(MINUTE.text, moe=moe))
    experiment = dataclasses.replace(run_of(clip_low=1e-9, clip_high=1e9, tau=0.1), model=model)
    (_, _), grads = GRAD(PARAMS, batch, experiment)

    @jax.jit
    def slope(params, direction, step):
        at = lambda n: loss_fn(jax.tree.map(lambda a, d: a + n * step * d, params, direction), batch, experiment)[0]  # noqa: E731
        near_1, far_1, near_2, far_2 = jax.lax.map(at, jnp.array([-1.0, -2.0, 1.0, 2.0]))
        return (8 * (near_2 - near_1) - (far_2 - far_1)) / (12 * step)

    nowhere = jax.tree.map(np.zeros_like, PARAMS)
    for part in PARAMS:
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads[part])))
        assert norm > 0, part
        unit = jax.tree.map(lambda g: np.asarray(g) / norm, grads[part])  # noqa: B023
        found = slope(PARAMS, nowhere | {part: unit}, 1e-2 / max(norm, 1.0))
        np.testing.assert_allclose(found, norm, rtol=1e-4, err_msg=part)


# ------------------------------------------------------------------------------------------------------------------ packing
def test_a_sample_lies_in_its_row_one_place_before_its_tokens():
    first = make_sample([1, 7, 8, 9], [False, True, False, True], [np.nan, -1, np.nan, -2], 0.5, [], PAD)
    second = make_sample([1, 5], [False, True], [0, -3], -0.5, [], PAD)
    data = DataConfig(batch_size=1, seq_len=7, packs=0, pack_patches=16)
    batch, nan = pack_samples([second, first], data, MINUTE), np.nan
    assert batch.targets_BL[0, :6].tolist() == [7, 8, 9, MINUTE.pad_id, 5, MINUTE.pad_id]
    assert batch.loss_weights_BL.tolist() == [[1, 0, 1, 0, 1, 0, 0]]
    np.testing.assert_array_equal(batch.old_logprobs_BL, np.array([[-1, nan, -2, nan, -3, nan, nan]], np.float32))
    np.testing.assert_array_equal(batch.advantages_BL, np.array([[0.5, 0.5, 0.5, nan, -0.5, nan, nan]], np.float32))
    assert batch_stats(batch)["loss_tokens"] == 3 and batch.old_logprobs_BL.dtype == np.float32


def test_a_media_pad_that_was_sampled_is_a_target_and_no_picture(batch):
    """The last token of a turn; pictures before and after it keep their places, and the model reads it as the sampler did."""
    rng = np.random.default_rng(2)
    sample = draw_sample(rng, MINUTE, "odd", pictures=2)
    at = np.flatnonzero(np.diff(sample.loss_weights) < 0)[0]  # the last token of the first turn
    tokens = np.where(np.arange(len(sample)) == at, PAD, sample.tokens)
    tokens = np.append(tokens, [PAD] * sample.clips[0].tokens)  # what a tool showed
    more = np.full(sample.clips[0].tokens, np.nan)
    clips = [*sample.clips, sample.clips[0]]
    sampled = np.append(sample.loss_weights > 0, [False] * len(more))
    odd = make_sample(tokens, sampled, np.append(sample.old_logprobs, more), 0.4, clips, PAD, "odd")
    packed = pack_samples([odd], DATA, MINUTE)
    assert packed.targets_BL[0, at - 1] == PAD and packed.loss_weights_BL[0, at - 1] == 1
    assert packed.media_BL[0, at] == -1 and (packed.media_BL >= 0).sum() == sum(clip.tokens for clip in clips)
    assert packed.loss_weights_BL.sum() == sample.loss_weights.sum()
    word = packed.replace(tokens_BL=np.where((packed.tokens_BL == PAD) & (packed.media_BL < 0), 0, packed.tokens_BL))
    assert_close(gradients(word), gradients(packed), 0.0)
    images = make_example([1, PAD, 3], [1.0] * 3, clips[:1], PAD)
    assert pack_examples([images], DATA, MINUTE).loss_weights_BL.sum() == 1  # in pre-training it never is one


@pytest.mark.parametrize(
    "tokens, sampled, logs, advantage, words",
    [
        ([1, 2], [True, True], [-1, -1], 0.1, "g/3: its first token was sampled, but nothing before predicts it"),
        ([1, 2], [False, True], [-1, np.nan], 0.1, "g/3: a sampled token has no finite log-prob"),
        ([1, 2], [False, True], [-1, -1], np.nan, "g/3: a sampled token has no finite .* or advantage"),
        ([1, PAD, 2], [False, False, True], [-1, -1, -1], 0.1, "g/3: 1 media_pad tokens for 0 vision tokens"),
        ([1, 2], [False], [-1, -1], 0.1, "g/3: 2 tokens, 1 of `sampled`, 2 of `logprobs`"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named(tokens, sampled, logs, advantage, words):
    with pytest.raises(PackingError, match=words):
        make_sample(tokens, sampled, logs, advantage, [], PAD, "g/3")


def test_a_sample_that_does_not_fit_is_named_and_never_cut(samples):
    long = make_sample(np.ones(65), np.arange(65) > 3, np.full(65, -1.0), 0.1, [], PAD, "g/7")
    with pytest.raises(
        PackingError, match=r"g/7 \(65 tokens, 0 patches\) finds no room in 4 rows of 64 tokens.*raise one"
    ):
        pack_samples([*samples, long], DATA, MINUTE)
    with pytest.raises(PackingError, match="g/7: a sample of 65 tokens is not cut; raise data.seq_len"):
        truncate(long, 64, MINUTE)
    with pytest.raises(PackingError, match="group-7 .*finds no room"):
        pack_samples(samples[7:], dataclasses.replace(DATA, packs=0), MINUTE)
    with pytest.raises(PackingError, match="an example has no log-probabilities of sampled tokens; use make_sample"):
        pack_samples([make_example([1, 2], [1.0, 1.0], [], PAD)], DATA, MINUTE)


def test_the_stage_takes_samples_and_says_so_where_there_are_none(batch):
    assert loss_of(run_of()) is loss_fn
    text = make_example([1, 2, 3], [1.0] * 3, [], PAD)
    with pytest.raises(ConfigError, match="stage='rl' needs sampled answers, not data.sources"):
        loss_fn(PARAMS, pack_examples([text], DATA, MINUTE), run_of())
    nothing = pack_samples([], DATA, MINUTE)
    assert np.isnan(nothing.old_logprobs_BL).all() and not nothing.loss_weights_BL.any()
    loss, metrics, grads = gradients(batch.replace(loss_weights_BL=nothing.loss_weights_BL))
    assert loss == 0 and metrics["sampled_tokens"] == 0 and not any(g.any() for g in jax.tree.leaves(grads))
