"""Matrices in pieces on eight devices against the same on one, in a process of its own."""

import runs

SCRIPT = """
import re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from k25_jax.config import OptimConfig, preset
from k25_jax.models.k25 import abstract_params, logical_axes
from k25_jax.optim.muonclip import muonclip
from k25_jax.optim.newton_schulz import newton_schulz, sharded_newton_schulz
from k25_jax.sharding.mesh import make_mesh
from k25_jax.sharding.rules import shardings

mesh = make_mesh(pipe=2, fsdp=2, expert=2)
cases = [
    ((3, 4, 8, 12), P(None, "expert", "fsdp", None)),
    ((4, 4, 8, 12), P("pipe", "expert", None, "fsdp")),
    ((5, 16, 8), P(None, ("fsdp", "expert"), None)),
    ((5, 16, 8), P()),
    ((8, 12), P("fsdp", "expert")),
    ((2, 8, 12), P("pipe", "fsdp", "expert")),
]
for shape, spec in cases:
    layout = NamedSharding(mesh, spec)
    x = jax.random.normal(jax.random.key(0), shape)
    run = jax.jit(lambda a: sharded_newton_schulz(a, layout, jnp.float32))
    out = run(jax.device_put(x, layout))
    np.testing.assert_allclose(out, newton_schulz(x, jnp.float32), atol=1e-5, err_msg=str(spec))
    assert out.sharding.is_equivalent_to(layout, x.ndim), spec
    if spec == P("pipe", "expert", None, "fsdp"):  # no copies: nothing is gathered, nobody works twice
        text = run.lower(jax.device_put(x, layout)).compile().as_text()
        assert "all-gather(" not in text and len(re.findall(r"all-to-all\\(", text)) == 2

model, config = preset("tiny"), OptimConfig(name="muonclip", muon_dtype="float32")
params = optax.tree.random_like(jax.random.key(1), abstract_params(model))
layouts = shardings(logical_axes(model), abstract_params(model), mesh)
grads = optax.tree.random_like(jax.random.key(2), params)

def updates(params, grads, layouts):
    optimizer = muonclip(config, 10, layouts)
    step = jax.jit(lambda g, s, p: optimizer.update(g, s, p, grad_norm=optax.tree.norm(g), finite=True)[0])
    return step(grads, optimizer.init(params), params)

alone = updates(params, grads, None)
together = updates(*(jax.device_put(tree, layouts) for tree in (params, grads)), layouts)
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()), err_msg=jax.tree_util.keystr(path))
print("equal")
"""


def test_sharded_matrices_equal_whole_ones_and_keep_their_layout():
    assert runs.on_eight_devices(SCRIPT) == "equal\n"
