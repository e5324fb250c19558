"""Odd models drawn at random, as PyTorch modules of `transformers` and as parameter trees of ours."""

import copy
import pathlib

import jax
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from drawn import random_params as random_params
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.data.packing import Batch
from k25_jax.sampling.sample import lay_out
from k25_jax.vision.patchpack import Clip, pack_clips


def between(rng, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(rng.integers(low, high + 1))


def draw_rope(rng) -> dict:
    """Plain rotary embedding, or YaRN with every key there or missing."""
    theta = float(rng.choice([100.0, 10000.0, 50000.0, 1e6]))
    if rng.random() < 0.25:
        return dict(rope_type="default", rope_theta=theta)
    rope = dict(rope_type="yarn", rope_theta=theta, original_max_position_embeddings=2 ** between(rng, 4, 8))
    rope["factor"] = float(rng.choice([1.0, 1.5, 4.0, 10.0, 64.0]))
    for key, values in {
        "beta_fast": [1.0, 4.0, 16.0, 32.0],
        "beta_slow": [0.5, 1.0, 2.0],
        "mscale": [0.0, 0.7, 1.0],
        "mscale_all_dim": [0.0, 0.5, 1.0],
    }.items():
        if rng.random() < 0.8:
            rope[key] = float(rng.choice(values))
    return rope


def draw_text(rng) -> dict:
    """The language model's part of a configuration."""
    groups = int(rng.choice([1, 1, 2, 3, 4]))
    group_size = between(rng, 3 if groups == 1 else 2, 12 // groups)
    top_groups = between(rng, 1, groups)
    layers, heads = between(rng, 1, 4), between(rng, 1, 6)
    return dict(
        model_type="deepseek_v3",
        vocab_size=between(rng, 70, 300),
        hidden_size=between(rng, 9, 60),
        intermediate_size=between(rng, 5, 80),
        moe_intermediate_size=between(rng, 3, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_shared_experts=between(rng, 1, 2),
        n_routed_experts=groups * group_size,
        num_experts_per_tok=between(rng, 1, min(top_groups * group_size, 5)),
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=bool(rng.random() < 0.7),
        routed_scaling_factor=float(rng.choice([1.0, 2.5, 2.827])),
        q_lora_rank=None if rng.random() < 0.35 else between(rng, 3, 20),
        kv_lora_rank=between(rng, 3, 20),
        qk_rope_head_dim=2 * between(rng, 1, 8),
        qk_nope_head_dim=between(rng, 1, 17),
        v_head_dim=between(rng, 1, 17),
        first_k_dense_replace=between(rng, 0, layers),
        attention_bias=bool(rng.random() < 0.4),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        max_position_embeddings=4096,
        rope_parameters=draw_rope(rng),
    )


def draw_config(seed: int) -> Kimi_K25Config:
    """An odd configuration; the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    text = draw_text(rng)
    heads = between(rng, 1, 4)
    side, width = between(rng, 1, 9), heads * 4 * between(rng, 1, 5)
    vision = dict(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=between(rng, 1, 3),
        intermediate_size=between(rng, 5, 60),
        pos_emb_height=side,
        pos_emb_width=side,
        patch_size=int(rng.choice([14, 14, 8, 5, 2])),
    )
    return Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=width,
        projection_layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.3),
        image_token_id=text["vocab_size"] + between(rng, -60, 5),
    )


def randomise(model, seed=0):
    """No tensor of the model is left at zeros or ones, where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if "norm" in name else 0.1))
        if "norm" in name and name.endswith("weight"):
            tensor.add_(1)
    return model.eval()


def torch_model(config: Kimi_K25Config, seed: int = 0) -> Kimi_K25ForConditionalGeneration:
    """A model whose every tensor is random: nothing is left at zero or one, where a mistake would not show."""
    model = Kimi_K25ForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # the default one wants sizes in multiples of 16 bytes
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 0
            if "experts." in name and tensor.ndim == 3:
                fan_in = tensor.shape[2]
            scale = fan_in**-0.5 if fan_in and "embed" not in name else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)
    return model.eval()


