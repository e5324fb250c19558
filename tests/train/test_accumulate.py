"""Parts of a batch: what they hold, and that the gradients of their features are as exact as if there were no parts."""

import jax
import jax.numpy as jnp
import numpy as np

from k25_jax.config import DataConfig, preset
from k25_jax.data.packing import pack_examples
from k25_jax.parallel.routes import Tables
from k25_jax.train.accumulate import accumulated, first_part, in_parts

TINY = preset("tiny")


def a_batch():
    batch = pack_examples([], DataConfig(batch_size=6, seq_len=4, packs=1, pack_patches=64), TINY)
    return batch.replace(tokens_BL=np.arange(24, dtype=np.int32).reshape(6, 4))


def test_a_part_has_its_rows_and_its_tables():
    tables = Tables(np.zeros(1), np.arange(3), 10 + np.arange(3))
    parts = in_parts(a_batch().replace(routes=tables), 3)
    assert parts.tokens_BL[:, :, 0].tolist() == [[0, 4], [8, 12], [16, 20]]
    assert parts.vision is None and parts.routes.spread_XJZU is None
    assert parts.routes.pick_AXJZU.tolist() == [0, 1, 2] and parts.routes.land_AXJZU.tolist() == [10, 11, 12]
    whole = first_part(a_batch().replace(routes=tables))
    assert whole.tokens_BL.shape == (6, 4) and (whole.routes.pick_AXJZU, whole.routes.land_AXJZU) == (0, 10)
    assert first_part(a_batch()).routes is None


def test_features_have_the_gradient_of_their_one_part_to_the_last_bit():
    """In bfloat16: a feature has one token, so that what the other parts add is nothing."""
    rng = np.random.default_rng(0)
    features, factors = (jnp.asarray(rng.standard_normal((64, 8)), jnp.bfloat16) for _ in range(2))
    where = jnp.asarray(rng.permutation(64).reshape(16, 4))

    def function(params, frozen, part):
        chosen = params["features"][part].astype(jnp.float32)
        return jnp.sum(jnp.sin(chosen) * frozen[part].astype(jnp.float32)), part, params

    loss, got = jax.value_and_grad(lambda a: accumulated(function, {"features": a}, factors, where)[0])(features)
    want, grads = jax.value_and_grad(lambda a: function({"features": a}, factors, where.reshape(-1))[0])(features)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), grads.astype(jnp.float32))
