"""The optimizer against arithmetic by hand and against optax, what it decays, what a bad step changes, and QK-Clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from k25_jax.config import PRESETS, OptimConfig, preset
from k25_jax.models.k25 import abstract_params
from k25_jax.models.mla import latents, queries
from k25_jax.models.rope import rope_tables, softmax_scale
from k25_jax.optim.muonclip import decays, matrices, muonclip, qk_clip
from k25_jax.optim.newton_schulz import newton_schulz
from k25_jax.optim.schedules import warmup_stable_decay

CONFIG = OptimConfig(
    peak_lr=0.1, end_lr=0.02, warmup_steps=2, decay_steps=4, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.25, clip_norm=2.0
)
MATRICES = set(
    "embed head q q_a q_b kv_a k_b v_b o gate up down router kernel qkv out fc0 fc1".split()
)  # everything else is a norm, a bias or the position table


def rate_by_hand(step: int, steps: int) -> float:
    """Two steps of warm-up, then 0.1, and a cosine to 0.02 over the last four."""
    warm = min(1.0, (step + 1) / 2)
    progress = min(max((step - (steps - 4)) / 4, 0), 1)
    return warm * (0.02 + 0.08 * (1 + np.cos(np.pi * progress)) / 2)


def test_the_update_is_clipped_adamw_by_hand():
    rng, steps = np.random.default_rng(0), 8
    params = {"w": rng.normal(size=(3, 2)), "norm": rng.normal(size=3), "fc0_bias": rng.normal(size=2)}
    optimizer = muonclip(CONFIG, steps)
    ours = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    opt_state, update = optimizer.init(ours), jax.jit(optimizer.update)
    mean, square = ({name: 0.0 for name in params} for _ in range(2))
    for step in range(steps):
        grads = {name: rng.normal(size=a.shape) * (5 if step % 2 else 0.1) for name, a in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        grads_32 = jax.tree.map(jnp.float32, grads)
        updates, opt_state = update(grads_32, opt_state, ours, grad_norm=jnp.float32(norm), finite=True)
        ours = jax.tree.map(jnp.add, ours, updates)
        for name, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            mean[name] = 0.8 * mean[name] + 0.2 * grad
            square[name] = 0.9 * square[name] + 0.1 * grad**2
            adam = (mean[name] / (1 - 0.8 ** (step + 1))) / (np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-6)
            decay = 0.25 * params[name] if name == "w" else 0.0
            params[name] = params[name] - rate_by_hand(step, steps) * (adam + decay)
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}")


def test_equals_optax():
    rng, steps = np.random.default_rng(1), 12
    params = {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "scale": jnp.ones(4)}
    ours, optimizer = params, muonclip(CONFIG, steps)
    rate = warmup_stable_decay(CONFIG, steps)
    peer = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(rate, CONFIG.b1, CONFIG.b2, CONFIG.eps, weight_decay=CONFIG.weight_decay, mask=decays),
    )
    update, peer_update = jax.jit(optimizer.update), jax.jit(peer.update)
    state, peer_state = optimizer.init(params), peer.init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), params)
        updates, state = update(grads, state, ours, grad_norm=optax.tree.norm(grads), finite=True)
        ours = optax.apply_updates(ours, updates)
        updates, peer_state = peer_update(grads, peer_state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_no_bit():
    params = {"w": jnp.asarray([[0.0, -0.0, 1.5, -2.0]])}
    optimizer = muonclip(CONFIG, 8)
    grads = {"w": jnp.asarray([[jnp.nan, 1.0, jnp.inf, 0.0]])}
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(grads, state, params, grad_norm=jnp.nan, finite=False)
    assert np.asarray(optax.apply_updates(params, updates)["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_decay_and_nothing_else(name):
    params = abstract_params(preset(name))
    mask = decays(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for path, decay in jax.tree_util.tree_leaves_with_path(mask):
        assert decay == (path[-1].key in MATRICES), jax.tree_util.keystr(path)


# ----------------------------------------------------------------------------------------------------------------- Muon
MUON = dataclasses.replace(CONFIG, name="muonclip", muon_dtype="float32")
SHAPES = {  # a weight of every form, with the axes that Muon contracts over and those it gives out
    "gate": ((2, 3, 6, 4), (2, 3)),
    "kv_a": ((2, 5, 7), (1, 2)),
    "q_b": ((2, 5, 2, 4), (1, (2, 3))),
    "q": ((1, 6, 3, 2), (1, (2, 3))),
    "o": ((2, 3, 2, 8), ((1, 2), 3)),
    "out": ((2, 2, 2, 4), ((1, 2), 3)),
    "qkv": ((2, 6, 3, 2, 3), (1, (3, 4))),
    "fc1": ((9, 3), (0, 1)),
}


def test_muon_equals_optax():
    rng, steps = np.random.default_rng(2), 7
    draw = lambda: {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, (shape, _) in SHAPES.items()}  # noqa: E731
    peers = ours = draw()
    axes = {name: optax.contrib.MuonDimensionNumbers(*axes) for name, (_, axes) in SHAPES.items()}
    optimizer = muonclip(MUON, steps)
    peer = optax.chain(
        optax.clip_by_global_norm(MUON.clip_norm),
        optax.contrib.muon(
            warmup_stable_decay(MUON, steps), beta=MUON.momentum, weight_decay=MUON.weight_decay,
            consistent_rms=0.2, muon_weight_dimension_numbers=axes,
        ),
    )  # fmt: skip
    update, peer_update = jax.jit(optimizer.update), jax.jit(peer.update)
    state, peer_state = optimizer.init(ours), peer.init(peers)
    assert all(a.shape == () for a in state.nu.values()), "Muon keeps no squares"
    for step in range(steps):
        grads = jax.tree.map(lambda a, size=10.0 ** (step % 3 - 2): a * size, draw())
        updates, state = update(grads, state, ours, grad_norm=optax.tree.norm(grads), finite=True)
        ours = optax.apply_updates(ours, updates)
        updates, peer_state = peer_update(grads, peer_state, peers)
        peers = optax.apply_updates(peers, updates)
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], peers[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, step {step}")


def test_newton_schulz_brings_singular_values_near_one_in_bfloat16_too():
    rng = np.random.default_rng(3)
    for shape in ((2, 40, 60), (3, 60, 40)):
        for dtype in (jnp.float32, jnp.bfloat16):
            out = newton_schulz(jnp.asarray(rng.normal(size=shape) * 1e-3, jnp.float32), dtype)
            values = np.linalg.svd(np.asarray(out), compute_uv=False)
            assert out.dtype == jnp.float32 and 0.5 < values.min() and values.max() < 1.35, (shape, dtype)


@pytest.mark.parametrize("name", PRESETS)
def test_muon_takes_the_matrices_and_adamw_the_rest(name):
    params = abstract_params(preset(name))
    for path, form in jax.tree_util.tree_leaves_with_path(matrices(params, MUON)):
        name = path[-1].key
        assert bool(form) == (name in MATRICES - {"embed", "head", "router", "kernel"}), jax.tree_util.keystr(path)
    assert not any(jax.tree.leaves(matrices(params, CONFIG))), "AdamW alone"


def test_a_bad_step_changes_no_bit_of_muon():
    params = {"gate": jnp.asarray([[0.0, -0.0, 1.5, -2.0]])}
    optimizer = muonclip(MUON, 8)
    state = optimizer.init(params)
    grads = {"gate": jnp.asarray([[jnp.nan, 1.0, jnp.inf, 0.0]])}
    updates, after = jax.jit(optimizer.update)(grads, state, params, grad_norm=jnp.nan, finite=False)
    assert np.asarray(optax.apply_updates(params, updates)["gate"]).tobytes() == np.asarray(params["gate"]).tobytes()
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(after)))


# -------------------------------------------------------------------------------------------------------------- QK-Clip
def scores_of(p, h_BLD, text):
    """Every scaled attention logit [B,H,L,L] of one layer, masks aside."""
    rope = rope_tables(text.rope, text.qk_rope_dim, jnp.arange(h_BLD.shape[1])[None])
    q_nope, q_rope = queries(p, h_BLD, rope, text)
    c_BLR, r_BLK = latents(p, h_BLD, rope, text)
    scores = jnp.einsum("blhk,bsr,rhk->bhls", q_nope, c_BLR, p["k_b"]) + jnp.einsum("blhk,bsk->bhls", q_rope, r_BLK)
    return scores * softmax_scale(text)


@pytest.mark.parametrize("q_lora_rank", [48, 0])
def test_qk_clip_scales_every_logit_of_a_head_by_gamma(q_lora_rank):
    text = dataclasses.replace(preset("tiny").text, q_lora_rank=q_lora_rank)
    config = dataclasses.replace(preset("tiny"), text=text)
    params = reference.random_params(config, std=0.05)
    max_logit_YH = jnp.asarray(np.random.default_rng(4).uniform(20, 180, (text.layers, text.heads)))
    clipped, count = qk_clip(params, max_logit_YH, text, 100.0)
    gamma_YH = np.minimum(1, 100 / np.asarray(max_logit_YH))
    assert count == (gamma_YH < 1).sum() > 0 and (gamma_YH == 1).any()
    h_BLD = jax.random.normal(jax.random.key(1), (2, 9, text.d_model))
    for layer in range(text.layers):
        stack, y = ("dense", layer) if layer < text.dense_layers else ("moe", layer - text.dense_layers)
        before, after = (jax.tree.map(lambda a, y=y: a[y], p[stack]["attention"]) for p in (params, clipped))
        want = scores_of(before, h_BLD, text) * gamma_YH[layer][None, :, None, None]
        np.testing.assert_allclose(scores_of(after, h_BLD, text), want, rtol=1e-5, atol=1e-6)
        for name in before.keys() - {"q", "q_b", "k_b"}:
            np.testing.assert_array_equal(before[name], after[name])
