"""The loss of pre-training: next-token cross-entropy over packed text and vision (K2.5 §3.3)."""

import functools

import jax
import jax.numpy as jnp

from k25_jax.config import Experiment
from k25_jax.losses.lm import cross_entropy
from k25_jax.models.decoder import Stats, decode, head, scan_layers
from k25_jax.models.k25 import overlay, splice, vision_features
from k25_jax.parallel import dep
from k25_jax.parallel.pipeline import pipelined
from k25_jax.train.accumulate import accumulated, first_part, in_parts
from k25_jax.train.trainable import merged, split


def loss_fn(params, batch, experiment: Experiment):
    """(loss, (metrics, what the forward pass observed)); of a batch as parallel/hosts.py placed it, or of one device."""
    return batch_loss(params, batch, experiment, part_loss, totals(batch))


def totals(batch):
    """What the mean over a batch divides by: the sum of its weights, and how many places count."""
    return batch.loss_weights_BL.sum(), (batch.loss_weights_BL > 0).sum()


def batch_loss(params, batch, experiment: Experiment, function, whole):
    """What `loss_fn` returns, of the parts that the language model takes one after the other.

    Of a part `function(experiment, trained, frozen, (its rows, whole))` returns its share of the whole batch's loss and
    metrics. Shares are added up; of metrics that end in "_max" the largest is that of the batch.
    """
    loss, (metrics, stats) = over_parts(params, batch, experiment, function, whole)
    if experiment.train.accumulate == 1:
        return loss, (metrics, stats)
    metrics = {name: value.max() if name.endswith("_max") else value.sum() for name, value in metrics.items()}
    return loss, (metrics, Stats(stats.load_YE.sum(axis=0), stats.max_logit_YH.max(axis=0)))


def over_parts(params, batch, experiment: Experiment, function, whole):
    """(the sum of the losses, what was seen) of `function` over all parts; with several, a first axis of what each saw.

    Features are made once for all parts, and are beside the parameters what a part has a gradient for.
    """
    config = experiment.train
    trained, frozen = split(params, config.trainable)
    with_features = trained if trained.keys() & {"vision", "projector"} else frozen
    made = features(params, batch, experiment)
    trained, frozen = (
        {name: value for name, value in half.items() if name not in ("vision", "projector")}
        | ({"features": made} if made is not None and half is with_features else {})
        for half in (trained, frozen)
    )
    function = functools.partial(function, experiment)
    if config.accumulate == 1:
        return function(trained, frozen, (first_part(batch), whole))[:2]
    whole = jax.tree.map(lambda total: jnp.full(config.accumulate, total), whole)
    return accumulated(function, trained, frozen, (in_parts(batch, config.accumulate), whole))


def features(params, batch, experiment: Experiment):
    """What the encoder makes of all packs: [M,D], on a mesh where parallel/dep.py keeps them; None without packs."""
    config, dtype = experiment.train, jnp.dtype(experiment.train.compute_dtype)
    frozen = "vision" not in split(params, config.trainable)[0]
    if batch.routes is not None:
        return dep.features(params, batch, experiment.model, dtype, config.vision, "none" if frozen else "full")
    if not len(batch.vision.patches_PNC):
        return None
    return vision_features(params, batch.vision, experiment.model, "none" if frozen else config.remat, dtype)


def inputs(params, part, experiment: Experiment):
    """What the language model reads of a part, [B,L,D]: embeddings of tokens, features of images in their places.

    `params` has the features of the whole batch too, if there are any.
    """
    config, made, dtype = experiment.model, params.get("features"), jnp.dtype(experiment.train.compute_dtype)
    if part.routes is None:
        return splice(params, part.tokens_BL, part.media_BL, made, config, dtype)
    vision_BLD = dep.at_tokens(made, part.routes, part.media_BL)
    return overlay(params, part.tokens_BL, part.media_BL, vision_BLD, config, dtype)


def next_token(x_BLD, head_DV, part, whole, experiment: Experiment):
    """(loss, metrics) of a part whose last hidden states are x_BLD: its share of the whole batch's cross-entropy."""
    return cross_entropy(x_BLD, head_DV, part.targets_BL, part.loss_weights_BL, whole)


def part_loss(experiment: Experiment, trained, frozen, piece, final=next_token):
    """What `loss_fn` returns, of some rows: their shares of the whole batch's loss and metrics; and `trained`, as it is.

    `final`, called as `next_token` is, makes them of the last hidden states.
    """
    part, whole = piece
    x_BLD = inputs(merged(trained, frozen), part, experiment)
    return backbone_loss(trained, frozen, x_BLD, part, whole, experiment, final)


def backbone_loss(trained, frozen, x_BLD, part, whole, experiment: Experiment, final=next_token):
    """What `part_loss` returns, when the language model reads x_BLD."""
    params, remat = merged(trained, frozen), experiment.train.remat
    layers = experiment.model.text, remat, moe_layers(experiment, trained.get("moe", {}))
    x_BLD, stats, *moe = decode(params, x_BLD, part.segments_BL, part.positions_BL, *layers)
    loss, metrics = final(x_BLD, head(params), part, whole, experiment)
    passed = trained | {"moe": moe[0]} if moe and "moe" in trained else trained
    return loss, (metrics, jax.lax.stop_gradient(stats)), passed


def moe_layers(experiment: Experiment, trained):
    """How the MoE stack runs: as a pipeline where the mesh (jax.set_mesh) has stages, else layer by layer."""
    mesh, config = jax.sharding.get_abstract_mesh(), experiment.mesh
    if mesh.empty or mesh.shape["pipe"] == 1:
        return scan_layers
    microbatches = config.microbatches or mesh.shape["pipe"]
    return functools.partial(pipelined, repeats=config.repeats, microbatches=microbatches, trained=trained)
