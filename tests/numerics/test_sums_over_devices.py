"""Sums over microbatches and devices in the bfloat16 path, on eight devices in a process of their own."""

import runs

MICROBATCHES = """
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np
from k25_jax.config import preset
from k25_jax.models.k25 import init_params
from k25_jax.parallel.pipeline import pipelined
from k25_jax.sharding.mesh import make_mesh

text = dataclasses.replace(preset("tiny").text, layers=3)
stack = init_params(dataclasses.replace(preset("tiny"), text=text), jax.random.key(0))["moe"]
rng, length = np.random.default_rng(0), 6
x_LD, dy_LD = (jnp.asarray(rng.normal(size=(length, text.d_model)), jnp.bfloat16) for _ in range(2))

def gradient(microbatches, config=text):
    rows = lambda a: jnp.broadcast_to(a, (4 * microbatches, *a.shape))
    segments, positions = rows(jnp.ones(length, jnp.int32)), rows(jnp.arange(length))

    def outputs(stack):
        form = dict(repeats=1, microbatches=microbatches, trained=stack)
        y, _, passed = pipelined(stack, rows(x_LD), segments, positions, config, "full", **form)
        return (y.astype(jnp.float32) * dy_LD).sum(), passed

    return lambda stack: jax.vjp(outputs, stack)[1]((jnp.ones(()), jax.tree.map(jnp.zeros_like, stack)))[0]

with jax.set_mesh(make_mesh(pipe=2, fsdp=2, expert=2)):
    two, many = (jax.jit(gradient(n))(stack) for n in (2, 16))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(two), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / 8, b, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        config = dataclasses.replace(text, moe=dataclasses.replace(text.moe, reduce_dtype=dtype))
        program = str(jax.make_jaxpr(gradient(2, config))(stack))
        of_matrices = lambda name: set(re.findall(rf":(\\w+)\\[\\d+,\\d+,\\d+\\] = {name}\\[", program))
        assert of_matrices("reduce_scatter") == {short}, (dtype, of_matrices("reduce_scatter"))
        assert of_matrices("all_gather") == {"bf16"}, of_matrices("all_gather")
print("equal")
"""


def test_sixteen_equal_microbatches_have_eight_times_the_gradient_of_two():
    """A sum that is not float32 rounds on the way. Experts' matrices are gathered in bfloat16, and reduced as asked for."""
    assert runs.on_eight_devices(MICROBATCHES) == "equal\n"


CONTEXT = """
import jax, jax.numpy as jnp, numpy as np
from k25_jax.models.context import attend_over_context
from k25_jax.sharding.mesh import make_mesh

heads, shape = 256, (4, 16)
draw = lambda *shape: jnp.asarray(np.random.default_rng(len(shape)).uniform(0.75, 1.25, shape), jnp.float32)
p = {"k_b": draw(6, heads, 2), "v_b": draw(6, heads, 2)}
q, c, r, dout = draw(*shape, heads, 4), draw(*shape, 6), draw(*shape, 2), draw(*shape, heads, 2)
segments = jnp.ones(shape, jnp.int32)

def gradient(dtype):
    q_BLHK, c_BLR, r_BLK, dout_BLHK = (a.astype(dtype) for a in (q, c, r, dout))
    attend = lambda c_BLR: attend_over_context(p, q_BLHK, c_BLR, r_BLK, segments, 0.3)[0]
    return np.asarray(jax.jit(lambda c: jax.vjp(attend, c)[1](dout_BLHK)[0])(c_BLR).astype(jnp.float32))

with jax.set_mesh(make_mesh(fsdp=2, context=4)):
    want = gradient(jnp.float32)
    error = np.linalg.norm(gradient(jnp.bfloat16) - want) / np.linalg.norm(want)
assert error <= 0.01, error
print("equal")
"""


def test_latents_of_a_shared_out_sequence_have_the_gradient_of_all_heads():
    """All 256 heads pull a latent the same way: a sum in bfloat16 would stop growing."""
    assert runs.on_eight_devices(CONTEXT) == "equal\n"
