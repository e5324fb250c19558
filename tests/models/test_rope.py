"""Rotary embeddings, the time table and the resampled position table against their definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.utils import logging

from k25_jax.config import K25Config, RopeConfig, TextConfig, VisionConfig
from k25_jax.models import rope
from k25_jax.models.moonvit3d import cubic_taps, positions, time_table

PLAIN = dict(rope_type="default", rope_theta=5e4)
YARN = dict(rope_type="yarn", rope_theta=5e4, factor=8.0, original_max_position_embeddings=64)
SCALINGS = {
    "plain": PLAIN,
    "yarn without options": YARN,
    "both terms": YARN | dict(mscale=0.707, mscale_all_dim=1.0, beta_fast=1.0),
    "equal terms": YARN | dict(mscale=1.0, mscale_all_dim=1.0, beta_slow=2.0, beta_fast=20.0),
    "one term": YARN | dict(mscale_all_dim=0.5),
    "a zero term": YARN | dict(mscale=0.0, mscale_all_dim=1.0),
    "factor one": YARN | dict(factor=1.0, mscale=1.0, mscale_all_dim=0.5),
    "ramp of no width": YARN | dict(beta_fast=1.0, beta_slow=1.0, rope_theta=100.0, original_max_position_embeddings=8),
    "ramp beyond the ends": YARN | dict(beta_fast=1e4, beta_slow=1e-3),
    "fractional factor": YARN | dict(factor=2.5, beta_fast=4),
}


def to_ours(values: dict) -> RopeConfig:
    if values["rope_type"] == "default":
        return RopeConfig(theta=values["rope_theta"])
    return RopeConfig(
        theta=values["rope_theta"], factor=values["factor"], yarn=True,
        original_length=values["original_max_position_embeddings"], beta_fast=float(values.get("beta_fast", 32)),
        beta_slow=values.get("beta_slow", 1.0), mscale=values.get("mscale", 0.0),
        mscale_all_dim=values.get("mscale_all_dim", 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("dim", [2, 6, 64])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, dim):
    logging.set_verbosity_error()
    config = DeepseekV3Config(
        qk_rope_head_dim=dim, max_position_embeddings=2048, rope_parameters=dict(SCALINGS[name]), hidden_size=32,
        num_attention_heads=2,
    )  # fmt: skip
    places = torch.tensor([[0, 1, 7, 63, 64, 500, 2047]])
    expected = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), places)
    for ours, theirs in zip(rope.rope_tables(to_ours(SCALINGS[name]), dim, places.numpy()), expected, strict=True):
        assert ours.shape == (1, 7, dim // 2) and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs[..., : dim // 2], rtol=0, atol=1e-4)  # their theta ** x is in float32
        np.testing.assert_allclose(ours[:, :3], theirs[:, :3, : dim // 2], rtol=0, atol=2e-6)


STAGES = [8, 16, 32, 64]  # of mid-training: 32768 to 262144 tokens (experiments/midtrain/k25_1t.py)


@pytest.mark.parametrize("factor", STAGES)
def test_every_stage_of_mid_training_turns_and_scales_as_transformers(factor):
    """K2.5's rope at each factor: tables within and far beyond the original 4096 places, and the scale of the scores."""
    logging.set_verbosity_error()
    text = K25Config().text
    text = dataclasses.replace(
        text, rope=dataclasses.replace(text.rope, factor=float(factor)), max_length=4096 * factor
    )
    yarn = dict(
        rope_type="yarn", rope_theta=5e4, factor=float(factor), original_max_position_embeddings=4096, beta_fast=1.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    )  # fmt: skip
    config = DeepseekV3Config(
        qk_rope_head_dim=64, qk_nope_head_dim=128, max_position_embeddings=text.max_length, rope_parameters=yarn,
        hidden_size=32, num_attention_heads=2, kv_lora_rank=8, q_lora_rank=8, v_head_dim=8,
    )  # fmt: skip
    places = np.array([[0, 1, 4095, 4096, 5000, text.max_length // 2, text.max_length - 1]])
    theirs = DeepseekV3RotaryEmbedding(config)
    np.testing.assert_allclose(rope.inverse_frequencies(text.rope, 64), theirs.inv_freq, rtol=2e-6)
    expected = theirs(torch.zeros(1), torch.from_numpy(places))
    for ours, other in zip(rope.rope_tables(text.rope, 64, places), expected, strict=True):
        # a frequency that differs by a rounding or two differs by so much more at the last place
        error = np.abs(np.asarray(ours) - other[..., :32].numpy())
        assert (error <= 2e-6 + 4 * 2**-24 * places[..., None]).all(), error.max()
        assert error[:, :2].max() < 1e-6
    attention = DeepseekV3Attention(config, 0)
    assert rope.softmax_scale(text) == pytest.approx(attention.scaling, rel=1e-12)
    assert attention.scaling > 192**-0.5


def test_tables_at_the_end_of_the_context_are_as_exact_as_float32_allows():
    places = np.array([0, 1, 4095, 4096, 100_003, 262_143])
    angles = places[:, None] / 5e4 ** (np.arange(0, 64, 2) / 64)
    cos, sin = rope.rope_tables(RopeConfig(theta=5e4), 64, places)
    rounding = 2 * 2**-24 * places[:, None] + 1e-6  # of the frequency and of the angle
    assert (np.abs(cos - np.cos(angles)) <= rounding).all() and (np.abs(sin - np.sin(angles)) <= rounding).all()


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    config = RopeConfig(theta=10000.0, factor=16.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, yarn=True)
    plain = rope.inverse_frequencies(dataclasses.replace(config, yarn=False, factor=1.0), 64)
    ratio = plain / rope.inverse_frequencies(config, 64)
    turns = 4096 * plain / (2 * math.pi)  # over the original length
    assert turns[0] > 32 and turns[-1] < 1
    np.testing.assert_allclose(ratio[turns > 45], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.7], 16, rtol=1e-6)
    assert (np.diff(ratio) >= 0).all() and ((ratio > 1.01) & (ratio < 15.9)).sum() > 3


def test_softmax_scale():
    text = K25Config().text
    assert rope.softmax_scale(text) == pytest.approx(192**-0.5 * (0.1 * math.log(64) + 1) ** 2)
    for changes, factor in [
        (dict(mscale_all_dim=0.0), 1.0),
        (dict(mscale_all_dim=0.5), (0.05 * math.log(64) + 1) ** 2),
        (dict(factor=1.0), 1.0),
        (dict(yarn=False, factor=1.0), 1.0),
    ]:
        changed = dataclasses.replace(text, rope=dataclasses.replace(text.rope, **changes))
        assert rope.softmax_scale(changed) == pytest.approx(192**-0.5 * factor)


def test_rotation_turns_interleaved_pairs():
    """As multiplication of complex numbers; the product of two turned vectors depends on their distance alone."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9, 10)).astype(np.float32)
    config = RopeConfig(theta=100.0)
    cos, sin = rope.rope_tables(config, 10, np.arange(9))
    turned = np.asarray(rope.rotate(x, cos, sin))
    expected = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(
        1j * np.outer(np.arange(9), 100.0 ** -(np.arange(0, 10, 2) / 10))
    )
    np.testing.assert_allclose(turned[:, 0::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[:, 1::2], expected.imag, atol=1e-5)

    def product(i, j):
        def at(v, place):
            return np.asarray(rope.rotate(v, *rope.rope_tables(config, 10, np.array(place))))

        return at(x[0], i) @ at(y[0], j)

    assert product(3, 7) == pytest.approx(product(103, 107), abs=1e-4)
    assert product(3, 7) != pytest.approx(product(3, 8), abs=1e-2)


def test_axial_pairs_alternate_between_column_and_row():
    config = VisionConfig(width=24, heads=2, rope_theta=100.0)
    rows, columns = np.array([0, 3, 5, 511]), np.array([0, 4, 0, 2])
    cos, sin = rope.axial_tables(config, rows, columns)
    frequencies = 100.0 ** -(np.arange(0, 6, 2) / 6)
    angles = np.stack([np.outer(columns, frequencies), np.outer(rows, frequencies)], axis=-1).reshape(4, 6)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-4)


def test_time_table():
    config = VisionConfig(width=12, heads=1, pos_time=4)
    table = np.asarray(time_table(config))
    assert table.shape == (5, 12) and not table[0].any()
    for frame in range(4):
        angles = frame / 10000 ** (np.arange(0, 12, 2) / 12)
        np.testing.assert_allclose(table[1 + frame], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


@pytest.mark.parametrize("side, size", [(4, 10), (7, 7), (9, 4), (1, 6), (64, 2), (2, 3), (64, 100), (3, 512)])
def test_cubic_taps_are_those_of_bicubic_interpolation(side, size):
    line = np.random.default_rng(0).normal(size=side).astype(np.float32)
    taps, weights = cubic_taps(jnp.arange(size), jnp.full(size, size), side)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-5)
    ours = (line[taps] * np.asarray(weights)).sum(axis=1)
    picture = torch.from_numpy(np.repeat(line[None, None, None], 2, axis=2))
    theirs = torch.nn.functional.interpolate(picture, size=(2, size), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(ours, theirs[0, 0, 0], atol=2e-5)


def test_position_table_is_resampled_to_each_grid_of_a_pack():
    config = VisionConfig(width=8, heads=1, pos_height=5, pos_width=7)
    table = np.random.default_rng(1).normal(size=(5, 7, 8)).astype(np.float32)
    coords, expected = [], []
    for frames, height, width in [(1, 4, 6), (3, 2, 12), (1, 5, 7), (1, 16, 2)]:
        picture = torch.from_numpy(table).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(picture, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
        for frame in range(frames):
            times = np.asarray(time_table(config))[frame + 1 if frames > 1 else 0]
            expected.append(resized.reshape(-1, 8).numpy() + times)
            coords += [(frame + 1 if frames > 1 else 0, y, x, height, width) for y, x in np.ndindex(height, width)]
    ours = jax.jit(positions, static_argnums=2)({"pos_table": table}, np.array(coords, np.int32), config)
    np.testing.assert_allclose(ours, np.concatenate(expected), atol=2e-5)
    same_size = slice(24 + 72, 24 + 72 + 35)  # the grid that has the size of the table
    np.testing.assert_allclose(ours[same_size], table.reshape(-1, 8), atol=1e-6)


def test_dimensions_that_cannot_turn_in_pairs_are_refused():
    with pytest.raises(ValueError, match="qk_rope_dim=7"):
        TextConfig(qk_rope_dim=7)
    with pytest.raises(ValueError, match="multiple of 4"):
        VisionConfig(width=12, heads=2)
