"""The decoder stack: dense layers first, then MoE layers, each kind stacked (K2.5 §3.1)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from k25_jax.config import TextConfig
from k25_jax.models.layers import SwiGLU, declare, ones, rematerialised, rms_norm, swiglu
from k25_jax.models.mla import MLA, absorbed, latents, mla, mla_decode
from k25_jax.models.moe import MoE, moe
from k25_jax.models.rope import rope_tables
from k25_jax.sharding.rules import ENGINE_AXES, engine_laid


class Stats(NamedTuple):
    """What a forward pass observes beside its result."""

    load_YE: jax.Array  # tokens that each expert got; MoE layers only
    max_logit_YH: jax.Array  # the largest attention logit of each head


class Stack(nn.Module):
    """Weights of a stack of decoder layers of one kind."""

    config: TextConfig
    layers: int
    dense: bool

    @nn.compact
    def __call__(self):
        c = self.config
        axis = "layers" if self.dense else "stages"
        declare(self, "attention_norm", (self.layers, c.d_model), (axis, "norm"), ones)
        declare(self, "mlp_norm", (self.layers, c.d_model), (axis, "norm"), ones)
        MLA(c, self.layers, axis, name="attention")()
        if self.dense:
            SwiGLU(c.d_model, c.ffn_dim, self.layers, c.init_std, name="mlp")()
        else:
            MoE(c, self.layers, name="moe")()


class Decoder(nn.Module):
    """Weights of the language model."""

    config: TextConfig

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        declare(self, "embed", (c.vocab_size, c.d_model), ("vocab", "embed"), init)
        if c.dense_layers:
            Stack(c, c.dense_layers, True, name="dense")()
        if c.moe_layers:
            Stack(c, c.moe_layers, False, name="moe")()
        declare(self, "final_norm", (c.d_model,), ("norm",), ones)
        if not c.tie_embeddings:
            declare(self, "head", (c.d_model, c.vocab_size), ("embed", "vocab"), init)


def feed_forward(p, x_BLD, valid_BL, config: TextConfig):
    """Dense or MoE, by what the layer holds: (y_BLD, load_E or None)."""
    if "mlp" in p:
        return swiglu(p["mlp"], x_BLD), None
    return moe(p["moe"], x_BLD, valid_BL, config.moe)


def block(p, x_BLD, rope, segments_BL, config: TextConfig):
    """One decoder layer, training form: (x_BLD, (load_E or None, max_logit_H), latents for a cache)."""
    h_BLD = rms_norm(x_BLD, p["attention_norm"], config.norm_eps)
    attended, max_logit_H, cache = mla(p["attention"], h_BLD, rope, segments_BL, config)
    x_BLD = x_BLD + attended
    h_BLD = rms_norm(x_BLD, p["mlp_norm"], config.norm_eps)
    y_BLD, load_E = feed_forward(p, h_BLD, segments_BL > 0, config)
    return x_BLD + y_BLD, (load_E, max_logit_H), cache


def scan_layers(stack, x_BLD, segments_BL, positions_BL, config: TextConfig, remat: str):
    """The layers of one stack, one after the other: (x_BLD, (load_YE or None, max_logit_YH))."""
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_BL)

    def step(x_BLD, layer):
        x_BLD, observed, _ = block(layer, x_BLD, rope, segments_BL, config)
        return x_BLD, observed

    return jax.lax.scan(rematerialised(step, remat), x_BLD, stack)


def decode(params, x_BLD, segments_BL, positions_BL, config: TextConfig, remat: str = "none", moe_layers=scan_layers):
    """All layers, training form: (x_BLD after the final norm, Stats, what else `moe_layers` returns).

    `moe_layers`, called as `scan_layers` is, runs the MoE stack.
    """
    load_YE, max_logits, more = jnp.zeros((0, config.moe.experts), jnp.int32), [], []
    for name, run in (("dense", scan_layers), ("moe", moe_layers)):
        if name in params:
            x_BLD, (loads, max_logit_YH), *more = run(params[name], x_BLD, segments_BL, positions_BL, config, remat)
            load_YE = load_YE if loads is None else loads
            max_logits.append(max_logit_YH)
    return rms_norm(x_BLD, params["final_norm"], config.norm_eps), Stats(load_YE, jnp.concatenate(max_logits)), *more


def head(params):
    """The matrix from the last hidden state to the vocabulary, [D, V]; the embedding when they are tied."""
    return params["head"] if "head" in params else params["embed"].T


def logits(params, x_BLD):
    """Scores of the vocabulary in float32."""
    return jnp.dot(x_BLD, head(params).astype(x_BLD.dtype), preferred_element_type=jnp.float32)


# ------------------------------------------------------------------------------------------------ with a cache
def _one_by_one(a):
    return [a[i] for i in range(len(a))]


def unstack(params, split=_one_by_one):
    """The same weights with each layer on its own: a list under "layers", so that decoding copies no stack.

    `split` makes a list of its layers of a leaf of a stack.
    """
    layers = []
    for name in ("dense", "moe"):
        if name in params:
            leaves, structure = jax.tree.flatten(params[name])
            layers += [structure.unflatten(layer) for layer in zip(*map(split, leaves), strict=True)]
    return {k: v for k, v in params.items() if k not in ("dense", "moe")} | {"layers": layers}


def prefill(params, x_BLD, segments_BL, positions_BL, config: TextConfig):
    """All layers of unstacked `params` over prompts: (x_BLD after the final norm, [(c_BLR, r_BLK)] a layer)."""
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_BL)
    cache = []
    for layer in params["layers"]:
        x_BLD, _, kept = block(layer, x_BLD, rope, segments_BL, config)
        cache.append(kept)
    return rms_norm(x_BLD, params["final_norm"], config.norm_eps), cache


def decode_step(params, x_B1D, cache, positions_B, config: TextConfig):
    """One token a row: writes its latents at `positions_B`, attends to what came before: (x_B1D, cache)."""
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_B[:, None])
    slots = cache[0][0].shape[1]
    valid_B1S = (jnp.arange(slots)[None, :] <= positions_B[:, None])[:, None]
    write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    valid_B1 = jnp.ones(x_B1D.shape[:2], bool)
    new_cache = []
    for layer, (c_BSR, r_BSK) in zip(params["layers"], cache, strict=True):
        h_B1D = rms_norm(x_B1D, layer["attention_norm"], config.norm_eps)
        c_B1R, r_B1K = latents(layer["attention"], h_B1D, rope, config)
        kept = write(c_BSR, c_B1R, positions_B), write(r_BSK, r_B1K, positions_B)
        x_B1D = x_B1D + mla_decode(layer["attention"], h_B1D, rope, kept, valid_B1S, config)
        h_B1D = rms_norm(x_B1D, layer["mlp_norm"], config.norm_eps)
        x_B1D = x_B1D + feed_forward(layer, h_B1D, valid_B1, config)[0]
        new_cache.append(kept)
    return rms_norm(x_B1D, params["final_norm"], config.norm_eps), new_cache


def paged_step(params, x_ZTD, pools, positions_ZT, write, attend, config: TextConfig):
    """New tokens of any rows and of any number a row, T on each of Z devices: (x_ZTD after the final norm, pools).

    Position -1 says that there is no token. In each layer `write(pool, (c_ZTR, r_ZTK))` gives the pool with the latents of
    the new tokens in it, and `attend(q_ZTHR, q_ZTHK, pool)` the mean latent that each head sees. On the engine's mesh a
    device has its own tokens, but in products with matrices that are shared out over `tensor`: there, those of its row.
    """
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_ZT)
    valid_ZT, new_pools = positions_ZT >= 0, []
    for layer, pool in zip(params["layers"], pools, strict=True):
        h_ZTD = engine_laid(rms_norm(x_ZTD, layer["attention_norm"], config.norm_eps), "expert")
        pool = write(pool, latents(layer["attention"], h_ZTD, rope, config))
        y_ZTD = absorbed(layer["attention"], h_ZTD, rope, lambda *q, pool=pool: attend(*q, pool), config)
        x_ZTD = x_ZTD + engine_laid(y_ZTD, ENGINE_AXES)
        h_ZTD = engine_laid(rms_norm(x_ZTD, layer["mlp_norm"], config.norm_eps), "expert")
        x_ZTD = x_ZTD + engine_laid(feed_forward(layer, h_ZTD, valid_ZT, config)[0], ENGINE_AXES)
        new_pools.append(pool)
    return rms_norm(x_ZTD, params["final_norm"], config.norm_eps), new_pools
