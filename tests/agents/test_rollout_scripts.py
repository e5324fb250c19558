"""A thousand random episodes with a scripted model: each has one ending, and the tokens of the engine."""

import asyncio
import threading

import numpy as np

from asking import PAD, Does, runs_of, section
from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import rollout, turn_seed
from k25_jax.agents.trace import ENDINGS
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError, Observation
from scripted import END, TOKENIZER, Scripted, call


class Script:
    """An env, its tools and what the model says in it, all drawn from the seed."""

    task, mode = "script", "instant"
    LATE = threading.Event()  # set when all is over

    def __init__(self, seed: int, engine: Scripted):
        self.rng, self.seed, self.group, self._engine = np.random.default_rng(seed), seed, f"script {seed}", engine
        self.failing = int(self.rng.choice([0, 0, 0, 1, 2, 9]))  # tries that fail
        self.limits = Limits(
            tokens=int(self.rng.choice([40, 200, 4096])),
            turn_tokens=int(self.rng.choice([30, 150, 1024])),
            turns=int(self.rng.integers(1, 5)),
            calls=int(self.rng.integers(0, 4)),
            call_seconds=0.02,
            seconds=float(self.rng.choice([0.03, 60.0, 60.0, 60.0])),
            context=int(self.rng.choice([120, 400, 4000])),
        )
        self.plan = [str(self.rng.choice(list(WORDS))) for _ in range(5)]
        self.stops = self.rng.random() < 0.1
        names = ("ok", "crash", "slow", "fail")
        self.tools = [Does(getattr(self, name), name) for name in names] + [Does(self.coroutine, "coroutine")]
        self.resets = self.closes = self.fails = 0

    def ok(self):
        return Observation("fine " * int(self.rng.integers(1, 9)))

    def crash(self):
        return Observation("[The interpreter was lost]", status="died")

    def slow(self):
        Script.LATE.wait(0.06)
        return Observation("too late")

    def fail(self):
        self.fails += 1
        if self.fails <= self.failing:
            raise InfrastructureError("broken")
        return Observation("mended")

    async def coroutine(self):
        await asyncio.sleep(0.001)
        return Observation("awaited")

    async def reset(self, seed):
        self.resets, self.turn = self.resets + 1, 0
        for turn in range(9):
            self._engine.given.pop(turn_seed(self.seed, turn), None)
        return [{"role": "user", "content": f"script {self.seed}:"}]

    def say(self):
        self.turn += 1
        if self.stops and self.turn == self.seed % 3:
            self.loop.call_soon_threadsafe(self.stop.set)  # in the middle of the turn, or at its end
        return WORDS[self.plan[self.turn - 1]]

    async def step(self, said):
        return [{"role": "user", "content": "go on"}] if self.rng.random() < 0.3 else ()

    def score(self, trace, answer):
        return {"answered": float(bool(answer))}

    async def close(self):
        self.closes += 1


WORDS = {
    "answers": "the answer" + END, "nothing": END, "on and on": "on " * 500, "no picture": "see <|media_pad|> there" + END,
    "ends otherwise": "the end[EOS]" + END, "garbage": "\ud7ff\x00<|im_user|><think></think>" + END,
    "malformed": call('{"a": '), "no such tool": call("{}", "other"), "bad arguments": call('{"\\ud800": 1}', "ok"),
    "empty section": f"<|tool_calls_section_begin|><|tool_calls_section_end|>{END}",
    "cut call": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.ok:0{END}",
    "two": section("ok", "crash"),
} | {name: call("{}", name) for name in ("ok", "crash", "slow", "fail", "coroutine")}  # fmt: skip


def test_a_thousand_random_scripts_each_have_one_ending_and_the_tokens_of_the_engine():
    scripts: dict[int, Script] = {}
    engine = Scripted(lambda prompt: scripts[int(prompt.partition("script ")[2].partition(":")[0])].say(), pace=40)
    scripts |= {seed: Script(seed, engine) for seed in range(1000)}

    async def one(script, policy, width):
        async with width:
            script.stop, script.loop = asyncio.Event(), asyncio.get_running_loop()
            if script.stops and script.seed % 3 == 0:
                script.loop.call_later(0.01 * script.rng.random(), script.stop.set)
            how = SampleConfig(temperature=1.0)
            return await rollout(script, policy, how, script.limits, script.seed, stop=script.stop)

    async def work(policy):
        width = asyncio.Semaphore(32)
        traces = await asyncio.gather(*(one(script, policy, width) for script in scripts.values()))
        assert len(asyncio.all_tasks()) == 1
        return traces

    with AsyncEngine(engine) as running:
        traces = asyncio.run(work(EnginePolicy(running, TOKENIZER)))
        assert not engine.busy
    Script.LATE.set()
    for script, trace in zip(scripts.values(), traces, strict=True):
        check_script(script, trace, engine)
    assert {trace.ending for trace in traces} == set(ENDINGS)


def check_script(script: Script, trace, engine: Scripted):
    limits, turns = script.limits, runs_of(trace)
    given = [engine.given.get(turn_seed(script.seed, turn)) for turn in range(9)]
    given = [one for one in given if one is not None and one.tokens]
    assert turns == [one.tokens for one in given], (script.seed, trace.ending)
    assert script.resets == script.closes <= 1 + min(script.fails, 2, script.failing)
    assert trace.ending == "seconds" or script.stops or script.resets == 1 + min(script.fails, 2, script.failing)
    logprobs = [p for one in given for p in one.logprobs]
    if turns:
        (segment,) = trace.segments
        assert segment.logprobs[segment.sampled].tolist() == logprobs and segment.reason == trace.ending
        assert len(segment.tokens) <= limits.context and segment.sampled[-1]
    assert len(turns) <= limits.turns and trace.length <= limits.tokens
    assert all(len(turn) <= limits.turn_tokens for turn in turns)
    last = script.plan[len(turns) - 1] if turns else ""
    holds = {
        "answer": last in ("answers", "nothing", "garbage", "ends otherwise"),
        "turns": len(turns) == limits.turns,
        "calls": last not in ("answers", "nothing", "garbage"),
        "tokens": trace.length == limits.tokens,
        "length": turns and len(turns[-1]) == limits.turn_tokens,
        "context": trace.problem.startswith("the prompt") or (turns and len(segment.tokens) == limits.context),
        "seconds": limits.seconds < 1,
        "media": turns and turns[-1][-1] == PAD,
        "cancelled": script.stops,
        "infrastructure": (script.fails == 3 or script.stops) and trace.problem == "broken",
    }
    assert holds[trace.ending], (script.seed, trace.ending, script.plan, limits)
    assert bool(trace.rewards) == trace.valid and bool(trace.answer) <= (trace.ending == "answer")
