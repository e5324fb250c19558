"""Gradients against PyTorch's autograd and finite differences, and causality by gradient."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers.utils import logging

import reference
from k25_jax.config import Experiment, K25Config, MoEConfig, RopeConfig, TextConfig, TrainConfig, VisionConfig
from k25_jax.models import decoder
from k25_jax.train.pretrain import loss_fn

CASES = {19: (290, 2, "full"), 52: (60, 3, "dots")}  # seed: tokens, images, what the backward pass computes again


def torch_loss(model, inputs, batch):
    """The reference's mean cross-entropy of the places that count."""
    logits_LV = model(**inputs).logits[0]
    weights_L, targets_L = torch.from_numpy(batch.loss_weights_BL[0]), torch.from_numpy(batch.targets_BL[0]).long()
    loss = (torch.nn.functional.cross_entropy(logits_LV, targets_L, reduction="none") * weights_L).sum()
    return loss / weights_L.sum()


@pytest.mark.parametrize("seed", CASES)
def test_every_gradient_is_that_of_pytorch(seed, tmp_path):
    logging.set_verbosity_error()
    model = reference.torch_model(reference.draw_config(seed), seed)
    config, params = reference.ours(model, tmp_path / "weights")
    assert config.text.rope.yarn and config.text.rope.factor > 1 and config.text.moe_layers
    *size, remat = CASES[seed]
    tokens, clips = reference.draw_prompt(np.random.default_rng(seed), config, *size)
    batch = reference.one_row_batch(tokens, clips, config)
    inputs = reference.torch_inputs(tokens, clips, config)
    expected = torch_loss(model, inputs, batch)
    theirs = reference.gradients_of(model, expected, tmp_path / "gradients")
    experiment = Experiment(model=config, train=TrainConfig(remat=remat))
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="experiment")
    (loss, _), ours = grad_fn(params, batch, experiment=experiment)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    reference.assert_same_gradients(ours, theirs, 1e-3)


@pytest.fixture(scope="module")
def tiny():
    """(config, params, batch) of one packed row with two images in it."""
    text = TextConfig(
        vocab_size=61, d_model=20, layers=2, ffn_dim=24, heads=3, q_lora_rank=7, kv_lora_rank=9, qk_nope_dim=5,
        qk_rope_dim=4, v_dim=7, moe=MoEConfig(experts=5, top_k=2, ffn_dim=9, scale=2.0), max_length=256,
        rope=RopeConfig(theta=1000.0, factor=4.0, original_length=16, yarn=True),
    )  # fmt: skip
    vision = VisionConfig(layers=1, width=16, heads=2, mlp_dim=12, patch_size=4, pos_height=3, pos_width=3)
    config = K25Config(text=text, vision=vision, media_pad_id=60, bos_id=0, eos_ids=(1,), pad_id=2)
    params = reference.random_params(config)
    tokens, clips = reference.draw_prompt(np.random.default_rng(0), config, 40, 2, largest=3)
    return config, params, reference.one_row_batch(tokens, clips, config)


def test_finite_differences(tiny):
    """Along the gradient of each tensor, the loss rises as steeply as the gradient is long.

    With every expert chosen: the router's choice is a jump that no gradient sees.
    """
    config, params, batch = tiny
    moe = dataclasses.replace(config.text.moe, top_k=config.text.moe.experts)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe))
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch, Experiment(model=config))[0]))
    params = jax.tree.map(np.asarray, params)
    leaves, tree = jax.tree.flatten(params)
    for i, g in enumerate(jax.tree.leaves(loss_and_gradient(params)[1])):
        name = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(params)[i][0])
        norm = float(np.linalg.norm(g))
        if "router_bias" in name:
            continue
        assert norm > 0, name
        step = np.asarray(1e-3 * g / norm)
        up, down = (
            float(loss_and_gradient(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + move, *leaves[i + 1 :]]))[0])
            for move in (step, -step)
        )
        np.testing.assert_allclose((up - down) / 2e-3, norm, rtol=1e-2, atol=1e-3, err_msg=name)


def test_a_place_depends_on_what_came_before_it_in_its_own_segment_and_on_nothing_else(tiny):
    """By gradient, and exactly; long enough for attention in blocks."""
    config, params, _ = tiny
    lengths = (130, 1, 149, 3)  # and 27 of padding
    segments_L = np.concatenate([np.full(n, s + 1) for s, n in enumerate(lengths)] + [np.zeros(27, int)])
    positions_L = np.concatenate([np.arange(n) for n in (*lengths, 27)])
    x_BLD = jax.random.normal(jax.random.key(3), (1, len(segments_L), config.text.d_model))

    @jax.jit
    def gradient(x_BLD, place):
        def out(x_BLD):
            x_BLD, _ = decoder.decode(params, x_BLD, segments_L[None], positions_L[None], config.text)
            return x_BLD[0, place].sum() + x_BLD[0, place, 0] ** 2

        return jax.grad(out)(x_BLD)

    for place in (0, 60, 129, 130, 131, 200, 279, 282):
        reached = np.asarray(gradient(x_BLD, place)).any(axis=(0, 2))
        expected = (segments_L == segments_L[place]) & (np.arange(len(segments_L)) <= place)
        np.testing.assert_array_equal(reached, expected, err_msg=f"place {place}")
