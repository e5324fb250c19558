"""The loss of pre-training: next-token cross-entropy over packed text and vision (K2.5 §3.3)."""

import functools

import jax
import jax.numpy as jnp

from k25_jax.config import Experiment
from k25_jax.losses.lm import cross_entropy
from k25_jax.models.decoder import Stats, decode, head, scan_layers
from k25_jax.models.k25 import embedded
from k25_jax.parallel import dep
from k25_jax.parallel.pipeline import pipelined
from k25_jax.train.accumulate import accumulated, in_parts
from k25_jax.train.trainable import merged, split


def loss_fn(params, batch, experiment: Experiment):
    """(loss, (metrics, what the forward pass observed)); of a batch as parallel/dep.py placed it, or of one device."""
    return language_loss(params, inputs(params, batch, experiment), batch, experiment)


def inputs(params, batch, experiment: Experiment):
    """What the language model reads, [B,L,D]: embeddings of tokens, features of images in their places."""
    config, dtype, vision_BLD = experiment.train, jnp.dtype(experiment.train.compute_dtype), None
    frozen = "vision" not in split(params, config.trainable)[0]
    if batch.routes is not None:
        remat = "none" if frozen else "full"
        vision_BLD = dep.vision_at_tokens(params, batch, experiment.model, dtype, config.vision, remat)
    remat = "none" if frozen else config.remat
    return embedded(params, batch, experiment.model, remat, dtype, vision_BLD)


def language_loss(params, x_BLD, batch, experiment: Experiment):
    """What `loss_fn` returns, when the language model reads x_BLD."""
    config, weights_BL = experiment.train, batch.loss_weights_BL
    rows = batch.segments_BL, batch.positions_BL, batch.targets_BL, weights_BL
    whole = weights_BL.sum(), (weights_BL > 0).sum()
    backbone = [
        {name: value for name, value in part.items() if name not in ("vision", "projector")}
        for part in split(params, config.trainable)
    ]
    function = functools.partial(backbone_loss, experiment)
    if config.accumulate == 1:
        return function(*backbone, x_BLD, (*rows, whole))
    x_ABLD, *rows = (in_parts(a, config.accumulate) for a in (x_BLD, *rows))
    whole = tuple(jnp.full(config.accumulate, total) for total in whole)
    loss, (metrics, stats) = accumulated(function, *backbone, x_ABLD, (*rows, whole))
    metrics = {name: value.sum() for name, value in metrics.items()}
    return loss, (metrics, Stats(stats.load_YE.sum(axis=0), stats.max_logit_YH.max(axis=0)))


def backbone_loss(experiment: Experiment, trained, frozen, x_BLD, part):
    """What `loss_fn` returns, of some rows: their shares of the whole batch's loss and metrics."""
    params = merged(trained, frozen)
    segments_BL, positions_BL, targets_BL, weights_BL, whole = part
    layers = experiment.model.text, experiment.train.remat, moe_layers(experiment)
    x_BLD, stats = decode(params, x_BLD, segments_BL, positions_BL, *layers)
    loss, metrics = cross_entropy(x_BLD, head(params), targets_BL, weights_BL, whole)
    return loss, (metrics, jax.lax.stop_gradient(stats))


def moe_layers(experiment: Experiment):
    """How the MoE stack runs: as a pipeline where the mesh (jax.set_mesh) has stages, else layer by layer."""
    mesh, config = jax.sharding.get_abstract_mesh(), experiment.mesh
    if mesh.empty or mesh.shape["pipe"] == 1:
        return scan_layers
    return functools.partial(pipelined, repeats=config.repeats, microbatches=config.microbatches or mesh.shape["pipe"])
