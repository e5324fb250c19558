"""Kimi K2.5: vision features spliced into the token stream of the language model (K2.5 §3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from k25_jax.config import K25Config
from k25_jax.data.packing import Batch
from k25_jax.models import decoder
from k25_jax.models.decoder import Decoder
from k25_jax.models.embedding import lookup, rows_of
from k25_jax.models.layers import rematerialised
from k25_jax.models.moonvit3d import MoonViT3D, encode
from k25_jax.models.projector import Projector, project
from k25_jax.vision.patchpack import VisionPack


class K25(nn.Module):
    """Declares every parameter of the model; `init_params` and `abstract_params` give the plain tree."""

    config: K25Config

    @nn.compact
    def __call__(self):
        Decoder(self.config.text, name="text")()
        MoonViT3D(self.config.vision, name="vision")()
        Projector(self.config, name="projector")()


def _declared(config: K25Config, key):
    tree = K25(config).init(key)["params"]
    return {**tree["text"], "vision": tree["vision"], "projector": tree["projector"]}


def init_params(config: K25Config, key):
    """A fresh parameter tree, float32."""
    return nn.unbox(_declared(config, key))


def abstract_params(config: K25Config):
    """The parameter tree as shapes and dtypes; allocates nothing."""
    return nn.unbox(jax.eval_shape(lambda: _declared(config, jax.random.key(0))))


def logical_axes(config: K25Config):
    """The parameter tree as PartitionSpecs of logical axis names (sharding/rules.py maps them to mesh axes)."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _declared(config, jax.random.key(0))))


def vision_features(params, packs: VisionPack, config: K25Config, remat: str = "none", dtype=jnp.float32):
    """Encoder and projector, one pack after the other: one row per token of every pack, [P * M, D].

    `remat` is that of each pack as a whole. Under "full" the backward pass is left nothing beyond the arguments.
    """

    def one_pack(pack):
        pooled = encode(params["vision"], pack, config.vision, dtype, one_at_a_time=remat == "full")
        return project(params["projector"], pooled, config)

    features_PMD = jax.lax.map(rematerialised(one_pack, remat), packs)
    return features_PMD.reshape(-1, features_PMD.shape[-1])


@jax.named_scope("embed")
def embed(params, tokens, config: K25Config, dtype=None):
    """Token embeddings in `dtype`, or that of the table.

    A media_pad with no image behind it reads as token 0, as in the public implementation.
    """
    tokens = jnp.where(tokens == config.media_pad_id, 0, tokens)
    return lookup(params["embed"], tokens, params["embed"].dtype if dtype is None else dtype)


def splice(params, tokens_BL, media_BL, features_MD, config: K25Config, dtype=None):
    """Token embeddings, with vision feature media_BL[b, l] in its place where that is not -1."""
    vision_BLD = None
    if features_MD is not None:
        vision_BLD = rows_of(features_MD, jnp.maximum(media_BL, 0), features_MD.dtype)
    return overlay(params, tokens_BL, media_BL, vision_BLD, config, dtype)


def overlay(params, tokens_BL, media_BL, vision_BLD, config: K25Config, dtype=None):
    """Token embeddings, with vision_BLD in their place where media_BL is not -1."""
    embedded = embed(params, tokens_BL, config, dtype)
    if vision_BLD is None:
        return embedded
    return jnp.where(media_BL[..., None] >= 0, vision_BLD.astype(embedded.dtype), embedded)


def embedded(params, batch: Batch, config: K25Config, remat="none", dtype=jnp.float32):
    """What the decoder reads, [B,L,D] in `dtype`: embeddings of tokens, features of images in their places."""
    features_MD = None
    if batch.vision.patches_PNC.shape[0]:
        features_MD = vision_features(params, batch.vision, config, remat, dtype)
    return splice(params, batch.tokens_BL, batch.media_BL, features_MD, config, dtype)


def forward(params, batch: Batch, config: K25Config):
    """Logits of every position, [B, L, V] float32."""
    x_BLD = embedded(params, batch, config)
    x_BLD, *_ = decoder.decode(params, x_BLD, batch.segments_BL, batch.positions_BL, config.text)
    return decoder.logits(params, x_BLD)


KEPT = "router", "norm", "bias", "pos_table"  # float32 in any case: little memory, and read in float32


def cast(params, dtype):
    """Weights of products, and the embedding, in `dtype`, for use without gradients; KEPT stay as they are."""

    def leaf(path, a):
        return a if any(name in str(key) for key in path for name in KEPT) else a.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)
