"""Which loss a stage of training has (K2.5 §3.3). Long-context mid-training is joint pre-training with longer rows."""

from k25_jax.config import Experiment
from k25_jax.train import pretrain, vit


def loss_of(experiment: Experiment):
    """The loss_fn(params, batch, experiment) of `experiment.stage`."""
    return {"pretrain": pretrain.loss_fn, "vit": vit.loss_fn}[experiment.stage]
