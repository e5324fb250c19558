"""The router, dropless experts and load balancing against brute force."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from k25_jax.config import ConfigError, MoEConfig
from k25_jax.models.experts import routed
from k25_jax.models.moe import balanced_bias, moe, route

megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")  # a function has the same name
D = 13
ROUTERS = [
    MoEConfig(experts=7, top_k=3, ffn_dim=9, scale=2.5),
    MoEConfig(experts=7, top_k=3, ffn_dim=9, scale=1.0, normalise=False, shared_experts=0),
    MoEConfig(experts=12, top_k=2, ffn_dim=5, groups=4, top_groups=2, shared_experts=2),
    MoEConfig(experts=6, top_k=4, ffn_dim=5, groups=3, top_groups=2, normalise=False),
    MoEConfig(experts=4, top_k=4, ffn_dim=6),
    MoEConfig(experts=3, top_k=1, ffn_dim=6, normalise=False),
]


def draw_weights(config: MoEConfig, seed: int):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    e, f = config.experts, config.ffn_dim
    p = {"router": draw(D, e), "router_bias": 0.3 * draw(e)}
    p["experts"] = {"gate": draw(e, D, f), "up": draw(e, D, f), "down": draw(e, f, D)}
    if config.shared_experts:
        f *= config.shared_experts
        p["shared"] = {"gate": draw(D, f), "up": draw(D, f), "down": draw(f, D)}
    return p


def choose(scores_E, bias_E, config: MoEConfig) -> list[int]:
    """The chosen experts of one token, by sorting in plain Python."""
    worth = {e: scores_E[e] + bias_E[e] for e in range(config.experts)}
    size = config.experts // config.groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.groups)]
    if config.groups > 1:
        groups.sort(key=lambda group: -sum(sorted(worth[e] for e in group)[-2:]))
    allowed = [e for group in groups[: config.top_groups] for e in group]
    return sorted(allowed, key=lambda e: -worth[e])[: config.top_k]


def feed_forward(p, x):
    gate = x @ p["gate"]
    return (gate * expit(gate) * (x @ p["up"])) @ p["down"]


def by_force(p, x_TD, config: MoEConfig):
    """(y_TD, load_E, chosen) a token and an expert at a time."""
    scores_TE = expit(x_TD @ p["router"])
    y_TD, load_E, chosen = np.zeros(x_TD.shape), np.zeros(config.experts, int), []
    for x_D, scores_E, y_D in zip(x_TD, scores_TE, y_TD, strict=True):
        experts = choose(scores_E, p["router_bias"], config)
        total = sum(scores_E[e] for e in experts) if config.normalise else 1.0
        for e in experts:
            y_D += config.scale * scores_E[e] / total * feed_forward({k: w[e] for k, w in p["experts"].items()}, x_D)
            load_E[e] += 1
        if "shared" in p:
            y_D += feed_forward(p["shared"], x_D)
        chosen.append(experts)
    return y_TD, load_E, chosen


@pytest.mark.parametrize("config", ROUTERS)
def test_router_and_experts_are_those_of_brute_force(config):
    p = draw_weights(config, 0)
    x_BLD = np.random.default_rng(1).normal(size=(2, 41, D)).astype(np.float32)
    x_TD = x_BLD.reshape(-1, D)
    expected_TD, expected_load_E, chosen = by_force(p, x_TD, config)
    weights_TK, experts_TK = jax.jit(route, static_argnums=3)(p["router"], p["router_bias"], x_TD, config)
    np.testing.assert_array_equal(experts_TK, chosen)
    assert weights_TK.dtype == jnp.float32
    if config.normalise:
        np.testing.assert_allclose(np.sum(weights_TK, axis=1), config.scale, rtol=1e-5)
    valid_BL = np.ones(x_BLD.shape[:2], bool)
    y_BLD, load_E = jax.jit(moe, static_argnums=3)(p, x_BLD, valid_BL, config)
    np.testing.assert_array_equal(load_E, expected_load_E)
    assert load_E.sum() == x_TD.shape[0] * config.top_k
    np.testing.assert_allclose(y_BLD.reshape(-1, D), expected_TD, rtol=1e-4, atol=1e-4)


def test_the_bias_chooses_but_never_weighs():
    config = MoEConfig(experts=5, top_k=2, ffn_dim=4)
    p = draw_weights(config, 2)
    x_TD = np.random.default_rng(3).normal(size=(50, D)).astype(np.float32)
    bias_E = np.array([0, 0, 10, 0, 0], np.float32)
    weights_TK, experts_TK = route(p["router"], bias_E, x_TD, config)
    assert (experts_TK[:, 0] == 2).all()
    scores_TE = expit(x_TD @ p["router"])
    picked_TK = np.take_along_axis(scores_TE, np.asarray(experts_TK), axis=1)
    np.testing.assert_allclose(weights_TK, config.scale * picked_TK / picked_TK.sum(1, keepdims=True), rtol=1e-5)
    gradient = jax.grad(lambda bias: route(p["router"], bias, x_TD, config)[0].sum())(bias_E)
    assert not gradient.any()


@pytest.mark.parametrize("implementation", ["blocked", "ragged", "reference"])
def test_padding_is_neither_computed_nor_counted(implementation):
    config = dataclasses.replace(ROUTERS[0], grouped_matmul=implementation)
    p = draw_weights(config, 4)
    rng = np.random.default_rng(5)
    x_BLD = rng.normal(size=(3, 37, D)).astype(np.float32)
    valid_BL = rng.random((3, 37)) < 0.6
    expected_TD, expected_load_E, _ = by_force(p, x_BLD[valid_BL], config)
    run = jax.jit(moe, static_argnums=3)
    y_BLD, load_E = run(p, x_BLD, valid_BL, config)
    np.testing.assert_array_equal(load_E, expected_load_E)
    np.testing.assert_allclose(np.asarray(y_BLD)[valid_BL], expected_TD, rtol=1e-4, atol=1e-4)
    routed_only = {name: w for name, w in p.items() if name != "shared"}
    y_BLD, _ = run(routed_only, x_BLD, valid_BL, config)
    assert not np.asarray(y_BLD)[~valid_BL].any()
    again_BLD, load_E = run(routed_only, np.where(valid_BL[..., None], x_BLD, np.float32(np.nan)), valid_BL, config)
    np.testing.assert_array_equal(again_BLD, y_BLD)
    np.testing.assert_array_equal(load_E, expected_load_E)
    gradient = jax.jit(jax.grad(lambda x: moe(routed_only, x, valid_BL, config)[0].sum()))(x_BLD)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~valid_BL].any()


def test_rows_that_a_kernel_leaves_undefined_reach_no_gradient(monkeypatch):
    """The TPU kernel, interpreted, fills the rows of padding with NaN, forwards and backwards."""
    for name in ("gmm", "tgmm"):
        monkeypatch.setattr(megablox, name, functools.partial(getattr(megablox, name), interpret=True))
    config = ROUTERS[4]
    p = draw_weights(config, 10)["experts"]
    rng = np.random.default_rng(11)
    x_TD, weights_TK = rng.normal(size=(64, D)).astype(np.float32), rng.random((64, 2)).astype(np.float32)
    experts_TK = np.argsort(rng.random((64, 4)), axis=1)[:, :2]
    experts_TK[40:], weights_TK[40:] = config.experts, 0
    load_E = np.bincount(experts_TK[:40].reshape(-1), minlength=4)

    def gradients(implementation):
        def total(p, x_TD, weights_TK):
            how = dataclasses.replace(config, grouped_matmul=implementation)
            return jnp.sin(routed(p, x_TD[None], weights_TK[None], experts_TK[None], load_E, how)).sum()

        return jax.grad(total, (0, 1, 2))(p, x_TD, weights_TK)

    expected = gradients("reference")
    assert not expected[1][40:].any() and not expected[2][40:].any()
    for ours, theirs in zip(jax.tree.leaves(gradients("megablox")), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_nothing_but_padding():
    config = ROUTERS[0]
    p = draw_weights(config, 6)
    y_BLD, load_E = moe(p, np.zeros((1, 5, D), np.float32), np.zeros((1, 5), bool), config)
    assert not load_E.any() and not y_BLD.any()


def test_all_tokens_may_go_to_one_expert():
    config = MoEConfig(experts=4, top_k=1, ffn_dim=5, shared_experts=0)
    p = draw_weights(config, 7) | {"router_bias": np.array([0, 0, 0, 9], np.float32)}
    x_BLD = np.random.default_rng(8).normal(size=(1, 200, D)).astype(np.float32)
    y_BLD, load_E = moe(p, x_BLD, np.ones((1, 200), bool), config)
    assert load_E.tolist() == [0, 0, 0, 200]
    expected_TD = config.scale * feed_forward({k: w[3] for k, w in p["experts"].items()}, x_BLD[0])
    np.testing.assert_allclose(y_BLD[0], expected_TD, rtol=1e-4, atol=1e-4)


def test_the_sign_rule_raises_idle_experts_and_lowers_busy_ones():
    bias_YE = np.array([[0.5, 0.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0]], np.float32)
    load_YE = np.array([[4, 1, 7, 4], [2, 2, 2, 2]], np.int32)
    moved_YE = balanced_bias(bias_YE, load_YE, 0.01)
    np.testing.assert_allclose(moved_YE, [[0.5, 0.01, -0.01, -0.5], [0, 0, 0, 0]], atol=1e-7)


def test_the_sign_rule_balances_a_skewed_router():
    config = MoEConfig(experts=8, top_k=2, ffn_dim=4)
    rng = np.random.default_rng(9)
    router_DE = (rng.normal(size=(D, 8)) * 0.3).astype(np.float32)
    x_TD = (rng.normal(size=(512, D)) + 2 * router_DE[:, 0]).astype(np.float32)  # expert 0 is everyone's favourite

    def load(bias_E):
        _, experts_TK = route(router_DE, bias_E, x_TD, config)
        return jnp.bincount(experts_TK.reshape(-1), length=8)

    def step(_, bias_E):
        return balanced_bias(bias_E[None], load(bias_E)[None], 0.002)[0]

    bias_E = jax.jit(lambda: jax.lax.fori_loop(0, 800, step, jnp.zeros(8)))()
    before_E, after_E = load(jnp.zeros(8)), load(bias_E)
    assert before_E.max() > 2.5 * before_E.mean() and after_E.max() < 1.2 * after_E.mean()


def test_routers_that_cannot_be_are_refused():
    for changes, message in [
        (dict(experts=4, top_k=5), "top_k=5"),
        (dict(experts=9, top_k=2, groups=2), "must divide"),
        (dict(experts=8, top_k=5, groups=2, top_groups=1), "exceeds"),
        (dict(experts=4, top_k=1, groups=4, top_groups=2), "at least 2 experts"),
        (dict(grouped_matmul="blockd"), "did you mean 'blocked'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            MoEConfig(**changes)
