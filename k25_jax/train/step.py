"""One training step: gradients, update, the router's sign rule, QK-Clip, and the guard against NaN and infinity."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from k25_jax.config import Experiment
from k25_jax.models.moe import balanced_bias
from k25_jax.optim.muonclip import muonclip, qk_clip
from k25_jax.optim.schedules import warmup_stable_decay
from k25_jax.train.parts import norms, squares
from k25_jax.train.state import TrainState, state_shardings
from k25_jax.train.trainable import merged, split


def make_step(experiment: Experiment, loss_fn, mesh: Mesh | None = None):
    """A jitted (state, batch) -> (state, metrics). The state is donated: use the returned one.

    On a mesh the state stays laid out as `state_shardings` says; call the step under jax.set_mesh(mesh).

    A step whose loss or gradient is not finite changes nothing but the step number and reports `bad` = 1. So does one of
    samples without an advantage, `skipped` = 1: MuonClip makes an update as large as any other of however small a gradient.
    Nothing moves what train.trainable leaves out.
    """
    layout, names = None if mesh is None else state_shardings(experiment, mesh), experiment.train.trainable
    trained_layout = layout and split(layout.params, names)[0]
    optimizer = muonclip(experiment.optim, experiment.train.steps, trained_layout)
    rate = warmup_stable_decay(experiment.optim, experiment.train.steps)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=layout and (layout, None))
    def step(state: TrainState, batch):
        trained, frozen = split(state.params, names)
        grad_fn = jax.value_and_grad(lambda trained: loss_fn(merged(trained, frozen), batch, experiment), has_aux=True)
        (loss, (metrics, stats)), grads = grad_fn(trained)
        if layout:  # the means may lie otherwise, which is no reason to compute a gradient otherwise
            grads = jax.lax.with_sharding_constraint(grads, trained_layout)
        grad_squares = squares(grads)
        grad_norm = jnp.sqrt(optax.tree.sum(grad_squares))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        taught = teaches(batch)
        moves = finite if taught is None else finite & taught
        updates, opt_state = optimizer.update(grads, state.opt_state, trained, grad_norm=grad_norm, finite=moves)
        metrics |= norms(grad_squares, experiment.model, "grad_norm")
        metrics |= norms(squares(updates), experiment.model, "update_norm")
        metrics |= {"learning_rate": rate(state.opt_state.count)}
        params = merged(optax.apply_updates(trained, updates), frozen)
        params = with_balanced_router(params, jnp.where(moves, stats.load_YE, 0), experiment)
        metrics |= {"grad_norm": grad_norm, "bad": 1 - finite.astype(jnp.int32), "max_logit": stats.max_logit_YH.max()}
        metrics |= {} if taught is None else {"skipped": (finite & ~moves).astype(jnp.int32)}
        metrics |= router_metrics(stats.load_YE)
        if experiment.optim.name == "muonclip" and trained.keys() & {"dense", "moe"}:
            max_logit_YH = jnp.where(moves, stats.max_logit_YH, 0)
            params, clipped = qk_clip(params, max_logit_YH, experiment.model.text, experiment.optim.qk_clip)
            metrics |= {"heads_clipped": clipped}
        params = merged(params, frozen)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def teaches(batch):
    """Whether there is anything to learn from a batch of samples: an advantage that is not 0. None for other batches."""
    advantages_BL = getattr(batch, "advantages_BL", None)
    return None if advantages_BL is None else jnp.any((batch.loss_weights_BL > 0) & (advantages_BL != 0))


@jax.named_scope("optimizer.router_bias")
def with_balanced_router(params, load_YE, experiment: Experiment):
    """`params` with the router biases moved by the sign rule; equal loads, such as none, move nothing."""
    if "moe" not in params:
        return params
    moe = params["moe"]["moe"]
    bias_YE = balanced_bias(moe["router_bias"], load_YE, experiment.model.text.moe.bias_rate)
    return params | {"moe": params["moe"] | {"moe": moe | {"router_bias": bias_YE}}}


def router_metrics(load_YE) -> dict:
    """The worst ratio of the busiest expert's load to the mean, over the layers."""
    if not load_YE.shape[0]:
        return {}
    load_YE = load_YE.astype(jnp.float32)
    return {"router_max_over_mean": (load_YE.max(axis=-1) / jnp.maximum(load_YE.mean(axis=-1), 1e-9)).max()}
