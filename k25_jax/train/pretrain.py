"""The loss of pre-training: next-token cross-entropy over packed text and vision (K2.5 §3.3)."""

import functools

import jax
import jax.numpy as jnp

from k25_jax.config import Experiment
from k25_jax.losses.lm import cross_entropy
from k25_jax.models.decoder import head, scan_layers
from k25_jax.models.k25 import hidden_states
from k25_jax.parallel import dep
from k25_jax.parallel.pipeline import pipelined


def loss_fn(params, batch, experiment: Experiment):
    """(loss, (metrics, what the forward pass observed)); of a batch as parallel/dep.py placed it, or of one device."""
    model, config = experiment.model, experiment.train
    dtype, vision_BLD = jnp.dtype(config.compute_dtype), None
    if batch.routes is not None:
        vision_BLD = dep.vision_at_tokens(params, batch, model, dtype, config.vision)
    x_BLD, stats = hidden_states(params, batch, model, config.remat, dtype, vision_BLD, moe_layers(experiment))
    head_DV = head(params).astype(dtype)
    loss, metrics = cross_entropy(x_BLD, head_DV, batch.targets_BL, batch.loss_weights_BL)
    return loss, (metrics, stats)


def moe_layers(experiment: Experiment):
    """How the MoE stack runs: as a pipeline where the mesh (jax.set_mesh) has stages, else layer by layer."""
    mesh, config = jax.sharding.get_abstract_mesh(), experiment.mesh
    if mesh.empty or mesh.shape["pipe"] == 1:
        return scan_layers
    return functools.partial(pipelined, repeats=config.repeats, microbatches=config.microbatches or mesh.shape["pipe"])
