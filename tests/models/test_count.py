"""Parameter counts of the presets, and of a small model by adding up its arrays."""

import jax

from k25_jax.config import PRESETS, preset
from k25_jax.models.count import count_params
from k25_jax.models.k25 import init_params

TEXT = ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms", "head")


def test_the_full_model_has_the_published_size():
    counts = count_params(preset("k25_1t"))
    assert 1.026e12 <= counts["total"] <= 1.028e12
    assert 32e9 <= counts["active"] <= 33e9
    assert 0.41e9 <= counts["vision"] <= 0.42e9


def test_the_parts_add_up():
    for name in PRESETS:
        counts = count_params(preset(name))
        assert sum(counts[part] for part in TEXT) == counts["text"]
        assert counts["text"] + counts["vision"] + counts["projector"] == counts["total"]


def test_counts_are_those_of_real_arrays():
    config = preset("tiny")
    params = init_params(config, jax.random.key(0))
    counts = count_params(config)
    assert sum(a.size for a in jax.tree.leaves(params)) == counts["total"]
    assert sum(a.size for a in jax.tree.leaves(params["moe"]["moe"]["experts"])) == counts["routed_experts"]
    idle = counts["routed_experts"] * (8 - 2) // 8
    assert counts["active"] == counts["text"] - idle
