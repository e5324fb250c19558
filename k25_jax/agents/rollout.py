"""The driver of episodes: a model speaks, its calls are made, it goes on with what they gave, until it answers (K2.5 §3.5).

    async with Rollouts(((env, seed) for ..), policy, sampling, limits, width=32) as episodes:
        async for place, trace in episodes:
            ..

Every token that the policy drew is in the trace, with its log-probability and version. Equal seeds give equal episodes,
whatever else runs, as far as the policy and the tools do. No episode waits for the tool of another.
"""

import asyncio
import collections
import dataclasses
import hashlib
import inspect
import itertools
import logging
import math
from collections.abc import Awaitable, Iterable, Iterator

from k25_jax.agents.context import Context
from k25_jax.agents.env import Env, Limits
from k25_jax.agents.policy import Policy
from k25_jax.agents.threads import Late, in_thread
from k25_jax.agents.tools import Tool, tool_for
from k25_jax.agents.trace import Trace, clip_key
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.text.tool_calls import BadCall, Call, Said

RETRIES = 2

logger = logging.getLogger(__name__)


async def rollout(
    env: Env,
    policy: Policy,
    sampling: SampleConfig,
    limits: Limits | None = None,
    seed: int = 0,
    id: str = "",
    retries: int = RETRIES,
    stop: asyncio.Event | None = None,
) -> Trace:
    """One episode, from `env.reset(seed)` to the trace with its rewards; whatever happens in it, it has one ending.

    `sampling` says temperature and top_p, the limits how many tokens. After an InfrastructureError it begins anew, up to
    `retries` times; then it ends as "infrastructure", without rewards, as does one that is "cancelled" because the caller
    sets `stop`. A turn in which the model writes a <|media_pad|>, for which there is no picture, ends it as "media". All
    other exceptions are mistakes of ours, or of the env, and raised. `env.close()` follows each `env.reset()`.
    """
    limits, stop = limits or Limits(), stop or asyncio.Event()
    id = id or f"{env.group}#{seed}"
    for tries in itertools.count():
        episode = _Episode(env, policy, sampling, limits, seed, id, stop)
        try:
            return await episode.play()
        except InfrastructureError as problem:
            if tries >= retries or stop.is_set():
                return episode.trace("infrastructure", str(problem) or type(problem).__name__)
            logger.info("%s: %s; once more", id, problem)
        finally:
            await _close(env)


async def _close(env: Env) -> None:
    try:
        await env.close()
    except InfrastructureError as problem:  # the episode is over, and its trace is good
        logger.warning("%s: %s", env.group, problem)


class _Over(Exception):
    """The episode ends."""

    def __init__(self, ending: str, problem: str = ""):
        super().__init__(ending)
        self.ending, self.problem = ending, problem


