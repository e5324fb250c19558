"""Tokens a second of the sampling engine, the preset 1b in bfloat16, beside what reading its weights for each step allows."""

import argparse
import gc
import math
import time

import jax
import jax.numpy as jnp

from benchmarks.on_gpu.asking import ask_engine, draw
from benchmarks.on_gpu.run import Run, seconds
from benchmarks.on_gpu.training import minute
from k25_jax.config import preset
from k25_jax.models.k25 import init_params
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig

AT_ONCE = (32, 256)
ASKED = argparse.Namespace(prompt=192, answer=160, waves=2)


def run(run: Run) -> None:
    """Lines: bytes a second of a copy, then tokens a second with so many requests at once."""
    bandwidth = measured_bandwidth(2**16 if run.small else 2**32)
    run.line("copy_bandwidth", bandwidth / 1e9, "GB/s", dtype="float32")
    model = minute() if run.small else preset("1b")
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    for at_once in (2,) if run.small else AT_ONCE:
        run.attempt(f"engine_{at_once}", measure, run, model, params, at_once, bandwidth, seconds=3)
        gc.collect()  # its cache


def measure(run: Run, model, params, at_once: int, bandwidth: float) -> None:
    """The first turn is not timed. The limit: a token for each request every time all weights are read once."""
    asked = argparse.Namespace(prompt=20, answer=18, waves=1) if run.small else ASKED
    pages = at_once * math.ceil((asked.prompt + asked.answer) / EngineConfig.page_size)
    settings = EngineConfig(
        rows=(at_once,), pieces=(max(2, at_once // 8),), pages=pages, max_length=asked.prompt + asked.answer,
        queue=2 * at_once, vision_patches=(), dtype="bfloat16",
    )  # fmt: skip
    began, engine = time.monotonic(), Engine(params, model, settings)
    engine.warm_up()
    warm, rates = time.monotonic() - began, []
    for turn in range(2 if run.small else 3):
        requests = draw(model, asked, at_once, turn)
        began = time.monotonic()
        answers = ask_engine(engine, requests, at_once)
        rates.append(sum(map(len, answers)) / (time.monotonic() - began))
        if run.left() < 3 * (time.monotonic() - began):
            break
    read = sum(
        a.nbytes for name, part in params.items() if name not in ("vision", "projector") for a in jax.tree.leaves(part)
    )
    limit, rate = at_once * bandwidth / read, max(rates[1:] or rates)
    run.line(
        f"engine_{at_once}", rate, "tokens/s", peer="all weights read once a step", peer_value=limit, ratio=rate / limit,
        dtype="bfloat16", requests=len(requests), warm_up_seconds=warm, steps=engine.stats()["steps"],
        preempted=engine.stats()["preempted"],
    )  # fmt: skip


def measured_bandwidth(size: int) -> float:
    """Bytes a second of a copy, those read and those written."""
    a = jax.random.normal(jax.random.key(0), (size // 4,))
    copy = jax.jit(lambda a: a + 1)
    return 2 * size / seconds({"copy": lambda: copy(a)}, rounds=3)["copy"]
