"""What the bfloat16 path keeps in float32, on inputs where bfloat16 would give something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drawn import MINUTE, random_params
from k25_jax.config import DataConfig, Experiment, RLConfig, TrainConfig
from k25_jax.data.packing import make_example, pack_examples, pack_samples
from k25_jax.kernels.attention import attention
from k25_jax.losses.lm import cross_entropy
from k25_jax.models import decoder
from k25_jax.models.k25 import abstract_params, cast
from k25_jax.models.layers import layer_norm, rms_norm
from k25_jax.models.moe import route
from k25_jax.models.moonvit3d import pool
from k25_jax.optim.newton_schulz import newton_schulz
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.rl import policy

HALF_A_STEP = 2.0**-8  # of bfloat16, relative: the most that rounding a result once costs
MODEL, MOE = MINUTE, MINUTE.text.moe
LOSS = jax.jit(cross_entropy, static_argnames="chunk")


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x) -> np.ndarray:
    """The same numbers in double precision."""
    return np.asarray(x.astype(jnp.float32), np.float64)


def text_batch(lengths=(20, 9)):
    """One row of documents of random words, and padding."""
    rng = np.random.default_rng(3)
    examples = [make_example(rng.integers(2, 60, n).tolist(), [1.0] * n, [], MODEL.media_pad_id) for n in lengths]
    return pack_examples(examples, DataConfig(batch_size=1, seq_len=32, packs=0, pack_patches=16), MODEL)


# ------------------------------------------------------------------------------------------------------------- router
def close_columns(inputs: int, experts: int):
    """Columns that differ by 1e-3 of a logit where every input is 1: the last expert is the best, and they rise."""
    return np.full((inputs, experts), 1.0 / inputs, np.float32) + 1e-3 / inputs * np.arange(experts, dtype=np.float32)


def test_the_router_tells_experts_whose_scores_differ_by_a_thousandth():
    x_TD, router_DE = jnp.ones((5, 32), jnp.bfloat16), close_columns(32, 16)
    weights_TK, experts_TK = jax.jit(route, static_argnums=3)(router_DE, np.zeros(16, np.float32), x_TD, MOE)
    assert weights_TK.dtype == jnp.float32 and (np.asarray(experts_TK) == [15, 14]).all()
    scores = 1 / (1 + np.exp(-(1 + 1e-3 * np.array([15, 14]))))
    np.testing.assert_allclose(weights_TK, np.tile(MOE.scale * scores / scores.sum(), (5, 1)), rtol=1e-5)


def test_a_bfloat16_step_chooses_the_experts_of_a_float32_step():
    """The router's weights stay as they are when all others are cast: rounded, these columns would be one and the same."""
    params = jax.tree.map(lambda a: np.float32(0.02) * np.asarray(a), random_params(MODEL))
    params["moe"]["mlp_norm"], params["embed"] = np.ones((1, 32), np.float32), np.ones((64, 32), np.float32)
    params["moe"]["moe"] |= {"router": close_columns(32, 16)[None], "router_bias": np.zeros((1, 16), np.float32)}
    batch, loads = text_batch(), {}
    for dtype in ("float32", "bfloat16"):
        experiment = Experiment(model=MODEL, train=TrainConfig(compute_dtype=dtype))
        _, (_, stats) = jax.jit(loss_fn, static_argnames="experiment")(params, batch, experiment=experiment)
        loads[dtype] = np.asarray(stats.load_YE)[0]
    assert loads["float32"].tolist() == [0] * 14 + [29, 29]
    np.testing.assert_array_equal(loads["bfloat16"], loads["float32"])


def test_weights_that_are_cast_for_sampling_keep_the_router():
    params = cast(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract_params(MODEL)), jnp.bfloat16)
    moe = params["moe"]["moe"]
    assert moe["router"].dtype == moe["router_bias"].dtype == jnp.float32
    assert moe["experts"]["gate"].dtype == params["embed"].dtype == jnp.bfloat16


