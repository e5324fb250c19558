"""Where the optimizer's means and Muon's stacks of matrices lie on a mesh: shared out, also where weights are copies."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from k25_jax.config import Experiment, OptimConfig, preset
from k25_jax.optim.muonclip import MATRIX, stacked_sharding
from k25_jax.sharding.mesh import AXES
from k25_jax.train.state import state_shardings

MESH = AbstractMesh((2, 4, 1, 2), AXES)


def shares(layout: NamedSharding) -> int:
    """Over how many devices one array is split."""
    names = [name for entry in layout.spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(MESH.shape[name] for name in names)


def test_means_are_shared_out_where_parameters_are_copies():
    """The encoder's weights are on every device; the running means of its matrices are split over all sixteen."""
    tiny = preset("tiny")
    vision = dataclasses.replace(tiny.vision, width=64, mlp_dim=128)
    experiment = Experiment(model=dataclasses.replace(tiny, vision=vision), optim=OptimConfig(name="muonclip"))
    layout = state_shardings(experiment, MESH)
    for name in ("fc0", "fc1"):
        assert shares(layout.params["vision"]["blocks"][name]) == 1
        assert shares(layout.opt_state.mu["vision"]["blocks"][name]) == MESH.size, name
    for part in ("dense", "moe"):
        assert layout.opt_state.mu[part]["attention"]["o"] == layout.params[part]["attention"]["o"]
    assert shares(layout.opt_state.mu["moe"]["moe"]["experts"]["gate"]) > 2


@pytest.mark.parametrize(
    "form, before, after",
    [
        (MATRIX["gate"], ("pipe", "expert", "fsdp", None), ("pipe", "expert", "fsdp", None)),
        (MATRIX["q_b"], ("pipe", None, ("fsdp", "expert"), None), ("pipe", None, ("fsdp", "expert"))),
        (MATRIX["o"], (None, ("fsdp", "expert"), None, None), (None, ("fsdp", "expert"), None)),
        (MATRIX["o"], (None, ("fsdp", "expert")), (None, ("fsdp", "expert"), None)),
        (MATRIX["qkv"], (None, "expert", None, "fsdp", None), (None, None, "expert", "fsdp")),
    ],
)
def test_a_stack_of_matrices_is_split_as_the_weight_is(form, before, after):
    """Replicated, every device would hold and make orthogonal all of it."""
    got = stacked_sharding(NamedSharding(MESH, PartitionSpec(*before)), form)
    assert got.mesh == MESH and got.spec == PartitionSpec(*after)


def test_the_layout_of_a_whole_state_covers_every_leaf():
    layout = state_shardings(Experiment(model=preset("tiny")), MESH)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(layout))
    assert jax.tree.structure(layout.opt_state.mu) == jax.tree.structure(layout.params)
