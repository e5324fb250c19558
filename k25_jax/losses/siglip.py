"""SigLIP's pairwise sigmoid loss between images and their captions (K2.5 §3.2: MoonViT-3D comes from SigLIP)."""

import jax
import jax.numpy as jnp

SCALE, BIAS = 10.0, -10.0  # with which SigLIP's training begins; here they stay
DOCUMENTS = 64  # of a row, at most, that take part


@jax.named_scope("loss.siglip")
def siglip(images_BSD, texts_BSD, present_BS, whole=None):
    """Mean over pairs of a row of log(1 + exp(-z (SCALE cos + BIAS))), z = 1 for an image with its own text, else -1.

    As in SigLIP, the sum over all pairs is divided by the number of images: of those present, or of `whole` in a batch of
    which these rows are a part. Rows of unit length are made of what is given; those that are not `present` count for
    nothing. Pairs are those of one row, so no device needs another's.
    """
    images_BSD, texts_BSD = (_unit(a.astype(jnp.float32)) for a in (images_BSD, texts_BSD))
    logits_BST = SCALE * jnp.einsum("bsd,btd->bst", images_BSD, texts_BSD, precision="highest") + BIAS
    sign_ST = 2.0 * jnp.eye(logits_BST.shape[-1]) - 1.0
    counted_BST = present_BS[:, :, None] & present_BS[:, None]
    total = jnp.where(counted_BST, jax.nn.softplus(-sign_ST * logits_BST), 0.0).sum()
    return total / jnp.maximum(present_BS.sum() if whole is None else whole, 1)


def pooled(x_BLD, chosen_BL, segments_BL):
    """The means of x over the chosen places of each of the first DOCUMENTS documents of a row, [B,S,D]."""
    of_BLS = _of_document(chosen_BL, segments_BL).astype(jnp.float32)
    sum_BSD = jnp.einsum("bls,bld->bsd", of_BLS, x_BLD.astype(jnp.float32))
    return sum_BSD / jnp.maximum(of_BLS.sum(axis=1), 1)[..., None]


def counts(chosen_BL, segments_BL):
    """How many chosen places each of the first DOCUMENTS documents of a row has, [B,S]."""
    return _of_document(chosen_BL, segments_BL).sum(axis=1)


def _of_document(chosen_BL, segments_BL):
    return (segments_BL[..., None] == 1 + jnp.arange(DOCUMENTS)) & chosen_BL[..., None]


def _unit(a):
    return a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + 1e-12)
