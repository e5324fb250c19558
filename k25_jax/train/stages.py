"""Which loss a stage of training has (K2.5 §3.3, §3.5). Long-context mid-training is joint pre-training with longer rows."""

from k25_jax.config import Experiment
from k25_jax.train import pretrain, rl, vit


def loss_of(experiment: Experiment):
    """The loss_fn(params, batch, experiment) of `experiment.stage`."""
    return {"pretrain": pretrain.loss_fn, "vit": vit.loss_fn, "rl": rl.loss_fn}[experiment.stage]
