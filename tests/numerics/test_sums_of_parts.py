"""What is added up over the parts of a batch is that of the whole: losses, gradients, loads; of logits the largest."""

import jax
import jax.numpy as jnp
import numpy as np

from drawn import MINUTE, random_params
from k25_jax.config import DataConfig, Experiment, TrainConfig
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.losses.lm import cross_entropy
from k25_jax.train.pretrain import loss_fn

MODEL = MINUTE


def test_losses_of_parts_add_up_to_that_of_the_whole():
    """Rows of which the first counts one place, the last seven, with weights of their own."""
    rng = np.random.default_rng(0)
    x_BLD, head_DV = rng.normal(size=(4, 8, 6)).astype(np.float32), rng.normal(size=(6, 11)).astype(np.float32)
    targets_BL, weights_BL = rng.integers(0, 11, (4, 8)), rng.random((4, 8)).astype(np.float32)
    weights_BL[np.arange(8) > 2 * np.arange(4)[:, None]] = 0
    loss_of = jax.jit(cross_entropy)
    want, seen = loss_of(x_BLD, head_DV, targets_BL, weights_BL)
    whole = weights_BL.sum(), (weights_BL > 0).sum()
    parts = [loss_of(x_BLD[i : i + 1], head_DV, targets_BL[i : i + 1], weights_BL[i : i + 1], whole) for i in range(4)]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), want, rtol=1e-6)
    for name in seen:
        np.testing.assert_allclose(sum(metrics[name] for _, metrics in parts), seen[name], rtol=1e-6)


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    """Four rows one by one, of unlike length, the first with the largest logits; what follows doubles the loss."""
    rng = np.random.default_rng(1)
    examples = [
        make_example(rng.integers(2, 60, n).tolist(), [1.0] * n, [], MODEL.media_pad_id) for n in (24, 15, 9, 20)
    ]
    batch = pack_examples(examples, DataConfig(batch_size=4, seq_len=24, packs=0, pack_patches=16), MODEL)
    batch = batch.replace(tokens_BL=np.where(np.arange(4)[:, None] == 0, batch.tokens_BL, batch.tokens_BL % 5 + 2))
    params = random_params(MODEL)

    def gradients(parts: int):
        experiment = Experiment(model=MODEL, train=TrainConfig(accumulate=parts))
        grad_fn = jax.value_and_grad(
            lambda p: jax.tree.map(lambda a: 2 * a, loss_fn(p, batch, experiment)), has_aux=True
        )
        return jax.jit(grad_fn)(params)

    (want_loss, want_seen), want = gradients(1)
    (loss, seen), got = gradients(4)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(want_seen), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-12))
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)
