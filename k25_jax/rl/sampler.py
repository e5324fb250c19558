"""Episodes of the policy: an engine with its weights, an environment for each sample, groups of traces (K2.5 §3.5)."""

import asyncio
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping

from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import rollout
from k25_jax.agents.tasks import TaskEnv
from k25_jax.agents.trace import Trace
from k25_jax.config import Experiment, to_dict
from k25_jax.rl.advantages import LEAST
from k25_jax.rl.problems import Problem
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig, fitting
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.pool import KernelPool
from k25_jax.text.tokenizer import load_tokenizer

READY = 4  # sandboxes that wait for the next episode with a tool


class Cancelled(RuntimeError):
    """The run ends, and nothing more is sampled."""


class Sampler:
    """Plays episodes with weights that change between them. `cancel` may be called from any thread, the rest from one."""

    def __init__(self, experiment: Experiment):
        self._experiment, self._config = experiment, experiment.rl
        self._tokenizer = load_tokenizer(experiment.data.tokenizer)
        self._engine: AsyncEngine | None = None
        self._pool: KernelPool | None = None
        self._version = -1
        self._lock, self._cancelled = threading.Lock(), False
        self._under_way: tuple[asyncio.AbstractEventLoop, asyncio.Task] | None = None

    def update(self, params, version: int) -> None:
        """Go on with the weights of this version, of which the engine takes a copy."""
        if version == self._version:
            return
        if self._engine is None:
            engine = Engine(params, self._experiment.model, self._sizes(), self._tokenizer, version)
            self._engine = AsyncEngine(engine)
        else:
            self._engine.update_weights(params, version, self._config.latents)
        self._version = version

    def groups(
        self, asked: Mapping[str, Problem], samples: int, commit: Callable[[str, list[Trace]], None]
    ) -> dict[str, list[Trace]]:
        """So many samples of each problem, by the name of its group; `commit` is called with each group when it is done.

        A group with fewer than two valid traces is sampled again, rl.attempts times in all. Raises Cancelled.
        """
        try:
            return asyncio.run(self._groups(asked, samples, commit))
        except asyncio.CancelledError:
            raise Cancelled("the run ends: sampling was cancelled") from None

    def cancel(self) -> None:
        """End what is sampled, and sample nothing more."""
        with self._lock:
            self._cancelled = True
            if self._under_way:
                loop, task = self._under_way
                loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """End the engine and the sandboxes."""
        for open_one in (self._engine, self._pool):
            if open_one:
                open_one.close()

    async def _groups(self, asked, samples, commit) -> dict[str, list[Trace]]:
        with self._lock:
            if self._cancelled:
                raise Cancelled("the run ends: nothing more is sampled")
            self._under_way = asyncio.get_running_loop(), asyncio.current_task()
        try:
            policy, gate = EnginePolicy(self._engine, self._tokenizer), asyncio.Semaphore(self._config.groups)

            async def one(name: str, problem: Problem) -> list[Trace]:
                async with gate:
                    traces = await self._group(policy, name, problem, samples)
                    commit(name, traces)
                    return traces

            traces = await asyncio.gather(*(one(name, problem) for name, problem in asked.items()))
            return dict(zip(asked, traces, strict=True))
        finally:
            with self._lock:
                self._under_way = None

    async def _group(self, policy: EnginePolicy, name: str, problem: Problem, samples: int) -> list[Trace]:
        for attempt in range(self._config.attempts):
            played = (self._trace(policy, f"{name}-{attempt}-{sample}", problem) for sample in range(samples))
            traces = await asyncio.gather(*played)
            if sum(trace.valid for trace in traces) >= LEAST:
                break
        return traces

    async def _trace(self, policy: EnginePolicy, name: str, problem: Problem) -> Trace:
        config = self._config
        lend = self._kernels().sandbox if problem.config.tool else None
        env = TaskEnv(problem.task, problem.index, lend=lend, mode=problem.config.mode)
        sampling = SampleConfig(temperature=config.temperature, top_p=config.top_p)
        limits = to_dict(config.episode) | {"context": config.episode.context or self._experiment.data.seq_len}
        seed = seed_of(name, self._experiment.train.seed)
        return await rollout(env, policy, sampling, Limits(**limits), seed, name)

    def _kernels(self) -> KernelPool:
        """Sandboxes, from when one is first wanted."""
        self._pool = self._pool or KernelPool(READY)
        return self._pool

    def _sizes(self) -> EngineConfig:
        """Those of an engine for rl.rows answers at once; all samples of a batch may wait for it."""
        experiment, config = self._experiment, self._config
        length = config.episode.context or experiment.data.seq_len
        sizes = fitting(
            experiment.model, config.rows, length, experiment.data.max_image_patches, experiment.train.compute_dtype
        )
        return dataclasses.replace(sizes, queue=config.groups * max(config.samples, config.estimate))


def seed_of(name: str, seed: int) -> int:
    """The seed of an episode, of 32 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest())
