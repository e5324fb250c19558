"""The router and the dropless experts against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k25_jax.config import MoEConfig
from k25_jax.models.moe import balanced_bias, moe, route


def draw(config, tokens=17, d=12, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    e, f = config.experts, config.ffn_dim
    experts = {"gate": normal(e, d, f), "up": normal(e, d, f), "down": normal(e, f, d)}
    p = {"router": normal(d, e), "router_bias": normal(e) * 0.3, "experts": experts}
    if config.shared_experts:
        f *= config.shared_experts
        p["shared"] = {"gate": normal(d, f), "up": normal(d, f), "down": normal(f, d)}
    return p, normal(1, tokens, d)


def choose(scores, bias, config):
    """Experts of one token, by the book."""
    choice = scores + bias
    size = config.experts // config.groups
    if config.groups > 1:
        worth = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(config.groups)]
        best = np.argsort(worth)[-config.top_groups :]
        choice = np.where(np.isin(np.arange(config.experts) // size, best), choice, -np.inf)
    chosen = np.argsort(-choice)[: config.top_k]
    weights = scores[chosen] / (scores[chosen].sum() if config.normalise else 1.0)
    return chosen, weights * config.scale


def ffn(p, x):
    gate = x @ p["gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up"])) @ p["down"]


CONFIGS = {
    "plain": MoEConfig(experts=6, top_k=2, ffn_dim=5, scale=2.8),
    "groups": MoEConfig(experts=12, top_k=3, ffn_dim=5, groups=4, top_groups=2, shared_experts=0),
    "not normalised, two shared": MoEConfig(experts=5, top_k=1, ffn_dim=5, normalise=False, shared_experts=2),
    "all experts": MoEConfig(experts=3, top_k=3, ffn_dim=5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_tokens(name):
    config = CONFIGS[name]
    p, x = draw(config)
    got, load = jax.jit(moe, static_argnums=3)(p, x, jnp.ones(x.shape[:2], bool), config)
    q = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    counts = np.zeros(config.experts, int)
    for t, token in enumerate(np.asarray(x[0], np.float64)):
        chosen, weights = choose(1 / (1 + np.exp(-token @ q["router"])), q["router_bias"], config)
        want = sum(
            w * ffn(jax.tree.map(lambda a, e=e: a[e], q["experts"]), token)
            for e, w in zip(chosen, weights, strict=True)
        )
        want = want + (ffn(q["shared"], token) if "shared" in q else 0)
        np.testing.assert_allclose(got[0, t], want, rtol=2e-4, atol=2e-4)
        counts[chosen] += 1
    assert load.tolist() == counts.tolist()


def test_the_bias_selects_and_never_weighs():
    config = CONFIGS["plain"]
    p, x = draw(config)
    weights, experts = route(p["router"], p["router_bias"].at[3].set(100.0), x[0], config)
    assert (np.asarray(experts) == 3).any(axis=1).all()
    np.testing.assert_allclose(weights.sum(axis=1), config.scale, rtol=1e-5)
    total = lambda bias: moe({**p, "router_bias": bias}, x, jnp.ones((1, 17), bool), config)[0].sum()  # noqa: E731
    assert not np.asarray(jax.grad(total)(p["router_bias"])).any()


def test_padding_is_not_counted_and_changes_nothing():
    config = CONFIGS["plain"]
    p, x = draw(config)
    valid = jnp.arange(17)[None] < 11
    alone, load_alone = moe(p, x[:, :11], valid[:, :11], config)
    padded, load = moe(p, x.at[:, 11:].set(jnp.nan), valid, config)
    np.testing.assert_array_equal(padded[:, :11], alone)
    assert load.tolist() == load_alone.tolist() and int(load.sum()) == 11 * config.top_k


def test_the_sign_rule_moves_against_the_load():
    bias, load = jnp.asarray([[0.1, 0.2, 0.3]]), jnp.asarray([[9, 3, 6]])
    np.testing.assert_allclose(balanced_bias(bias, load, 0.01), [[0.09, 0.21, 0.3]], rtol=1e-6)
