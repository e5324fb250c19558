"""Gradients against PyTorch's autograd, finite differences, rematerialisation, and causality."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from transformers.utils import logging

from k25_jax.config import Experiment, MoEConfig, RopeConfig, TextConfig, TrainConfig, preset
from k25_jax.models import decoder, k25
from k25_jax.train.pretrain import loss_fn

CASES = {2: (290, 2), 35: (60, 3)}  # seed: tokens, images; each has YaRN and routed experts


def torch_gradients(model, inputs, batch, folder, config):
    """The reference's loss and its gradients as a tree of ours: they are saved and read as if they were weights."""
    logits_LV = model(**inputs).logits[0]
    weights_L, targets_L = torch.from_numpy(batch.loss_weights_BL[0]), torch.from_numpy(batch.targets_BL[0]).long()
    loss = (torch.nn.functional.cross_entropy(logits_LV, targets_L, reduction="none") * weights_L).sum()
    loss = loss / weights_L.sum()
    loss.backward()
    gradients = copy.deepcopy(model)
    for ours, theirs in zip(gradients.parameters(), model.parameters(), strict=True):
        ours.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
    return loss.item(), reference.ours(gradients, folder)[1]


def assert_same_gradients(ours, theirs, tolerance):
    """Relative to each tensor's norm and to its largest value; the router's bias has no gradient."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        mine, other, name = np.asarray(mine), np.asarray(other), jax.tree_util.keystr(path)
        if "router_bias" in name:
            assert not mine.any()
            continue
        assert other.any(), f"{name} has no gradient to compare with"
        assert np.linalg.norm(mine - other) <= tolerance * np.linalg.norm(other), name
        assert np.abs(mine - other).max() <= tolerance * np.abs(other).max(), name


@pytest.mark.parametrize("seed", CASES)
def test_every_gradient_is_that_of_pytorch(seed, tmp_path):
    logging.set_verbosity_error()
    model = reference.torch_model(reference.draw_config(seed), seed)
    config, params = reference.ours(model, tmp_path / "weights")
    assert config.text.rope.yarn and config.text.rope.factor > 1 and config.text.moe_layers
    tokens, clips = reference.draw_prompt(np.random.default_rng(seed), config, *CASES[seed])
    batch = reference.one_row_batch(tokens, clips, config)
    inputs = reference.torch_inputs(tokens, clips, config)
    expected, theirs = torch_gradients(model, inputs, batch, tmp_path / "gradients", config)
    experiment = Experiment(model=config, train=TrainConfig(remat="full"))
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="experiment")
    (loss, _), ours = grad_fn(params, batch, experiment=experiment)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_same_gradients(ours, theirs, 1e-3)
