"""What a run reads its batches from: data, or in the stage rl rollouts, with what those need of the trainer (K2.5 §3.5)."""

import functools
import hashlib
import json

import jax
import numpy as np
from jax.sharding import Mesh

from k25_jax.checkpoint.store import sums
from k25_jax.config import ConfigError, Experiment, check_rl
from k25_jax.data.packing import Batch
from k25_jax.parallel import hosts
from k25_jax.rl.ledger import Ledger
from k25_jax.rl.sampler import Sampler
from k25_jax.rl.source import RolloutSource
from k25_jax.runtime.paths import AnyPath
from k25_jax.train.layout import open_data
from k25_jax.train.rl import logprobs

FOLDER = "rl"  # of a run, with its ledger


def open_source(experiment: Experiment, mesh: Mesh, directory: AnyPath):
    """The batches of a run in `directory`; raises ConfigError where it cannot have them."""
    if experiment.stage != "rl":
        return open_data(experiment, mesh)
    check_rl(experiment)
    if jax.process_count() > 1:
        raise ConfigError(
            f"stage='rl' samples in one process, and these are {jax.process_count()}; start one alone, which takes all "
            "devices of its machine"
        )
    if experiment.mesh.pipe > 1 and experiment.mesh.repeats > 1:
        raise ConfigError(
            f"mesh.repeats={experiment.mesh.repeats}: the engine takes layers in their own order, and the stages of such a "
            "pipeline have another; set it to 1 for stage='rl'"
        )
    sampler = Sampler(experiment)
    return RolloutSource(
        experiment, Ledger(directory / FOLDER), sampler, fingerprint, LearnerLogprobs(experiment, mesh)
    )


def fingerprint(params) -> str:
    """What tells weights from others, wherever they lie."""
    return hashlib.sha256(json.dumps(sums(params), sort_keys=True).encode()).hexdigest()[:16]


class LearnerLogprobs:
    """(parameters, batch of samples on the host) -> log-probabilities of its targets by the form that is trained, [B,L]."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._experiment, self._mesh = experiment, mesh
        self._compute = jax.jit(functools.partial(logprobs, experiment=experiment))

    def __call__(self, params, batch: Batch) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            found_BL = np.asarray(self._compute(params, hosts.place(batch, self._mesh, self._experiment)))
        shares = self._mesh.shape["context"]  # over which places lie in stripes (parallel/dep.py)
        return found_BL.reshape(len(found_BL), shares, -1).swapaxes(1, 2).reshape(found_BL.shape)
