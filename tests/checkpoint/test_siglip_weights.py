"""SigLIP's weights in our encoder, against transformers and torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from k25_jax.checkpoint.folders import CheckpointError
from k25_jax.checkpoint.siglip import load_siglip_vision, resample
from k25_jax.config import K25Config, VisionConfig
from k25_jax.models.k25 import abstract_params
from k25_jax.models.layers import layer_norm
from k25_jax.models.moonvit3d import encoder_block
from reference import randomise

SIGLIP = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=70,
              patch_size=14, layer_norm_eps=1e-5)  # fmt: skip
ENCODER = VisionConfig(layers=2, width=24, heads=2, mlp_dim=20, pos_height=5, pos_width=5)


def test_siglip_weights_compute_what_siglip_computes(tmp_path):
    model = randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)))
    model.save_pretrained(tmp_path)
    p = load_siglip_vision(tmp_path, ENCODER)
    shapes = jax.tree.map(lambda a: a.shape, abstract_params(K25Config(vision=ENCODER))["vision"])
    assert jax.tree.map(lambda a: a.shape, p) == shapes
    pixels = np.random.default_rng(0).normal(size=(1, 3, 70, 70)).astype(np.float32)
    patches = pixels.reshape(3, 5, 14, 5, 14).transpose(1, 3, 0, 2, 4).reshape(25, 588)
    x_NW = patches @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"] + p["pos_table"].reshape(25, 24)
    still = jnp.ones((25, 6)), jnp.zeros((25, 6))  # no rotation: SigLIP has none
    block = jax.jit(encoder_block, static_argnums=4)
    for y in range(2):
        x_NW = block(jax.tree.map(lambda a, y=y: a[y], p["blocks"]), x_NW, still, jnp.ones(25, int), ENCODER)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state[0].numpy()
    np.testing.assert_allclose(layer_norm(x_NW, p["final_norm"], 1e-5), expected, atol=1e-5)


def test_siglip_with_its_text_model_and_another_table(tmp_path):
    text = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    model = randomise(transformers.SiglipModel(transformers.SiglipConfig(vision_config=SIGLIP, text_config=text)))
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", dataclasses.replace(ENCODER, pos_height=8, pos_width=3)
    p = load_siglip_vision(file, config, dtype=jnp.bfloat16)
    assert p["pos_table"].shape == (8, 3, 24) and p["pos_table"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="16 problems"):  # a third layer is missing
        load_siglip_vision(file, VisionConfig(layers=3, width=24, heads=2, mlp_dim=20))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a SigLIP checkpoint"):
        load_siglip_vision(tmp_path / "other.safetensors", config)


@pytest.mark.parametrize("size", [(8, 3), (5, 5), (11, 12), (2, 2)])
def test_positions_are_resampled_as_torch_does(size):
    table = np.random.default_rng(3).normal(size=(5, 5, 4)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(2, 0, 1)[None], size=size, mode="bicubic", align_corners=False
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(resample(table, *size), expected.numpy(), atol=1e-5)
