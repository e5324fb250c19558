"""MuonClip: Muon for matrices, AdamW for the rest, and QK-Clip after the step (K2.5 §3.3, from K2).

Each array is read once and written in place. With `optim.name = "adamw"` there are no matrices, and all is AdamW.
Running means may lie in the hosts' memory (`optim.offload`). Each array is fetched and sent back for itself, so that the
compiler has as many of them on the device at a time as it finds room for.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from k25_jax.config import OptimConfig, TextConfig
from k25_jax.optim.newton_schulz import newton_schulz, sharded_newton_schulz
from k25_jax.optim.schedules import warmup_stable_decay

RMS = 0.2  # of an update's entries, before the learning rate: as AdamW's, so that the two share one rate

# Which weights are matrices for Muon, by the last key of their path, and how each becomes a stack "... rows columns". All
# heads of a layer make one matrix, as in the public checkpoint; query, key and value of the vision encoder make three.
MATRIX = dict.fromkeys("q_a kv_a gate up down fc0 fc1".split(), "... r c -> ... r c") | {
    "q": "y r h k -> y r (h k)",
    "q_b": "y r h k -> y r (h k)",
    "k_b": "y r h k -> y r (h k)",
    "v_b": "y r h k -> y r (h k)",
    "o": "y h k c -> y (h k) c",
    "out": "y h k c -> y (h k) c",
    "qkv": "y r t h k -> y t r (h k)",
}


class OptimState(NamedTuple):
    """Steps taken, running means of gradients and, where AdamW rules, of their squares (else an empty place)."""

    count: jax.Array
    mu: dict
    nu: dict


def muonclip(config: OptimConfig, steps: int, shardings=None) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of `steps` steps; gradients are clipped by their global norm, and only matrices decay.

    `shardings` are those of the parameters; without them every device makes every matrix orthogonal. `update` takes
    the norm of the gradients, which the caller logs anyway, and `finite`: where that is false the updates are zero and
    the state stays as it was, whatever the gradients hold.
    """
    rate = warmup_stable_decay(config, steps)

    def init(params):
        nu = jax.tree.map(
            lambda a, form: jnp.zeros(()) if form else jnp.zeros_like(a), params, matrices(params, config)
        )
        return OptimState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), nu)

    def update(grads, state, params, *, grad_norm, finite):
        clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-30))
        count = jnp.where(finite, state.count + 1, state.count)
        forms = matrices(params, config)

        def mean(old, new, decay):
            return jnp.where(finite, decay * old + (1 - decay) * new, old)

        taken = jnp.maximum(count, 1).astype(jnp.float32)
        step_size = -rate(state.count)

        def one(param, g, m, v, form, decayed, sharding):
            m, v = jax.device_put((m, v), jax.memory.Space.Device)
            m = mean(m, g * clip, config.momentum if form else config.b1)
            v = v if form else mean(v, jnp.square(g * clip), config.b2)
            m, v = jax.lax.optimization_barrier((m, v))  # or else XLA computes them twice, from copies of the old ones
            if form:
                direction = _muon_direction(m, g * clip, taken, form, sharding, config)
            else:
                direction = _adam_direction(m, v, taken, config)
            decay = config.weight_decay if decayed else 0.0
            return jnp.where(finite, step_size * (direction + decay * param), -0.0), m, v  # x + -0.0 is x, bit for bit

        layouts = jax.tree.map(lambda _: None, params) if shardings is None else shardings
        out = jax.tree.map(one, params, grads, state.mu, state.nu, forms, decays(params), layouts)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), out)
        return updates, OptimState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.named_scope("optimizer.adam")
def _adam_direction(m, v, taken, config: OptimConfig):
    mu_scale, nu_scale = 1 / (1 - config.b1**taken), 1 / (1 - config.b2**taken)
    return m * mu_scale / (jnp.sqrt(v * nu_scale) + config.eps)