def test_padding_reaches_no_expert():
    """Of 32 places 29 hold a token; each goes to two experts."""
    batch, params = text_batch(), random_params(MODEL)
    for dtype in ("float32", "bfloat16"):
        experiment = Experiment(model=MODEL, train=TrainConfig(compute_dtype=dtype))
        _, (_, stats) = jax.jit(loss_fn, static_argnames="experiment")(params, batch, experiment=experiment)
        assert (batch.segments_BL == 0).sum() == 3 and stats.load_YE.sum() == 29 * MOE.top_k


# -------------------------------------------------------------------------------------------------------------- norms
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_norm_is_off_by_one_rounding_alone_however_long_its_rows(size, centred):
    """Statistics in bfloat16 would round twice, and lose the mean of a row far from zero."""
    x = draw(64, 1000) * size + (3 * size if centred else 0)
    exact = wide(x) - (wide(x).mean(axis=-1, keepdims=True) if centred else 0)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-6)
    if centred:
        got = jax.jit(layer_norm, static_argnums=2)(x, {"scale": np.ones(1000, "f"), "bias": np.zeros(1000, "f")}, 1e-6)
    else:
        got = jax.jit(rms_norm, static_argnums=2)(x, np.ones(1000, "f"), 1e-6)
    assert got.dtype == jnp.bfloat16
    assert np.abs(wide(got) - exact).max() <= 1e-6 + 1.001 * HALF_A_STEP * np.abs(exact).max()
    assert (np.abs(wide(got) - exact) <= 1e-6 + 1.01 * HALF_A_STEP * np.abs(exact)).all()


def test_the_gradient_of_a_norm_is_that_of_float32():
    """An upstream gradient that is almost a multiple of the row itself: what is left of it is a difference of sums."""
    x = draw(16, 1000)
    dy = (x.astype(jnp.float32) + 0.05 * draw(16, 1000, seed=1, dtype=jnp.float32)).astype(jnp.bfloat16)
    gradients = jax.jit(lambda x, dy: jax.vjp(lambda x, s: rms_norm(x, s, 1e-6), x, jnp.ones(1000))[1](dy))
    for got, exact in zip(gradients(x, dy), gradients(x.astype(jnp.float32), dy.astype(jnp.float32)), strict=True):
        assert np.linalg.norm(wide(got) - wide(exact)) <= 2 * HALF_A_STEP * np.linalg.norm(wide(exact))


