"""The rules table over the real model, and a sharded forward pass against an unsharded one."""

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import runs
from k25_jax.config import preset
from k25_jax.models.k25 import abstract_params, logical_axes
from k25_jax.sharding.mesh import make_mesh
from k25_jax.sharding.rules import RULES, spec


def test_every_axis_of_the_full_model_has_a_rule():
    axes = jax.tree.leaves(logical_axes(preset("k25_1t")), is_leaf=lambda x: isinstance(x, PartitionSpec))
    named = {name for axis in axes for name in tuple(axis) if name is not None}
    assert named <= set(RULES) and {"expert", "embed", "vocab", "vision"} <= named


def test_the_full_model_on_256_chips():
    mesh = AbstractMesh((4, 4, 16), ("pipe", "fsdp", "expert"))
    gate = spec(PartitionSpec("stages", "expert", "expert_embed", "expert_mlp"), (60, 384, 7168, 2048), mesh)
    assert gate == PartitionSpec("pipe", "expert", "fsdp", None)
    assert spec(PartitionSpec("vocab", "embed"), (163840, 7168), mesh) == PartitionSpec(("fsdp", "expert"), None)
    assert spec(PartitionSpec("layers", "norm"), (60, 7168), mesh) == PartitionSpec(None, None)


def test_key_tensors_of_the_full_model_on_eight_chips():
    """MoE layers over pipe; experts over (expert, fsdp), dense matrices over both at once, the rest on every chip."""
    mesh = AbstractMesh((2, 2, 2), ("pipe", "fsdp", "expert"))
    model = preset("k25_1t")
    leaves = jax.tree.map(lambda axes, a: spec(axes, a.shape, mesh), logical_axes(model), abstract_params(model))
    moe, both = leaves["moe"]["moe"], ("fsdp", "expert")
    assert moe["experts"]["gate"] == moe["experts"]["up"] == PartitionSpec("pipe", "expert", "fsdp", None)
    assert moe["experts"]["down"] == PartitionSpec("pipe", "expert", None, "fsdp")
    assert moe["shared"]["gate"] == PartitionSpec("pipe", both, None)
    assert leaves["moe"]["attention"]["q_a"] == PartitionSpec("pipe", both, None)
    assert leaves["moe"]["attention"]["q_b"] == PartitionSpec("pipe", None, both, None)
    assert leaves["moe"]["attention"]["o"] == PartitionSpec("pipe", both, None, None)
    assert leaves["dense"]["attention"]["q_a"] == PartitionSpec(None, both, None)
    assert leaves["dense"]["mlp"]["gate"] == PartitionSpec(None, both, None)
    assert leaves["embed"] == PartitionSpec(both, None) and leaves["head"] == PartitionSpec(both, None)
    for of_a_stage in (moe["router"], moe["router_bias"], leaves["moe"]["mlp_norm"]):
        assert of_a_stage[0] == "pipe" and not any(of_a_stage[1:])
    for replicated in (leaves["dense"]["mlp_norm"], leaves["final_norm"], leaves["vision"], leaves["projector"]):
        for leaf in jax.tree.leaves(replicated, is_leaf=lambda a: isinstance(a, PartitionSpec)):
            assert not any(leaf)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = AbstractMesh((1, 4, 2), ("pipe", "fsdp", "expert"))
    assert spec(PartitionSpec("embed", None), (4, 3), mesh) == PartitionSpec("fsdp", None)
    assert spec(PartitionSpec("embed", None), (3, 3), mesh) == PartitionSpec(None, None)


def test_an_axis_without_a_rule_is_named():
    mesh = AbstractMesh((1, 1, 1), ("pipe", "fsdp", "expert"))
    with pytest.raises(ValueError, match="embde"):
        spec(PartitionSpec("embde"), (4,), mesh)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="pipe=3"):
        make_mesh(pipe=3, fsdp=1, expert=1, devices=jax.devices()[:1])


SHARDED = """
    import jax, numpy as np
    from k25_jax.config import preset
    from k25_jax.models.k25 import abstract_params, forward, init_params, logical_axes
    from k25_jax.sharding.mesh import make_mesh
    from k25_jax.sharding.rules import shardings
    from k25_jax.data.packing import Batch
    from k25_jax.vision.patchpack import empty_pack

    config = preset("tiny")
    mesh = make_mesh(pipe=1, fsdp=4, expert=2)
    place = shardings(logical_axes(config), abstract_params(config), mesh)
    init = lambda key: init_params(config, key)
    sharded = jax.jit(init, out_shardings=place)(jax.random.key(0))
    gate = sharded["moe"]["moe"]["experts"]["gate"]
    assert gate.addressable_shards[0].data.size * 8 == gate.size, gate.sharding
    some = lambda tree: (tree["embed"], tree["moe"]["moe"]["experts"]["gate"])
    for a, b in zip(some(sharded), jax.jit(lambda key: some(init(key)))(jax.random.key(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    plain = jax.tree.map(np.asarray, sharded)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    ones = np.ones((2, 24), np.int32)
    batch = Batch(tokens, tokens, ones.astype(np.float32), ones, np.tile(np.arange(24), (2, 1)), ones * 0 - 1,
                  empty_pack(0, 16, config.vision))
    run = jax.jit(lambda p: forward(p, batch, config))
    np.testing.assert_allclose(run(sharded), run(plain), rtol=1e-4, atol=1e-4)
    print("equal")
"""


def test_sharded_parameters_give_the_same_logits():
    assert runs.on_eight_devices(SHARDED) == "equal\n"
