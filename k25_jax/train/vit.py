"""The loss of the ViT stage: cross-entropy of captions, and SigLIP's loss if it is asked for (K2.5 §3.3).

Only what follows an image or a video in its document counts: nothing else can teach the encoder. Documents of text give no
loss. Both sub-stages use it and differ in `train.trainable`: first "vision" and "projector" against a small language
model, then "projector" alone against the large one.

SigLIP's loss (`train.siglip_weight`, 0 unless set) sets the mean feature of a document's images against the mean embedding
of its caption, both in the space that the language model reads. The embeddings serve as the text tower: one of its own
would be trained only to be thrown away when the stage ends, and a pass of the language model over captions alone would
cost as much as the loss itself.
"""

import jax
import jax.numpy as jnp

from k25_jax.config import Experiment
from k25_jax.losses.siglip import counts, pooled, siglip
from k25_jax.train.pretrain import backbone_loss, batch_loss, inputs, totals
from k25_jax.train.trainable import merged


def loss_fn(params, batch, experiment: Experiment):
    """(loss, (metrics, what the forward pass observed)), as that of train/pretrain.py."""
    after_BL = after_media(batch)
    batch = batch.replace(loss_weights_BL=jnp.where(after_BL, batch.loss_weights_BL, 0.0))
    pairs = captioned(batch).sum() if experiment.train.siglip_weight else None
    return batch_loss(params, batch, experiment, part_loss, (totals(batch), pairs))


def part_loss(experiment: Experiment, trained, frozen, piece):
    """What `loss_fn` returns, of some rows: their shares of the whole batch's losses and metrics; `trained`, as it is."""
    part, (whole, pairs) = piece
    x_BLD, weight = inputs(merged(trained, frozen), part, experiment), experiment.train.siglip_weight
    loss, (metrics, stats), passed = backbone_loss(trained, frozen, x_BLD, part, whole, experiment)
    if weight:
        contrast = caption_contrast(x_BLD, part, pairs)
        loss, metrics = loss + weight * contrast, metrics | {"siglip": contrast}
    return loss, (metrics, stats), passed


def after_media(batch):
    """True at places whose next token comes after the first image or video of its document, [B,L].

    Places are compared by their positions, as the rows of a batch may be striped (models/context.py).
    """

    def of_row(segments_L, positions_L, media_L):
        places = segments_L.shape[0]
        at_L = jnp.where(media_L >= 0, positions_L, places)
        first_S = jax.ops.segment_min(at_L, segments_L, num_segments=places + 1)
        return (segments_L > 0) & (positions_L >= first_S[segments_L])

    return jax.vmap(of_row)(batch.segments_BL, batch.positions_BL, batch.media_BL)


def caption_contrast(x_BLD, part, pairs):
    """SigLIP's loss over the documents of each row that have an image and a caption, from what the model reads.

    A share of that of a batch in which so many documents have both.
    """
    images_BSD, texts_BSD = (pooled(x_BLD, chosen_BL, part.segments_BL) for chosen_BL in _image_and_caption(part))
    return siglip(images_BSD, texts_BSD, captioned(part), pairs)


def captioned(batch):
    """Which of the first documents of each row have an image and a caption, [B,S]."""
    features_BS, tokens_BS = (counts(chosen_BL, batch.segments_BL) for chosen_BL in _image_and_caption(batch))
    return (features_BS > 0) & (tokens_BS > 0)


def _image_and_caption(batch):
    """The places of images, and those that predict a caption without those of images."""
    is_media_BL = batch.media_BL >= 0
    return is_media_BL, (batch.loss_weights_BL > 0) & ~is_media_BL
