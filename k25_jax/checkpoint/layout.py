"""Which tensor of the public files is which leaf of the parameter tree (K2.5 §3.1, §3.2).

`TABLE` has a row for each kind of tensor, with how its axes are turned; reading, checking and writing all follow it.
Names are the public ones; what `transformers` writes, and a language model alone, has others (`ALIASES`).
"""

import dataclasses
import math
import re

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from k25_jax.config import K25Config
from k25_jax.models.k25 import abstract_params

VECTOR, MATRIX = "d -> d", "o i -> i o"  # axes in the file -> axes of one layer (and expert) of the leaf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the files, one for each layer and expert if its name says so, and the leaf of the tree that it is.

    Where it is two leaves, it holds them joined along their last axis.
    """

    name: str
    leaves: str
    axes: str = VECTOR
    encodings: tuple[str, ...] = ()  # how `save_params` may quantise it
    float32: bool = False  # written in float32, whatever the dtype of the rest


def _table() -> tuple[Tensor, ...]:
    layer, block = "language_model.model.layers.{layer}.", "vision_tower.encoder.blocks.{layer}."
    experts = layer + "mlp.experts.{expert}."
    fp8, any_encoding = ("fp8",), ("fp8", "int4")
    tensors = [Tensor("language_model.model.embed_tokens.weight", "embed", "v d -> v d")]
    for stack in ("dense", "moe"):
        attention, leaf = layer + "self_attn.", f"{stack}/attention/"
        tensors += [
            Tensor(layer + "input_layernorm.weight", f"{stack}/attention_norm"),
            Tensor(attention + "q_proj.weight", leaf + "q", "(h d) i -> i h d", fp8),
            Tensor(attention + "q_a_proj.weight", leaf + "q_a", MATRIX, fp8),
            Tensor(attention + "q_a_proj.bias", leaf + "q_a_bias"),
            Tensor(attention + "q_a_layernorm.weight", leaf + "q_a_norm"),
            Tensor(attention + "q_b_proj.weight", leaf + "q_b", "(h d) i -> i h d", fp8),
            Tensor(attention + "kv_a_proj_with_mqa.weight", leaf + "kv_a", MATRIX, fp8),
            Tensor(attention + "kv_a_proj_with_mqa.bias", leaf + "kv_a_bias"),
            Tensor(attention + "kv_a_layernorm.weight", leaf + "kv_a_norm"),
            Tensor(attention + "kv_b_proj.weight", f"{leaf}k_b {leaf}v_b", "(h d) i -> i h d", fp8),
            Tensor(attention + "o_proj.weight", leaf + "o", "o (h d) -> h d o", fp8),
            Tensor(attention + "o_proj.bias", leaf + "o_bias"),
            Tensor(layer + "post_attention_layernorm.weight", f"{stack}/mlp_norm"),
        ]
    tensors += [
        Tensor(layer + "mlp.gate.weight", "moe/moe/router", MATRIX),
        Tensor(layer + "mlp.gate.e_score_correction_bias", "moe/moe/router_bias", float32=True),
    ]
    for part in ("gate", "up", "down"):
        tensors += [
            Tensor(f"{layer}mlp.{part}_proj.weight", f"dense/mlp/{part}", MATRIX, fp8),
            Tensor(f"{layer}mlp.shared_experts.{part}_proj.weight", f"moe/moe/shared/{part}", MATRIX, fp8),
            Tensor(f"{experts}{part}_proj.weight", f"moe/moe/experts/{part}", MATRIX, any_encoding),
        ]
    tensors += [
        Tensor("language_model.model.norm.weight", "final_norm"),
        Tensor("language_model.lm_head.weight", "head", MATRIX),
        Tensor("vision_tower.patch_embed.proj.weight", "vision/patch_embed/kernel", "o c h w -> (c h w) o"),
        Tensor("vision_tower.patch_embed.proj.bias", "vision/patch_embed/bias"),
        Tensor("vision_tower.patch_embed.pos_emb.weight", "vision/pos_table", "y x d -> y x d"),
        Tensor(block + "wqkv.weight", "vision/blocks/qkv", "(t h d) i -> i t h d"),
        Tensor(block + "wqkv.bias", "vision/blocks/qkv_bias", "(t h d) -> t h d"),
        Tensor(block + "wo.weight", "vision/blocks/out", "o (h d) -> h d o"),
        Tensor(block + "wo.bias", "vision/blocks/out_bias"),
    ]
    for layer_norm, leaf in (
        (block + "norm0", "vision/blocks/norm0"),
        (block + "norm1", "vision/blocks/norm1"),
        ("vision_tower.encoder.final_layernorm", "vision/final_norm"),
        ("mm_projector.pre_norm", "projector/norm"),
    ):
        tensors += [Tensor(layer_norm + ".weight", leaf + "/scale"), Tensor(layer_norm + ".bias", leaf + "/bias")]
    for linear, leaf in (
        (block + "mlp.fc0", "vision/blocks/fc0"),
        (block + "mlp.fc1", "vision/blocks/fc1"),
        ("mm_projector.proj.0", "projector/fc0"),
        ("mm_projector.proj.2", "projector/fc1"),
    ):
        tensors += [Tensor(linear + ".weight", leaf, MATRIX), Tensor(linear + ".bias", leaf + "_bias")]
    return tuple(tensors)


TABLE = _table()


# beginnings of names in other layouts -> the public ones
ALIASES = (
    ("language_model.model.blocks.", "language_model.model.layers."),  # transformers
    ("model.mm_projector.", "mm_projector."),
    ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ("model.layers.", "language_model.model.layers."),  # a language model alone
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
VISION = ("vision_tower.", "mm_projector.")
LANGUAGE = "language_model."  # in a language model alone, names have no such beginning


def public_name(name: str) -> str:
    """The public name of a tensor, whichever layout it was stored in."""
    for other, public in ALIASES:
        if name.startswith(other):
            return public + name[len(other) :]
    return name


@dataclasses.dataclass(frozen=True)
class Bound:
    """A row of the table in a model of known size.

    A `place` says which layer and expert of the stacked leaf: (), (y,) or (y, e).
    """

    tensor: Tensor
    leaves: dict[str, tuple[int, ...]]  # path in the tree -> shape
    stack: tuple[int, ...]  # leading sizes of the leaves: layers, experts
    first_layer: int  # number of layer y = 0 in the names
    lengths: dict[str, int]  # sizes of the axes that `tensor.axes` names
    shape: tuple[int, ...]  # in the files

    def name(self, place: tuple[int, ...]) -> str:
        layer, expert = (*place, 0, 0)[:2]
        return self.tensor.name.format(layer=self.first_layer + layer, expert=expert)

    def to_leaf(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, self.tensor.axes, **self.lengths)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, " -> ".join(reversed(self.tensor.axes.split(" -> "))), **self.lengths)


def axes_of(tensor: Tensor) -> tuple[list[str], list[str]]:
    """The axes in the file and in the leaf: "(h d) i -> i h d" gives ["(h d)", "i"], ["i", "h", "d"]."""
    before, after = (re.findall(r"\([^)]*\)|\w+", side) for side in tensor.axes.split(" -> "))
    return before, after


def bind(config: K25Config, text_only: bool = False) -> list[Bound]:
    """The rows of the table that a model of this config has."""
    tree = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    if text_only:
        tree = {path: shape for path, shape in tree.items() if not path.startswith(("vision/", "projector/"))}
    rows = []
    for tensor in TABLE:
        leaves = {path: tree[path] for path in tensor.leaves.split() if path in tree}
        if not leaves:
            continue
        count = tensor.name.count("{")
        *shapes, last = (shape[count:] for shape in leaves.values())
        joined = (*last[:-1], last[-1] + sum(shape[-1] for shape in shapes))
        before, after = axes_of(tensor)
        lengths = {"c": 3, "h": config.vision.patch_size, "w": config.vision.patch_size}
        lengths |= dict(zip(after, joined, strict=True))
        groups = [axis.strip("()").split() for axis in before]
        rows.append(
            Bound(
                tensor,
                leaves,
                stack=leaves[next(iter(leaves))][:count],
                first_layer=config.text.dense_layers if tensor.leaves.startswith("moe/") else 0,
                lengths={name: lengths[name] for group in groups for name in group},
                shape=tuple(math.prod(lengths[name] for name in group) for group in groups),
            )
        )
    return rows


def read_apart(config: K25Config) -> dict[str, tuple[int, ...]]:
    """For the arrays of a run's state that are too large to be read whole, the axes along which parts are wanted alone."""
    rows = [bound for bound in bind(config) if len(bound.stack) > 1]  # experts
    return {f"params/{path}": tuple(range(len(bound.stack))) for bound in rows for path in bound.leaves}
