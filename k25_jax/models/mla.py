"""Multi-head latent attention, training form and absorbed-latent decoding form (K2.5 §3.1)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k25_jax.config import TextConfig
from k25_jax.kernels.attention import attention
from k25_jax.models.context import attend_over_context, context_shares
from k25_jax.models.layers import declare, ones, rms_norm, zeros
from k25_jax.models.masters import biased, product
from k25_jax.models.rope import rotate, softmax_scale
from k25_jax.sharding.rules import row_axes

LATENT_EPS = 1e-6  # of the norms on the two latents, whatever text.norm_eps is (as in the public model)


class MLA(nn.Module):
    """Weights of a stack of MLA layers."""

    config: TextConfig
    layers: int
    axis: str = "layers"  # logical name of the stack's axis

    @nn.compact
    def __call__(self):
        c, y, axis = self.config, self.layers, self.axis
        init = nn.initializers.normal(c.init_std)
        if c.q_lora_rank:
            declare(self, "q_a", (y, c.d_model, c.q_lora_rank), (axis, "embed", "latent"), init)
            declare(self, "q_a_norm", (y, c.q_lora_rank), (axis, "norm"), ones)
            declare(self, "q_b", (y, c.q_lora_rank, c.heads, c.qk_dim), (axis, "latent", "heads", "head_dim"), init)
        else:
            declare(self, "q", (y, c.d_model, c.heads, c.qk_dim), (axis, "embed", "heads", "head_dim"), init)
        declare(self, "kv_a", (y, c.d_model, c.kv_lora_rank + c.qk_rope_dim), (axis, "embed", "latent"), init)
        declare(self, "kv_a_norm", (y, c.kv_lora_rank), (axis, "norm"), ones)
        for name, dim in (("k_b", c.qk_nope_dim), ("v_b", c.v_dim)):
            declare(self, name, (y, c.kv_lora_rank, c.heads, dim), (axis, "latent", "heads", "head_dim"), init)
        declare(self, "o", (y, c.heads, c.v_dim, c.d_model), (axis, "heads", "head_dim", "embed"), init)
        if c.attention_bias:
            if c.q_lora_rank:
                declare(self, "q_a_bias", (y, c.q_lora_rank), (axis, "norm"), zeros)
            declare(self, "kv_a_bias", (y, c.kv_lora_rank + c.qk_rope_dim), (axis, "norm"), zeros)
            declare(self, "o_bias", (y, c.d_model), (axis, "norm"), zeros)


def queries(p, x_BLD, rope, config: TextConfig):
    """Queries, their rotary part turned: (q_nope_BLHK, q_rope_BLHK)."""
    if config.q_lora_rank:
        latent_BLR = product("bld,dr->blr", x_BLD, p["q_a"])
        if "q_a_bias" in p:
            latent_BLR = biased(latent_BLR, p["q_a_bias"])
        q_BLHK = product("blr,rhk->blhk", rms_norm(latent_BLR, p["q_a_norm"], LATENT_EPS), p["q_b"])
    else:
        q_BLHK = product("bld,dhk->blhk", x_BLD, p["q"])
    q_nope, q_rope = jnp.split(q_BLHK, [config.qk_nope_dim], axis=-1)
    cos, sin = rope
    return q_nope, rotate(q_rope, cos[:, :, None], sin[:, :, None])


def latents(p, x_BLD, rope, config: TextConfig):
    """What a cache holds of each token: the normed latent c_BLR and the shared rotary key r_BLK, turned."""
    kv_BLR = product("bld,dr->blr", x_BLD, p["kv_a"])
    if "kv_a_bias" in p:
        kv_BLR = biased(kv_BLR, p["kv_a_bias"])
    c_BLR, r_BLK = jnp.split(kv_BLR, [config.kv_lora_rank], axis=-1)
    return rms_norm(c_BLR, p["kv_a_norm"], LATENT_EPS), rotate(r_BLK, *rope)


@jax.named_scope("attention")
def mla(p, x_BLD, rope, segments_BL, config: TextConfig):
    """Training form: keys and values are expanded from the latent; causal inside each segment.

    Returns (x_BLD, the largest attention logit of each head, the latents (c_BLR, r_BLK) for a cache).
    """
    q_nope, q_rope = queries(p, x_BLD, rope, config)
    c_BLR, r_BLK = latents(p, x_BLD, rope, config)
    q_BLHK = jnp.concatenate([q_nope, q_rope], axis=-1)
    attend = attend_over_context if context_shares() > 1 else attend_in_rows
    out_BLHK, max_logit_H = attend(p, q_BLHK, c_BLR, r_BLK, segments_BL, softmax_scale(config))
    return _output(p, out_BLHK), max_logit_H, (c_BLR, r_BLK)


def attend_in_rows(p, q_BLHK, c_BLR, r_BLK, segments_BL, scale: float):
    """Causal attention of whole rows: (out_BLHK, the largest logit of each head).

    In a mesh each device takes its own rows. Left to the compiler, the gradients of the keys were held for all rows.
    """
    k_nope = product("blr,rhk->blhk", c_BLR, p["k_b"])
    v_BLHK = product("blr,rhk->blhk", c_BLR, p["v_b"])
    r_BLHK = jnp.broadcast_to(r_BLK[:, :, None], (*k_nope.shape[:3], r_BLK.shape[-1]))
    k_BLHK = jnp.concatenate([k_nope, r_BLHK], axis=-1)
    axes = row_axes(len(q_BLHK))
    if not axes:
        return attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, scale=scale, causal=True)

    def on_one_device(*own):
        out_BLHK, max_logit_H = attention(*own, scale=scale, causal=True)
        return out_BLHK, jax.lax.pmax(jax.lax.stop_gradient(max_logit_H), axes)

    rows, mesh = PartitionSpec(axes), jax.sharding.get_abstract_mesh()
    manual = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        on_one_device, in_specs=rows, out_specs=(rows, PartitionSpec()), axis_names=manual, check_vma=False
    )(q_BLHK, k_BLHK, v_BLHK, segments_BL)


def mla_decode(p, x_BLD, rope, cache, valid_BLS, config: TextConfig):
    """Decoding form over one cache a row: `cache` is (c_BSR, r_BSK) with the new tokens already written.

    `valid_BLS` says which slots each query may see.
    """
    c_BSR, r_BSK = cache

    def attend(q_BLHR, q_BLHK):
        in_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = in_float32("blhr,bsr->bhls", q_BLHR, c_BSR) + in_float32("blhk,bsk->bhls", q_BLHK, r_BSK)
        scores = jnp.where(valid_BLS[:, None], scores * softmax_scale(config), -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(x_BLD.dtype)
        return jnp.einsum("bhls,bsr->blhr", weights, c_BSR)

    return absorbed(p, x_BLD, rope, attend, config)


def absorbed(p, x_BLD, rope, attend, config: TextConfig):
    """Decoding form: keys and values are never expanded; queries and outputs pass through the latent instead.

    `attend(q_BLHR, q_BLHK)`, the latent and the rotary part of the queries, gives the mean latent that each head sees.
    """
    q_nope, q_rope = queries(p, x_BLD, rope, config)
    out_BLHR = attend(product("blhk,rhk->blhr", q_nope, p["k_b"]), q_rope)
    return _output(p, product("blhr,rhk->blhk", out_BLHR, p["v_b"]))


def _output(p, out_BLHK):
    y_BLD = product("blhk,hkd->bld", out_BLHK, p["o"])
    return biased(y_BLD, p["o_bias"]) if "o_bias" in p else y_BLD