@pytest.mark.parametrize("centred", [False, True])
def test_the_written_gradient_of_a_norm_is_the_derived_one(centred):
    x, scale, dy = (draw(*shape, seed=i, dtype=jnp.float32) for i, shape in enumerate([(5, 30), (30,), (5, 30)]))

    def plain(x, scale):
        x = x - x.mean(axis=-1, keepdims=True) if centred else x
        return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-3) * scale

    def ours(x, scale):
        return layer_norm(x, {"scale": scale, "bias": 0 * scale}, 1e-3) if centred else rms_norm(x, scale, 1e-3)

    gradients = jax.jit(lambda *a: [jax.vjp(form, *a)[1](dy) for form in (ours, plain)])
    for got, want in zip(*gradients(x + 1, scale), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_frames_of_a_clip_are_averaged_in_float32():
    """Three frames of 256, 1 and 1, each by a third; rounded between, the ones would be lost."""
    x_NW = jnp.repeat(jnp.asarray([256, 1, 1], jnp.bfloat16), 4)[:, None] * jnp.ones((12, 16), jnp.bfloat16)
    pooled = jax.jit(pool, static_argnums=3)(
        x_NW, np.tile(np.arange(4), 3), np.full(12, 1 / 3, np.float32), MODEL.vision
    )
    assert pooled.shape == (3, 4, 16) and not pooled[1:].any()
    np.testing.assert_array_equal(wide(pooled[0]), 86)


# ------------------------------------------------------------------------------------------------------- the vocabulary
def test_scores_of_the_vocabulary_are_not_rounded():
    """Scores near 200 that differ by a thousandth; in bfloat16 numbers there are a whole one apart."""
    x_BLD, head_DV = jnp.full((1, 4, 256), 1.0, jnp.bfloat16), np.full((256, 64), 0.75, np.float32)
    head_DV[0] = 1.0 + 2.0**-7 * np.arange(64)
    head_DV = jnp.asarray(head_DV, jnp.bfloat16)
    exact_BLV = wide(x_BLD) @ wide(head_DV)
    targets_BL = np.array([[0, 20, 40, 63]])
    want_BL = (
        np.log(np.exp(exact_BLV - 192).sum(axis=-1))
        + 192
        - np.take_along_axis(exact_BLV, targets_BL[..., None], -1)[..., 0]
    )
    for chunk in (64, 16):
        loss, metrics = LOSS(x_BLD, head_DV, targets_BL, np.ones((1, 4), np.float32), chunk=chunk)
        np.testing.assert_allclose(loss, want_BL.mean(), rtol=1e-4)
        assert metrics["accuracy"] == 0.25
    np.testing.assert_allclose(decoder.logits({"head": head_DV}, x_BLD), exact_BLV, rtol=1e-6)


def test_the_loss_is_added_up_in_float32():
    """4,096 places with a loss of one each, nearly; added in bfloat16 they would come to 256."""
    x_BLD, head_DV = jnp.zeros((1, 4096, 4), jnp.bfloat16), jnp.zeros((4, 3), jnp.bfloat16)
    loss, metrics = LOSS(x_BLD, head_DV, np.zeros((1, 4096), int), np.ones((1, 4096), np.float32))
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    assert metrics["target_weight"] == 4096


def test_ratios_and_the_policy_loss_are_float32():
    """4,096 tokens whose probability rose by a thousandth: in bfloat16 none would have, and they would come to 256."""
    batch = pack_samples([], DataConfig(batch_size=1, seq_len=4096, packs=0, pack_patches=16), MODEL)
    filled = dict(loss_weights_BL=1.0, old_logprobs_BL=-np.log(3) - 1e-3, advantages_BL=1.0)
    batch = batch.replace(**{name: np.full((1, 4096), value, np.float32) for name, value in filled.items()})
    batch = batch.replace(targets_BL=np.zeros((1, 4096), np.int32))
    x_BLD, head_DV = jnp.zeros((1, 4096, 4), jnp.bfloat16), jnp.zeros((4, 3), jnp.bfloat16)
    experiment = Experiment(model=MODEL, stage="rl", rl=RLConfig(tau=0.0), train=TrainConfig(compute_dtype="bfloat16"))
    loss, metrics = jax.jit(policy, static_argnums=4)(x_BLD, head_DV, batch, None, experiment)
    assert loss.dtype == metrics["mismatch"].dtype == jnp.float32
    np.testing.assert_allclose(loss, -np.exp(1e-3), rtol=1e-6)
    np.testing.assert_allclose(metrics["mismatch"], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(metrics["entropy"], np.log(3), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- attention
def softmax_attention(q, k, v, scale: float, causal: bool):
    """In double precision, one segment: (out, weights)."""
    scores = np.einsum("blhk,bshk->bhls", wide(q), wide(k)) * scale
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhls,bshk->blhk", weights, wide(v)), weights


def test_attention_at_logits_of_a_hundred_is_that_of_float32():
    """Scores there are half a unit apart in bfloat16, which moves weights by half."""
    q, k = ((draw(1, 64, 2, 64, seed=i) + 3).astype(jnp.bfloat16) for i in range(2))
    v = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (1, 64, 2, 64)), jnp.bfloat16)
    scale = 100 / float(np.einsum("blhk,bshk->bhls", wide(q), wide(k)).max())
    attend = jax.jit(lambda q, k, v: attention(q, k, v, np.ones((1, 64), np.int32), scale=scale, causal=True, block=32))
    out, top = attend(q, k, v)
    exact, _ = softmax_attention(q, k, v, scale, causal=True)
    np.testing.assert_allclose(top.max(), 100, rtol=1e-5)
    assert np.abs(wide(out) - exact).max() <= 0.01


@pytest.mark.parametrize("keep_weights", [False, True])
def test_the_backward_pass_of_attention_tells_values_that_differ_by_half_of_a_hundred(keep_weights):
    """Uniform weights over values of 96 and a half more or less: a score's gradient is the difference of two sums near 400.

    The mean of the values is 96 exactly, so that nothing is lost on the way to it.
    """
    rng = np.random.default_rng(0)
    signs = rng.permuted(np.tile([-0.5, 0.5], (32, 8)), axis=1).T  # [16 keys, 32]; for each number as many of each
    v = jnp.asarray(96 + signs, jnp.bfloat16)[None, :, None]
    k, q = draw(1, 16, 1, 8, seed=1), jnp.zeros((1, 16, 1, 8), jnp.bfloat16)
    dout = jnp.asarray(np.abs(rng.normal(size=(1, 16, 1, 32))), jnp.bfloat16)
    how = dict(scale=1.0, causal=False, keep_weights=keep_weights)
    attend = lambda q: attention(q, k, v, np.ones((1, 16), np.int32), **how)[0]  # noqa: E731
    out, (dq,) = jax.jit(lambda q: (attend(q), jax.vjp(attend, q)[1](dout)))(q)
    assert (wide(out) == 96).all()
    dweights = np.einsum("blhk,bshk->bhls", wide(dout), wide(v))
    dscores = (dweights - 96 * wide(dout).sum(axis=-1).swapaxes(1, 2)[..., None]) / 16
    exact = np.einsum("bhls,bshk->blhk", dscores, wide(k))
    assert np.linalg.norm(wide(dq) - exact) <= 4 * HALF_A_STEP * np.linalg.norm(exact)


def test_gradients_of_keys_are_not_rounded_from_block_to_block():
    """The second block's queries are those of the first but for their sign and their last digit, which alone is left."""
    rng = np.random.default_rng(0)
    first = 1 + 2.0**-7 * rng.integers(0, 60, (1, 32, 1, 8))
    digit = 2.0**-7 * rng.integers(1, 4, (1, 32, 1, 8))
    q = jnp.asarray(np.concatenate([first, -(first + digit)], axis=1), jnp.bfloat16)
    k, v = jnp.zeros((1, 64, 1, 8), jnp.bfloat16), draw(1, 64, 1, 16, seed=1)
    dout = jnp.concatenate([draw(1, 32, 1, 16, seed=2)] * 2, axis=1)
    how = dict(scale=1.0, causal=False, block=32)
    attend = lambda k: attention(q, k, v, np.ones((1, 64), np.int32), **how)[0]  # noqa: E731
    (dk,) = jax.jit(lambda k: jax.vjp(attend, k)[1](dout))(k)
    dweights = np.einsum("blhk,bshk->bhls", wide(dout[:, :32]), wide(v))
    dscores = (dweights - dweights.mean(axis=-1, keepdims=True)) / 64
    exact = -np.einsum("bhls,blhk->bshk", dscores, digit)
    assert np.linalg.norm(wide(dk) - exact) <= 8 * HALF_A_STEP * np.linalg.norm(exact)


# ----------------------------------------------------------------------------------------------------------- optimizer
def test_newton_schulz_does_not_feel_how_large_a_matrix_is():
    """Its norm is taken, and taken out, in float32: then a factor changes no bit of what is rounded, or hardly one."""
    stack = draw(2, 24, 40, dtype=jnp.float32)
    orthogonal = jax.jit(newton_schulz)
    for size in np.geomspace(1.07, 1.9, 7):
        assert jnp.abs(orthogonal(np.float32(size) * stack) - orthogonal(stack)).mean() <= 1e-4, size
