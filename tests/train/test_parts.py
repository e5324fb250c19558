"""Norms by part of the model: which leaves are which part, their values, and that a mesh gathers nothing for them."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import runs
from k25_jax.config import preset
from k25_jax.models.k25 import abstract_params
from k25_jax.train.parts import norms, parts, squares


@pytest.mark.parametrize("name", ["tiny", "moonlight_16b", "k25_1t"])
def test_every_weight_is_of_one_part(name):
    config = preset(name)
    found = parts(config)
    assert found.keys() == flatten_dict(abstract_params(config)).keys()
    expected = {"embed", "head", "norm", "attention", "mlp", "router", "experts", "shared", "vision", "projector"}
    expected -= {"head"} if config.text.tie_embeddings else set()
    assert set(found.values()) == expected
    for path, part in found.items():
        assert part in path or part == "norm", path


def test_they_are_the_norms_of_the_parts():
    config = preset("tiny")
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), abstract_params(config))
    got = jax.jit(lambda tree: norms(squares(tree), config, "grad_norm"))(tree)
    flat = flatten_dict(tree)
    for part in set(parts(config).values()):
        numbers = np.concatenate([flat[path].ravel() for path in flat if parts(config)[path] == part])
        np.testing.assert_allclose(got[f"grad_norm/{part}"], np.linalg.norm(numbers), rtol=1e-5)
    total = np.sqrt(sum(float(a) ** 2 for a in got.values()))
    np.testing.assert_allclose(total, np.linalg.norm(np.concatenate([a.ravel() for a in flat.values()])), rtol=1e-5)


def test_on_a_mesh_each_device_adds_up_what_it_has():
    out = runs.on_eight_devices("""
        import jax, numpy as np
        from k25_jax.config import preset
        from k25_jax.models.k25 import abstract_params, logical_axes
        from k25_jax.sharding.mesh import make_mesh
        from k25_jax.sharding.rules import shardings
        from k25_jax.train.parts import norms, squares

        config, mesh = preset("tiny"), make_mesh(expert=2)
        shapes = abstract_params(config)
        layout = shardings(logical_axes(config), shapes, mesh)
        tree = jax.tree.map(lambda a: np.random.default_rng(a.size).standard_normal(a.shape, np.float32), shapes)
        compute = jax.jit(lambda tree: norms(squares(tree), config, "norm"))
        placed = jax.device_put(tree, layout)
        got, want = compute(placed), compute(tree)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
        text = compute.lower(placed).compile().as_text()
        print(*(f"{kind}:{kind in text}" for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute")))
    """)
    assert out.split() == ["all-reduce:True", "all-gather:False", "all-to-all:False", "collective-permute:False"]
