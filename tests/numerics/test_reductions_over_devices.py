"""The largest attention logit lies on the last of eight devices, and every device gets to know it: QK-Clip needs that."""

import runs

SCRIPT = """
import jax, numpy as np
from k25_jax.models.context import attend_over_context
from k25_jax.models.mla import attend_in_rows
from k25_jax.sharding.mesh import make_mesh

rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
p, segments_BL = {"k_b": draw(6, 3, 5), "v_b": draw(6, 3, 4)}, np.ones((8, 16), np.int32)
q_BLHK, c_BLR, r_BLK = draw(8, 16, 3, 8), draw(8, 16, 6), draw(8, 16, 3)
q_BLHK[7, 13] *= 30  # the last row, and of it the second stripe

def largest(attend, *rows):
    return jax.jit(lambda *rows: attend(p, *rows, 0.3)[1])(*rows)

rows = q_BLHK, c_BLR, r_BLK, segments_BL
want_H = np.asarray(largest(attend_in_rows, *rows))
assert (want_H > 2 * np.asarray(largest(attend_in_rows, *(a[:7] for a in rows)))).all()
for sizes in (dict(fsdp=8), dict(fsdp=2, expert=2, pipe=2), dict(fsdp=4, context=2)):
    shares = sizes.get("context", 1)
    stripes = np.arange(16).reshape(-1, shares).T.reshape(-1)
    with jax.set_mesh(make_mesh(**sizes)):
        got_H = largest(attend_over_context if shares > 1 else attend_in_rows, *(a[:, stripes] for a in rows))
    assert len(got_H.addressable_shards) == 8
    for shard in got_H.addressable_shards:
        np.testing.assert_allclose(shard.data, want_H, rtol=1e-5, err_msg=str(sizes))
print("equal")
"""


def test_every_device_knows_the_largest_logit_of_all_rows():
    assert runs.on_eight_devices(SCRIPT) == "equal\n"