@jax.named_scope("optimizer.muon")
def _muon_direction(m, g, taken, form: str, sharding: NamedSharding | None, config: OptimConfig):
    """Nesterov's momentum made orthogonal, its entries of root mean square about RMS whatever the matrix's shape."""
    b = config.momentum
    ahead = b * m / (1 - b ** (taken + 1)) + (1 - b) * g / (1 - b**taken)
    stack = rearrange(ahead, form)
    rows, columns = stack.shape[-2:]
    dtype = jnp.dtype(config.muon_dtype)
    if sharding is None or sharding.mesh.size == 1:
        orthogonal = newton_schulz(stack, dtype)
    else:
        orthogonal = sharded_newton_schulz(stack, stacked_sharding(sharding, form), dtype)
    return _as_before(orthogonal * (RMS * math.sqrt(max(rows, columns))), form, ahead.shape)


def stacked_sharding(sharding: NamedSharding, form: str) -> NamedSharding:
    """The layout of `rearrange(a, form)` when `a` has `sharding`; axes that are merged are split by the first alone."""
    before, after = form.split(" -> ")
    if "..." in before:
        return sharding
    names = before.split()
    entries = dict(zip(names, (*sharding.spec, *[None] * len(names)), strict=False))
    groups = re.findall(r"\([^)]*\)|\S+", after)
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries[group.strip("()").split()[0]] for group in groups)))


def _as_before(stack, form: str, shape):
    """Undo `rearrange(_, form)`."""
    before, after = form.split(" -> ")
    names = before.split()
    sizes = dict(zip(names, shape, strict=True)) if "..." not in names else {}
    sizes = {name: size for name, size in sizes.items() if name in ("h", "k")}
    return rearrange(stack, f"{after} -> {before}", **sizes)


def matrices(params, config: OptimConfig):
    """For each weight the form in which Muon takes it as a stack of matrices, or "" where AdamW rules.

    AdamW rules embeddings (of tokens and of patches), the head, norms, biases, the router and the position table.
    """

    def form(path, _):
        return MATRIX.get(path[-1].key, "") if config.name == "muonclip" else ""

    return jax.tree_util.tree_map_with_path(form, params)


def decays(params):
    """True for matrices; norms, biases and the position table are not pulled to zero."""

    def is_matrix(path, _):
        name = path[-1].key
        return not ("norm" in name or "bias" in name or name in ("scale", "pos_table"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


@jax.named_scope("optimizer.qk_clip")
def qk_clip(params, max_logit_YH, config: TextConfig, threshold: float):
    """(params, heads clipped): each head whose largest attention logit exceeds `threshold` scaled back to it.

    `max_logit_YH` is over the batch, dense layers first. With gamma = min(1, threshold / max): the head's part of the
    query without rotation and of the key by sqrt(gamma), its rotary query by gamma; the rotary key, which all heads
    share, and the values stay. Then every logit of that head is scaled by exactly gamma (K2.5 §3.3, from K2).
    """
    gamma_YH = jnp.minimum(1.0, threshold / jnp.maximum(max_logit_YH, 1e-30))
    params, first = dict(params), 0
    for stack in ("dense", "moe"):
        if stack in params:
            layers = params[stack]["attention_norm"].shape[0]
            attention = _clipped(params[stack]["attention"], gamma_YH[first : first + layers], config)
            params[stack] = params[stack] | {"attention": attention}
            first += layers
    return params, jnp.sum(gamma_YH < 1)


def _clipped(p, gamma_YH, config: TextConfig):
    gamma_YRHK = gamma_YH[:, None, :, None]
    without_rotation = jnp.arange(config.qk_dim) < config.qk_nope_dim
    factor_YRHK = jnp.where(without_rotation, jnp.sqrt(gamma_YRHK), gamma_YRHK)
    query = "q_b" if "q_b" in p else "q"
    return p | {query: p[query] * factor_YRHK, "k_b": p["k_b"] * jnp.sqrt(gamma_YRHK)}
