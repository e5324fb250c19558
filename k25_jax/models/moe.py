"""Mixture of experts: sigmoid router with an aux-loss-free bias, dropless routed experts, a shared expert (K2.5 §3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from k25_jax.config import MoEConfig, TextConfig
from k25_jax.models.experts import routed
from k25_jax.models.layers import SwiGLU, declare, swiglu, zeros


class Experts(nn.Module):
    """Weights of a stack of expert sets."""

    config: TextConfig
    layers: int

    @nn.compact
    def __call__(self):
        c, m = self.config, self.config.moe
        init = nn.initializers.normal(c.init_std)
        for name in ("gate", "up"):
            shape = (self.layers, m.experts, c.d_model, m.ffn_dim)
            declare(self, name, shape, ("stages", "expert", "expert_embed", "expert_mlp"), init)
        shape = (self.layers, m.experts, m.ffn_dim, c.d_model)
        declare(self, "down", shape, ("stages", "expert", "expert_mlp", "expert_embed"), init)


class MoE(nn.Module):
    """Weights of a stack of MoE feed-forwards. `router_bias` is moved by the sign rule, never by a gradient."""

    config: TextConfig
    layers: int

    @nn.compact
    def __call__(self):
        c, m = self.config, self.config.moe
        router_init = nn.initializers.normal(c.init_std)
        declare(self, "router", (self.layers, c.d_model, m.experts), ("stages", "router_in", "router_out"), router_init)
        declare(self, "router_bias", (self.layers, m.experts), ("stages", "norm"), zeros)
        Experts(c, self.layers, name="experts")()
        if m.shared_experts:
            SwiGLU(c.d_model, m.ffn_dim * m.shared_experts, self.layers, c.init_std, "stages", name="shared")()


@jax.named_scope("moe.router")
def route(router_DE, bias_E, x_TD, config: MoEConfig):
    """Choose experts by score plus bias, weigh them by the score alone: (weights_TK, experts_TK), float32.

    T may be several axes.
    """
    logits_TE = jnp.dot(x_TD.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest")
    scores_TE = jax.nn.sigmoid(logits_TE)
    choice_TE = jax.lax.stop_gradient(scores_TE + bias_E)
    if config.groups > 1:
        choice_TE = _keep_best_groups(choice_TE, config)
    _, experts_TK = jax.lax.top_k(choice_TE, config.top_k)
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if config.normalise:
        weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_TK * config.scale, experts_TK


def _keep_best_groups(choice_TE, config: MoEConfig):
    """A group's worth is the sum of its two best experts; experts of the other groups cannot be chosen."""
    grouped_TGE = choice_TE.reshape(*choice_TE.shape[:-1], config.groups, -1)
    worth_TG = jax.lax.top_k(grouped_TGE, 2)[0].sum(axis=-1)
    _, best_TG = jax.lax.top_k(worth_TG, config.top_groups)
    kept_TG = jax.nn.one_hot(best_TG, config.groups, dtype=bool).any(axis=-2)
    return jnp.where(kept_TG[..., None], grouped_TGE, -jnp.inf).reshape(choice_TE.shape)


@jax.named_scope("moe")
def moe(p, x_BLD, valid_BL, config: MoEConfig):
    """Dropless MoE feed-forward: (y_BLD, load_E). Padding (valid False) is neither computed nor counted."""
    weights_BLK, experts_BLK = route(p["router"], p["router_bias"], x_BLD, config)
    weights_BLK = jnp.where(valid_BL[..., None], weights_BLK, 0.0)
    experts_BLK = jnp.where(valid_BL[..., None], experts_BLK, config.experts)
    load_E = jnp.bincount(experts_BLK.reshape(-1), length=config.experts)  # padding's number falls outside
    y_BLD = routed(p["experts"], x_BLD, weights_BLK, experts_BLK, load_E, config)
    if "shared" in p:
        y_BLD = y_BLD + swiglu(p["shared"], x_BLD)
    return y_BLD, load_E


def balanced_bias(bias_YE, load_YE, rate: float):
    """The sign rule: raise the bias of experts below the mean load, lower it above (aux-loss-free balancing)."""
    load_YE = load_YE.astype(jnp.float32)
    return bias_YE + rate * jnp.sign(load_YE.mean(axis=-1, keepdims=True) - load_YE)
