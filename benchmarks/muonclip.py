"""MuonClip's mathematics against optax's Muon on one device, and QK-Clip against its definition (row k of the bounds).

Ten steps over the tiny model's own matrices with random gradients, float32; the figure is the largest difference of a
weight relative to the largest weight of its matrix, or of a clipped attention logit relative to the largest. Both
optimizers' time per step stands beside it. With --json one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from k25_jax.config import OptimConfig, preset
from k25_jax.models.k25 import init_params
from k25_jax.models.mla import mla
from k25_jax.models.rope import rope_tables
from k25_jax.optim.muonclip import matrices, muonclip, qk_clip
from k25_jax.optim.schedules import warmup_stable_decay

STEPS, BOUND = 10, 1e-5
AXES = {  # of a form of optim/muonclip.py: the axes contracted over and those given out
    "... r c -> ... r c": (-2, -1),
    "y r h k -> y r (h k)": (1, (2, 3)),
    "y h k c -> y (h k) c": ((1, 2), 3),
    "y r t h k -> y t r (h k)": (1, (3, 4)),
}


def muon_error(seed: int) -> tuple[float, float, float]:
    """(largest relative difference of a weight after STEPS steps, our seconds a step, optax's)."""
    config = OptimConfig(name="muonclip", muon_dtype="float32", peak_lr=1e-2, warmup_steps=2)
    params = init_params(preset("tiny"), jax.random.key(seed))
    forms = jax.tree.leaves(matrices(params, config))
    weights, axes = {}, {}
    for (path, a), form in zip(jax.tree_util.tree_leaves_with_path(params), forms, strict=True):
        if form:
            name = jax.tree_util.keystr(path)
            weights[name] = {path[-1].key: a}
            axes[name] = {path[-1].key: optax.contrib.MuonDimensionNumbers(*AXES[form])}
    peer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.contrib.muon(
            warmup_stable_decay(config, STEPS), beta=config.momentum, weight_decay=config.weight_decay,
            consistent_rms=0.2, muon_weight_dimension_numbers=axes,
        ),
    )  # fmt: skip
    mine, my_seconds = run(muonclip(config, STEPS), weights, seed, lambda norm: {"grad_norm": norm, "finite": True})
    theirs, their_seconds = run(peer, weights, seed, lambda norm: {})
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), mine, theirs)
    return float(max(jax.tree.leaves(errors))), my_seconds, their_seconds


def run(optimizer, weights, seed: int, extra):
    """(weights after STEPS steps with random gradients, the median seconds of a step)."""

    @jax.jit
    def update(grads, state, weights):
        updates, state = optimizer.update(grads, state, weights, **extra(optax.tree.norm(grads)))
        return optax.apply_updates(weights, updates), state

    state, seconds = optimizer.init(weights), []
    for step in range(STEPS):
        grads = optax.tree.random_like(jax.random.key(1000 * seed + step), weights)
        began = time.perf_counter()
        weights, state = jax.block_until_ready(update(grads, state, weights))
        seconds.append(time.perf_counter() - began)
    return weights, statistics.median(seconds)


def clip_error(seed: int) -> float:
    """How far the largest logit of a clipped head is from gamma times the old one, relative; on the same activations."""
    text = dataclasses.replace(preset("tiny").text, init_std=0.5)
    config = dataclasses.replace(preset("tiny"), text=text)
    params = init_params(config, jax.random.key(seed))
    x_BLD = jax.random.normal(jax.random.key(seed + 1), (2, 64, text.d_model))
    segments_BL = jnp.ones((2, 64), jnp.int32)
    rope = rope_tables(text.rope, text.qk_rope_dim, jnp.arange(64)[None].repeat(2, 0))

    def largest(params):
        layers = [jax.tree.map(lambda a, y=y: a[y], params["moe"]["attention"]) for y in range(text.moe_layers)]
        dense = jax.tree.map(lambda a: a[0], params["dense"]["attention"])
        return jnp.stack([mla(p, x_BLD, rope, segments_BL, text)[1] for p in (dense, *layers)])

    before_YH = largest(params)
    threshold = float(jnp.median(before_YH))
    clipped, count = qk_clip(params, before_YH, text, threshold)
    assert 0 < count < before_YH.size
    want_YH = before_YH * jnp.minimum(1, threshold / before_YH)
    return float((jnp.abs(largest(clipped) - want_YH) / want_YH).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    runs = [muon_error(seed) for seed in range(3)]
    clip = max(clip_error(seed) for seed in range(3))
    figure = max(clip, *(error for error, _, _ in runs))
    ours, theirs = (statistics.median(row[i] for row in runs) for i in (1, 2))
    out = {"name": "muonclip", "figure": figure, "bound": BOUND, "ok": figure <= BOUND, "qk_clip_error": clip}
    out |= {"our_milliseconds": ours * 1e3, "optax_milliseconds": theirs * 1e3, "ratio": theirs / ours}
    if args.json:
        print(json.dumps(out))
        return
    print(
        f"largest relative difference from optax's Muon and from QK-Clip's definition: {figure:.1e} (bound {BOUND:.0e})"
    )
    print(f"a step: ours {ours * 1e3:.1f} ms, optax {theirs * 1e3:.1f} ms, ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
