"""Both forms of expert parallelism on eight devices against every token through every expert; two rounds and many."""

import pytest

import runs
from k25_jax.config import ConfigError, MoEConfig
from k25_jax.models.dispatch import places_for

EQUAL = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from k25_jax.config import MoEConfig
from k25_jax.models.experts import routed
from k25_jax.sharding.mesh import make_mesh

config = MoEConfig(experts=8, top_k=2, ffn_dim=12)
keys = jax.random.split(jax.random.key(0), 7)
shapes = dict(gate=(8, 16, 12), up=(8, 16, 12), down=(8, 12, 16))
p = {name: jax.random.normal(key, shape) * 0.3 for key, (name, shape) in zip(keys, shapes.items())}
x_BLD, weights_BLK = jax.random.normal(keys[3], (8, 12, 16)), jax.random.uniform(keys[4], (8, 12, 2))
drawn_BLK = jnp.argsort(jax.random.uniform(keys[5], (8, 12, 8)), axis=-1)[..., :2]
padding_BL1 = jax.random.uniform(keys[6], (8, 12, 1)) < 0.3
choices = dict(drawn=drawn_BLK, padded=jnp.where(padding_BL1, 8, drawn_BLK),
               same=jnp.broadcast_to(jnp.asarray([5, 4]), drawn_BLK.shape), nothing=jnp.full_like(drawn_BLK, 8))

def by_definition(p, x_BLD, weights_BLK, experts_BLK):
    one_hot_BLKE = jax.nn.one_hot(experts_BLK, 8)
    gate, up = (jnp.einsum("bld,edf->blef", x_BLD, p[name]) for name in ("gate", "up"))
    return jnp.einsum("blef,efd,blke,blk->bld", jax.nn.silu(gate) * up, p["down"], one_hot_BLKE, weights_BLK)

def gradients(layer):
    loss = lambda p, x, w, e: (y := layer(p, x, w, e), jnp.sin(y).sum())[::-1]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

expected = {name: gradients(by_definition)(p, x_BLD, weights_BLK, chosen) for name, chosen in choices.items()}
for sizes in (dict(fsdp=2, expert=4), dict(expert=8), dict(fsdp=2, context=2, expert=2)):
    mesh = make_mesh(**sizes)
    for dispatch in ("gather", "alltoall"):
        form = dataclasses.replace(config, dispatch=dispatch)
        with jax.set_mesh(mesh):
            layer = gradients(lambda p, x, w, e: routed(p, x, w, e, jnp.bincount(e.reshape(-1), length=8), form))
            text = layer.lower(p, x_BLD, weights_BLK, drawn_BLK).as_text()
            assert ("all_to_all" in text) == (dispatch == "alltoall")
            for name, chosen in choices.items():
                got = layer(p, x_BLD, weights_BLK, chosen)
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected[name]), strict=True):
                    error = np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-6)
                    assert error <= 1e-5, (sizes, dispatch, name, error)
print("equal")
"""


def test_both_forms_equal_the_definition_however_tokens_choose():
    """Among the choices: all tokens the same experts of one device, and none any."""
    assert runs.on_eight_devices(EQUAL) == "equal\n"


def test_places_of_a_pair():
    assert places_for(4096 * 8, 16, 1.25) == 2560  # a quarter more than the mean
    assert places_for(100, 16, 1.25) == 8 and places_for(4, 16, 1.25) == 4


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="dispatch='alltoal'; did you mean 'alltoall'"):
        MoEConfig(dispatch="alltoal")