class _Episode:
    """One try of an episode."""

    def __init__(
        self,
        env: Env,
        policy: Policy,
        sampling: SampleConfig,
        limits: Limits,
        seed: int,
        id: str,
        cancelled: asyncio.Event,
    ):
        self._env, self._policy, self._limits, self._seed, self._id = env, policy, limits, seed, id
        special, config = policy.tokenizer.special, policy.reader.config
        self._pad = config.media_pad_id
        ends = (*sampling.stop_ids, special["<|im_end|>"], *config.eos_ids, self._pad)
        self._sampling = dataclasses.replace(sampling, stop_ids=tuple(dict.fromkeys(ends)))
        self._cancelled, self._halt = cancelled, asyncio.Event()
        self._context: Context | None = None
        self._calls, self._answer = 0, ""
        self._hanging: dict[int, Tool] = {}  # by id: they have not come back from a call
        self._in_order = asyncio.Lock()

    async def play(self) -> Trace:
        """Begin, take turns until it is over, score."""
        follows = asyncio.ensure_future(self._follow())
        try:
            ending, problem = await self._turns(), ""
        except _Over as over:
            ending, problem = over.ending, over.problem
        finally:
            follows.cancel()
        trace = self.trace(ending, problem)
        if not trace.valid:
            return trace
        rewards = await in_thread(self._env.score, trace, trace.answer)
        return dataclasses.replace(trace, rewards=dict(rewards))

    def trace(self, ending: str, problem: str = "") -> Trace:
        """What was sampled so far, as a trace that ended so."""
        segments, clips = self._context.segments(ending) if self._context else ((), ())
        clips = {clip_key(clip): clip for clip in clips}
        answer = self._answer if ending == "answer" else ""
        names = (self._id, self._env.group, self._env.task, self._seed)
        return Trace(*names, segments, clips, {}, ending, problem, answer)

    async def _turns(self) -> str:
        messages = await self._unless_halted(self._env.reset(self._seed))
        self._context = Context(self._policy, self._env.tools, self._env.mode, messages)
        clock = None
        if math.isfinite(self._limits.seconds):
            clock = asyncio.get_running_loop().call_later(self._limits.seconds, self._halt.set)
        try:
            for turn in range(self._limits.turns):
                said = await self._speak(turn)
                last = turn == self._limits.turns - 1
                if said.calls and last:
                    return "turns"
                if said.calls:
                    await self._call(said)
                    continue
                messages = await self._unless_halted(self._env.step(said))
                if not messages:
                    self._answer = said.content
                    return "answer"
                for message in messages:
                    self._context.add(message)
            return "turns"
        finally:
            if clock:
                clock.cancel()

    # ------------------------------------------------------------------------------------------------------ the model
    async def _speak(self, turn: int) -> Said:
        """One turn of the model, as long as the limits allow."""
        prompt = self._context.prompt()
        shown = sum(clip.tokens for clip in prompt.clips)
        room = min(self._limits.context or math.inf, self._policy.max_length) - len(prompt.tokens)
        left = self._limits.tokens - self._context.sampled
        if left < 1:
            raise _Over("tokens")
        if room < 1 or (shown > self._policy.vision_tokens and turn > 0):
            raise _Over(
                "context", f"the prompt of turn {turn} has {len(prompt.tokens)} tokens, {shown} of them of pictures"
            )
        most = {"length": self._limits.turn_tokens, "tokens": left, "context": room}
        cut = min(most, key=most.get)
        how = dataclasses.replace(self._sampling, max_tokens=most[cut], seed=turn_seed(self._seed, turn))
        completion = await self._policy.say(prompt.tokens, prompt.clips, how, self._halt)
        self._context.take(prompt, completion)
        if completion.reason == "abort" and self._halt.is_set():
            raise self._halted()
        if completion.reason not in ("stop", "length"):
            raise InfrastructureError(completion.error or f"the answer ended by {completion.reason!r}")
        if completion.reason == "length":
            raise _Over(cut)
        if completion.tokens[-1] == self._pad:
            raise _Over("media", f"turn {turn}: the model wrote a <|media_pad|>, for which there is no picture")
        said = self._context.say(completion.tokens)
        if not said.whole:
            raise _Over("length", f"turn {turn}: token {completion.tokens[-1]} ends no turn")
        return said

    # ------------------------------------------------------------------------------------------------------- its calls
    async def _call(self, said: Said) -> None:
        """Make the calls of a turn, as many as there may be."""
        calls = said.calls[: self._limits.calls - self._calls]
        self._calls += len(calls)
        tasks = [asyncio.ensure_future(self._make(call)) for call in calls]
        try:
            for call, observation in zip(calls, await self._unless_halted(asyncio.gather(*tasks)), strict=True):
                self._context.observe(call, observation)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if len(calls) < len(said.calls):
            raise _Over("calls")

    async def _make(self, call: Call | BadCall) -> Observation:
        """The observation of a call: those of blocking tools one after the other, the others at once."""
        tool, seconds = tool_for(call, self._env.tools), self._limits.call_seconds
        if isinstance(tool, Observation):
            return tool
        late = Observation(f"[Stopped: the call took longer than {seconds:g} seconds.]", status="deadline")
        if inspect.iscoroutinefunction(tool.call):
            making = asyncio.ensure_future(tool.call(call.arguments))
            try:
                await asyncio.wait({making}, timeout=seconds)
                return making.result() if making.done() else late
            finally:
                making.cancel()
                await asyncio.gather(making, return_exceptions=True)
        async with self._in_order:
            if id(tool) in self._hanging:
                return Observation(f"Error: {tool.name} has not come back from an earlier call", status="error")
            self._hanging[id(tool)] = tool
            try:
                return await in_thread(self._blocking, tool, call, seconds=seconds)
            except Late:
                return late

    def _blocking(self, tool: Tool, call: Call) -> Observation:
        try:
            return tool.call(call.arguments)
        finally:
            del self._hanging[id(tool)]

    # ------------------------------------------------------------------------------------------------------- its end
    async def _follow(self) -> None:
        await self._cancelled.wait()
        self._halt.set()

    def _halted(self) -> _Over:
        return _Over("cancelled" if self._cancelled.is_set() else "seconds")

    async def _unless_halted(self, work: Awaitable):
        """What `work` gives, unless the episode is halted before: then it is cancelled."""
        working, halt = asyncio.ensure_future(work), asyncio.ensure_future(self._halt.wait())
        try:
            await asyncio.wait({working, halt}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise self._halted()
        finally:
            halt.cancel()
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn, 32 bits: other turns and other episodes have others."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {turn}".encode(), digest_size=4).digest(), "big")


