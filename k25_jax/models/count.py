"""Parameter counts by component, total and active for one token, without allocating (K2.5 §3.1)."""

import math

import jax

from k25_jax.config import K25Config
from k25_jax.models.k25 import abstract_params


def count_params(config: K25Config) -> dict[str, int]:
    """Counts by component, then `vision` (encoder), `projector`, `text`, `total` and `active`.

    Active: what one text token passes through, that is everything but the experts it is not routed to and the vision
    side.
    """
    components = dict.fromkeys(
        ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms", "head"), 0
    )
    tree = abstract_params(config)
    vision, projector = (_size(tree.pop(name)) for name in ("vision", "projector"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        components[_component([key.key for key in path])] += math.prod(leaf.shape)
    text = sum(components.values())
    moe = config.text.moe
    idle = components["routed_experts"] * (moe.experts - moe.top_k) // moe.experts
    return {
        **components,
        "vision": vision,
        "projector": projector,
        "text": text,
        "total": text + vision + projector,
        "active": text - idle,
    }


def _component(names: list[str]) -> str:
    if "norm" in names[-1]:
        return "norms"
    fixed = {"embed": "embedding", "head": "head", "mlp": "dense_ffn", "experts": "routed_experts"}
    fixed |= {"shared": "shared_experts", "router": "router", "router_bias": "router", "attention": "attention"}
    return next(fixed[name] for name in names if name in fixed)


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