def save(model, folder) -> None:
    """Write a PyTorch model with `save_pretrained`.

    Version 5.23 takes the language model's q_proj for a part of the vision tower's wqkv, and cannot read back what it
    writes; that tensor is added afterwards under its public name.
    """
    state = model.state_dict()
    queries = {name: state.pop(name) for name in list(state) if name.endswith("self_attn.q_proj.weight")}
    model.save_pretrained(folder, state_dict=state)
    file = pathlib.Path(folder) / "model.safetensors"
    public = {name.replace("model.language_model.", "language_model.model."): t for name, t in queries.items()}
    save_file(load_file(file) | public, file, {"format": "pt"})


def ours(model, folder):
    """(config, params) of a PyTorch model, through files."""
    save(model, folder)
    config = read_config(folder)
    return config, load_params(folder, config)


# ----------------------------------------------------------------------------------------------------------- gradients
def gradients_of(model, loss, folder):
    """The gradients of a PyTorch loss as a tree of ours: they are saved and read as if they were weights."""
    loss.backward()
    gradients = copy.deepcopy(model)
    for ours_, theirs in zip(gradients.parameters(), model.parameters(), strict=True):
        ours_.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
    return ours(gradients, folder)[1]


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


# -------------------------------------------------------------------------------------------------------------- inputs
def draw_clip(rng, config, frames: int, rows: int, columns: int) -> Clip:
    """A clip of raw pixel values on a grid of rows x columns patches."""
    patches = rng.integers(0, 256, (frames * rows * columns, config.vision.patch_dim)).astype(np.uint8)
    return Clip(patches, (frames, rows, columns), "drawn")


def draw_prompt(rng, config, length: int, images: int, largest: int = 6) -> tuple[list[int], list[Clip]]:
    """About `length` token ids with the places of `images` images among them, and the images in order."""
    clips = [
        draw_clip(rng, config, 1, 2 * between(rng, 1, largest), 2 * between(rng, 1, largest)) for _ in range(images)
    ]
    words = draw_words(rng, config, max(length - sum(clip.tokens for clip in clips), images + 2))
    places = np.sort(rng.integers(0, len(words) + 1, images))
    for clip, place in reversed(list(zip(clips, places, strict=True))):
        words[place:place] = [config.media_pad_id] * clip.tokens
    return words, clips


def draw_words(rng, config, count: int) -> list[int]:
    """Token ids, none of them media_pad."""
    return rng.choice([i for i in range(config.text.vocab_size) if i != config.media_pad_id], count).tolist()


def torch_pixels(clips, config) -> dict:
    """`pixel_values` and `image_grid_thw` of clips, for the PyTorch model."""
    side = config.vision.patch_size
    pixels = np.concatenate([clip.patches for clip in clips]).astype(np.float32) / 255 * 2 - 1
    grid = torch.tensor([clip.grid for clip in clips])
    return dict(pixel_values=torch.from_numpy(pixels.reshape(-1, 3, side, side)), image_grid_thw=grid)


def torch_inputs(tokens, clips, config) -> dict:
    """Keyword arguments of the PyTorch model for one prompt."""
    return dict(input_ids=torch.tensor([tokens])) | (torch_pixels(clips, config) if clips else {})


def one_row_batch(tokens, clips, config) -> Batch:
    """One prompt as a batch of one row; every next text token is a target."""
    patches = sum(len(clip.patches) for clip in clips)
    pack, starts = pack_clips(clips, int(bool(clips)), max(4, patches), config.vision.merge, config.vision.patch_dim)
    tokens_BL, media_BL = (a[:, : len(tokens)] for a in lay_out([tokens], [clips], list(starts), config.media_pad_id))
    targets_BL = np.roll(tokens_BL, -1, axis=1)
    weights_BL = (targets_BL != config.media_pad_id).astype(np.float32)
    weights_BL[:, -1] = 0
    return Batch(
        tokens_BL=tokens_BL,
        targets_BL=np.where(weights_BL > 0, targets_BL, 0),
        loss_weights_BL=weights_BL,
        segments_BL=np.ones_like(tokens_BL),
        positions_BL=np.arange(len(tokens), dtype=np.int32)[None],
        media_BL=media_BL,
        vision=pack,
    )