class Rollouts:
    """Many episodes, at most `width` of them begun and not yet given: iterate for (place, trace) in the order of their ends.

    `episodes` are envs with their seeds, and read as there is room. `endings` counts the traces so far by ending, `open`
    are under way. An exception of one ends all; whoever leaves `async with` early cancels what is open.
    """

    def __init__(
        self,
        episodes: Iterable[tuple[Env, int]],
        policy: Policy,
        sampling: SampleConfig,
        limits: Limits | None = None,
        width: int = 32,
        retries: int = RETRIES,
    ):
        if width < 1:
            raise ValueError(f"width={width} episodes at once: at least 1")
        self.endings: collections.Counter[str] = collections.Counter()
        self._episodes, self._width = enumerate(episodes), width
        self._how = policy, sampling, limits
        self._retries = retries
        self._places: dict[asyncio.Task, int] = {}
        self._ended: asyncio.Queue[asyncio.Task] = asyncio.Queue()

    @property
    def open(self) -> int:
        """Episodes under way."""
        return sum(not task.done() for task in self._places)

    async def __aenter__(self) -> "Rollouts":
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self) -> None:
        """Cancel what is open, and wait until it has given back what it held."""
        for task in self._places:
            task.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)
        self._places.clear()

    def __aiter__(self) -> "Rollouts":
        return self

    async def __anext__(self) -> tuple[int, Trace]:
        for place, (env, seed) in itertools.islice(self._episodes, self._width - len(self._places)):
            task = asyncio.ensure_future(rollout(env, *self._how, seed, retries=self._retries))
            task.add_done_callback(self._ended.put_nowait)
            self._places[task] = place
        if not self._places:
            raise StopAsyncIteration
        task = await self._ended.get()
        place, trace = self._places.pop(task), task.result()
        self.endings[trace.ending] += 1
        return place, trace


def play(
    episodes: Iterable[tuple[Env, int]],
    policy: Policy,
    sampling: SampleConfig,
    limits: Limits | None = None,
    width: int = 32,
) -> Iterator[tuple[int, Trace]]:
    """`Rollouts` for who has no event loop."""
    with asyncio.Runner() as runner:
        many = Rollouts(episodes, policy, sampling, limits, width)
        try:
            while (ended := runner.run(_next(many))) is not None:
                yield ended
        finally:
            runner.run(many.close())


async def _next(many: Rollouts) -> tuple[int, Trace] | None:
    return await anext(many, None)
