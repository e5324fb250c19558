"""Initial weights of MoonViT-3D from a SigLIP checkpoint of Hugging Face, such as SO-400M (K2.5 §3.2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import TensorFiles
from k25_jax.config import VisionConfig
from k25_jax.models.moonvit3d import cubic_taps

POSITIONS = "vision_model.embeddings.position_embedding.weight"
HARMLESS = ("vision_model.head.", "vision_model.embeddings.position_ids", "text_model.", "logit_scale", "logit_bias")
INSIDE = ("embeddings.", "encoder.", "post_layernorm.", "head.")  # names of a vision model that was saved alone


def load_siglip_vision(source, config: VisionConfig, dtype=jnp.float32):
    """The `vision` part of the parameters, from a checkpoint folder or one safetensors file.

    The learned positions are resampled, bicubically, to the table of `config`; queries and keys need no permutation, as
    rotary positions are new to them. The text model and the pooling head are left out. Raises CheckpointError with all
    that does not fit `config`.
    """
    files = TensorFiles(source, _public_name)
    side = _side(files)
    w, f, p = config.width, config.mlp_dim, config.patch_size
    shapes = {"embeddings.patch_embedding": (w, 3, p, p), "post_layernorm": (w,)}
    for y in range(config.layers):
        layer = f"encoder.layers.{y}."
        shapes |= {f"{layer}self_attn.{name}": (w, w) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{layer}layer_norm{i}": (w,) for i in (1, 2)}
        shapes |= {f"{layer}mlp.fc1": (f, w), f"{layer}mlp.fc2": (w, f)}
    expected = {f"vision_model.{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"vision_model.{name}.bias": shape[:1] for name, shape in shapes.items()}
    files.check(expected | {POSITIONS: (side**2, w)}, lambda name: name.startswith(HARMLESS))

    def read(name: str) -> np.ndarray:
        return files.read(f"vision_model.{name}").astype(dtype)

    def stack(name: str) -> np.ndarray:
        return np.stack([read(f"encoder.layers.{y}.{name}") for y in range(config.layers)])

    def norm(name: str, read=read) -> dict:
        return {"scale": read(f"{name}.weight"), "bias": read(f"{name}.bias")}

    qkv, qkv_bias = (
        np.stack([stack(f"self_attn.{part}_proj.{kind}") for part in "qkv"], axis=1) for kind in ("weight", "bias")
    )
    out = stack("self_attn.out_proj.weight")
    blocks = {
        "norm0": norm("layer_norm1", stack),
        "norm1": norm("layer_norm2", stack),
        "qkv": rearrange(qkv, "y t (h d) w -> y w t h d", h=config.heads),
        "qkv_bias": rearrange(qkv_bias, "y t (h d) -> y t h d", h=config.heads),
        "out": rearrange(out, "y w (h d) -> y h d w", h=config.heads),
        "out_bias": stack("self_attn.out_proj.bias"),
    }
    for ours, theirs in (("fc0", "fc1"), ("fc1", "fc2")):
        blocks |= {ours: stack(f"mlp.{theirs}.weight").swapaxes(1, 2), f"{ours}_bias": stack(f"mlp.{theirs}.bias")}
    table = read("embeddings.position_embedding.weight").astype(np.float32).reshape(side, side, w)
    kernel = rearrange(read("embeddings.patch_embedding.weight"), "w c y x -> (c y x) w")
    tree = {
        "patch_embed": {"kernel": kernel, "bias": read("embeddings.patch_embedding.bias")},
        "pos_table": resample(table, config.pos_height, config.pos_width).astype(dtype),
        "blocks": blocks,
        "final_norm": norm("post_layernorm"),
    }
    return jax.tree.map(jnp.asarray, tree)


def resample(table_YXW, height: int, width: int):
    """A position table resampled as the encoder resamples its own (bicubic, a = -0.75) to [height, width, W]."""
    down, across = (
        jnp.einsum("nt,nts->ns", weights, jax.nn.one_hot(taps, side))
        for taps, weights, side in (
            (*cubic_taps(jnp.arange(size), size, side), side)
            for size, side in zip((height, width), table_YXW.shape, strict=False)
        )
    )
    return jnp.einsum("hy,vx,yxw->hvw", down, across, table_YXW)


def _public_name(name: str) -> str:
    return f"vision_model.{name}" if name.startswith(INSIDE) else name


def _side(files: TensorFiles) -> int:
    """Patches along a side of the images that the checkpoint was trained on."""
    stored = files.tensors.get(POSITIONS)
    if stored is None:
        raise CheckpointError(f"{files.source} holds no {POSITIONS}: it is not a SigLIP checkpoint")
    side = math.isqrt(stored.shape[0])
    if side**2 != stored.shape[0]:
        raise CheckpointError(f"{files.source}: {POSITIONS} has {stored.shape[0]} rows, which is not a square grid")
    return side
