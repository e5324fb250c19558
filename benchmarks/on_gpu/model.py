"""Is the model right on this card? Steps of training and answers of the engine, tiny, against the same on the CPU.

The CPU's side runs beside this one, in a process of its own: python -m benchmarks.on_gpu.model [small] prints its results.
"""

import argparse
import json
import os
import subprocess
import sys

import jax
import numpy as np

from benchmarks.on_gpu.asking import ask_engine, draw
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.training import experiment_of, make_batch, minute
from k25_jax.config import K25Config, preset
from k25_jax.models.k25 import init_params
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step

STEPS, ROWS, LENGTH = 3, 2, 128
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses and of norms of gradients
LOGPROB_BOUND = 1e-3
ASKED = argparse.Namespace(prompt=40, answer=24, waves=1)


def run(run: Run) -> None:
    """Lines: how far losses, norms of gradients and log-probabilities are off, and how many answers are the same."""
    command = [sys.executable, "-m", "benchmarks.on_gpu.model", *["small"] * run.small]
    variables = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as child:
        try:
            mine = results(run.small)
            theirs, _ = child.communicate(timeout=max(run.left(), 1))
        finally:
            child.kill()
    if child.returncode:
        raise RuntimeError(f"the CPU's side ended with status {child.returncode}")
    theirs = json.loads(theirs.splitlines()[-1])
    for dtype in mine["steps"]:
        bound = BOUNDS[dtype]
        for name in ("loss", "grad_norm"):
            got, want = (np.asarray(side["steps"][dtype][name]) for side in (mine, theirs))
            error = float(np.max(np.abs(got - want) / np.abs(want)))
            run.line(f"step_{name}_error", error, "relative", peer="CPU", bound=bound, ok=error <= bound, dtype=dtype)
    got, want = mine["answers"], theirs["answers"]
    same = float(np.mean([[t for t, _ in a] == [t for t, _ in b] for a, b in zip(got, want, strict=True)]))
    run.line("engine_same_answers", same, "of 1", peer="CPU", bound=1.0, ok=same == 1.0, dtype="float32")
    error = max(agreeing(a, b) for a, b in zip(got, want, strict=True))
    ok = error <= LOGPROB_BOUND
    run.line("engine_logprob_error", error, "absolute", peer="CPU", bound=LOGPROB_BOUND, ok=ok, dtype="float32")


def agreeing(answer, other) -> float:
    """The largest difference of log-probabilities, up to where the tokens part."""
    worst = 0.0
    for (token, logprob), (other_token, other_logprob) in zip(answer, other, strict=True):
        worst = max(worst, abs(logprob - other_logprob))
        if token != other_token:
            break
    return worst


def results(small: bool) -> dict:
    """Losses and norms of gradients, and greedy answers in float32, which is not rounded to TF32."""
    model = minute() if small else preset("tiny")
    with jax.default_matmul_precision("highest"):
        types = ("float32",) if small else BOUNDS  # of small sizes, the part `training` sees to the other
        return {"steps": {dtype: steps(model, dtype) for dtype in types}, "answers": answers(model)}


def steps(model: K25Config, dtype: str) -> dict:
    experiment = experiment_of(model, ROWS, LENGTH, dtype, side=8)
    step, state = make_step(experiment, loss_fn), init_state(experiment)
    seen = {"loss": [], "grad_norm": []}
    for seed in range(STEPS):
        state, metrics = step(state, make_batch(experiment, seed))
        for name, values in seen.items():
            values.append(float(metrics[name]))
    return seen


def answers(model: K25Config) -> list:
    """(token, log-probability) of the answers to eight requests that run together."""
    settings = EngineConfig(rows=(8,), pieces=(2,), pages=64, max_length=128, vision_patches=())
    engine = Engine(init_params(model, jax.random.key(0)), model, settings)
    answers = ask_engine(engine, draw(model, ASKED, 8, 0), 8)
    return [[(int(token), float(logprob)) for token, logprob in answer] for answer in answers]


if __name__ == "__main__":
    print(json.dumps(results(small="small" in sys.argv)))
