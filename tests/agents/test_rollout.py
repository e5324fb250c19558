"""Episodes with a scripted model: calls are made, mistakes are answered, limits hold, and nobody waits for anybody."""

import asyncio
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from asking import END_ID, GREEDY, LIMITS, PAD, Asking, Does, after, calling, run, runs_of, section
from k25_jax.agents.context import Context
from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import Rollouts, play, rollout, turn_seed
from k25_jax.agents.tools import IPython
from k25_jax.agents.trace import TraceError
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.requests import Completion, Request
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError, Observation
from scripted import END, TOKENIZER, Scripted, call


@pytest.fixture(scope="module")
def tool(sandbox):
    return IPython(sandbox, seconds=20)


# ------------------------------------------------------------------------------------------------------------ one episode
def test_a_call_is_made_and_its_result_is_read(tool):
    def say(prompt):
        if "## Return of functions.ipython:0" in prompt:
            return after(prompt, "ipython:0\n").partition(END)[0] + END
        return call(json.dumps({"code": "6*7"}))

    env = Asking(tool)
    trace, engine = run(say, env)
    assert (trace.ending, trace.answer, trace.rewards) == ("answer", "42", {"length": 0.02})
    assert runs_of(trace) == [c.tokens for c in engine.given.values()] and trace.segments[0].turns == 2
    assert (env.resets, env.closes, trace.task, trace.group, trace.id) == (1, 1, "asking", "asking", "asking#0")
    text = TOKENIZER.decode(trace.segments[0].tokens)
    assert text.endswith(
        f"## Return of functions.ipython:0\n42{END}<|im_assistant|>assistant<|im_middle|><think></think>42{END}"
    )


def test_tokens_have_the_log_probabilities_and_versions_of_the_engine():
    env = Asking(Does(lambda: Observation("done")))
    trace, engine = run(Scripted(lambda p: "yes" + END if "done" in p else calling(), version=7), env, seed=5)
    (segment,) = trace.segments
    given = list(engine.given.values())
    assert segment.logprobs[segment.sampled].tolist() == [p for one in given for p in one.logprobs]
    assert set(segment.versions[segment.sampled].tolist()) == {7} and segment.sampled[-1]
    assert [r.sampling.seed for r in engine.requests] == [turn_seed(5, 0), turn_seed(5, 1)]
    assert len({turn_seed(seed, turn) for seed in range(300) for turn in range(10)}) == 3000


def test_a_bad_call_is_answered_and_the_episode_goes_on(tool):
    trace, _ = run(lambda p: "sorry" + END if "Error:" in p else call('{"code": '), Asking(tool))
    assert (trace.ending, trace.answer) == ("answer", "sorry")
    assert "Error: the arguments are not JSON" in TOKENIZER.decode(trace.segments[0].tokens)


def test_an_env_goes_on_after_an_answer_until_it_has_no_more_to_say():
    trace, _ = run(lambda p: after(p, "user<|im_middle|>").partition(END)[0] + "!" + END, Asking(follows=("b", "c")))
    assert (trace.ending, trace.answer, trace.segments[0].turns) == ("answer", "c!", 3)
    trace, _ = run(lambda p: "so" + END, Asking(follows="bcd"))
    assert (trace.ending, trace.answer, trace.segments[0].turns) == ("turns", "", 3)


@pytest.mark.parametrize(
    "say, limits, ending, turns",
    [
        (calling, Limits(turns=2), "turns", 2),
        (calling, Limits(turns=9, calls=0), "calls", 1),
        (calling, Limits(turns=9, calls=3), "calls", 4),
        (lambda p: "word " * 100, Limits(turn_tokens=50), "length", 1),
        (lambda p: "word " * 100, Limits(tokens=50), "tokens", 1),
        (lambda p: "word " * 100, Limits(context=150), "context", 1),
        (lambda p: "never asked", Limits(context=20), "context", 0),
        (lambda p: "a<|media_pad|>b" + END, Limits(), "media", 1),
        (lambda p: "a" + END + "b", Limits(), "answer", 1),
    ],
)
def test_each_limit_has_its_ending(say, limits, ending, turns):
    env = Asking(Does(lambda: Observation("")))
    trace, engine = run(say, env, limits)
    assert (trace.ending, len(runs_of(trace)), len(engine.requests)) == (ending, turns, turns)
    assert runs_of(trace) == [c.tokens for c in engine.given.values()]
    assert trace.answer == ("a" if ending == "answer" else "") and trace.rewards == {"length": len(trace.answer) / 100}
    if ending == "media":
        assert trace.segments[0].tokens[-1] == PAD and trace.segments[0].sampled[-1]
    if trace.segments:
        assert len(trace.segments[0].tokens) <= (limits.context or 4096)


def test_limits_of_all_turns_cut_inside_a_turn():
    """Of 4 calls in a turn the first 3 are made; the second turn gets the tokens that are left."""
    made = []
    trace, _ = run(
        lambda p: section(*4 * ["do"]), Asking(Does(lambda: made.append(1) or Observation(""))), Limits(calls=3)
    )
    assert (trace.ending, len(made)) == ("calls", 3)
    most = len(TOKENIZER.encode(calling(), allow_special=True))
    trace, engine = run(calling, Asking(Does(lambda: Observation(""))), Limits(tokens=most + 5))
    assert trace.ending == "tokens" and [r.sampling.max_tokens for r in engine.requests] == [most + 5, 5]
    assert trace.length == most + 5


def test_pictures_that_a_tool_shows_are_in_the_trace_once_for_each_vision_token():
    shown = np.random.default_rng(0).integers(0, 255, (28, 56, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shown).save(file, "PNG")
    env = Asking(Does(lambda: Observation("two:", (file.getvalue(), file.getvalue()))))
    trace, engine = run(lambda p: "seen" + END if "two:" in p else calling(), env)
    (segment,) = trace.segments
    assert len(segment.clips) == 2 and len(set(segment.clips)) == len(trace.clips) == 1
    assert (segment.tokens == PAD).sum() == 2 * trace.clips[segment.clips[0]].tokens == 4
    assert [len(r.clips) for r in engine.requests] == [0, 2]
    assert segment.tokens.tolist() == [*engine.requests[1].tokens, *engine.given[turn_seed(0, 1)].tokens]
    broken = Asking(Does(lambda: Observation("two:", (b"no picture",))))
    trace, _ = run(lambda p: "seen" + END if "two:" in p else calling(), broken)
    assert trace.answer == "seen" and "[1 pictures are left out: " in TOKENIZER.decode(trace.segments[0].tokens)


# --------------------------------------------------------------------------------------------------------------- failures
def test_a_failure_of_the_machinery_is_tried_again_and_then_not_the_models():
    left = iter([InfrastructureError("the disk is gone"), InfrastructureError("again"), None])

    def act():
        if problem := next(left, InfrastructureError("for good")):
            raise problem
        return Observation("fine")

    env = Asking(Does(act))
    say = lambda p: "good" + END if "fine" in p else calling()  # noqa: E731
    trace, engine = run(say, env, seed=3)
    assert (trace.ending, trace.answer, env.resets, env.closes) == ("answer", "good", 3, 3)
    assert {r.sampling.seed for r in engine.requests} == {turn_seed(3, 0), turn_seed(3, 1)}  # begun anew, the same way
    trace, _ = run(say, env, retries=1)
    assert (trace.ending, trace.problem, trace.answer, trace.rewards) == ("infrastructure", "for good", "", {})
    assert not trace.valid and len(runs_of(trace)) == 1 and env.resets == env.closes == 5


def test_a_mistake_of_ours_is_raised_and_everything_given_back():
    for act in (lambda: None + 1, lambda: [][0], lambda: next(iter(()))):
        env = Asking(Does(act))
        with pytest.raises((TypeError, IndexError, RuntimeError)):
            run(calling, env)
        assert env.closes == 1
    env = Asking()
    env.score = lambda trace, answer: {"r": 2.0}
    with pytest.raises(ValueError, match="the reward r=2.0 does not lie in"):
        run(lambda p: END, env)


def test_a_call_that_hangs_is_an_observation_and_the_tool_is_not_called_again():
    come_back, calls = threading.Event(), []
    env = Asking(Does(lambda: calls.append(1) or come_back.wait() or Observation("late")))
    say = lambda p: "given up" + END if "an earlier call" in p else calling()  # noqa: E731
    trace, _ = run(say, env, Limits(call_seconds=0.05))
    come_back.set()
    assert (trace.ending, trace.answer, len(calls)) == ("answer", "given up", 1)
    assert "[Stopped: the call took longer than 0.05 seconds.]" in TOKENIZER.decode(trace.segments[0].tokens)


def test_a_timeout_of_the_tools_own_is_a_mistake_of_the_tool():
    def act():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        run(calling, Asking(Does(act)), Limits(call_seconds=60))


def test_coroutines_of_one_turn_run_together_and_blocking_calls_in_their_order():
    order, here = [], []

    async def meet():
        """Comes back only when both are there."""
        here.append(len(here))
        mine = here[-1]
        while len(here) < 2:
            await asyncio.sleep(0.001)
        return Observation(f"met {mine}")

    async def slow():
        await asyncio.sleep(600)

    names = ["meet", "block0", "slow", "block1", "meet", "block2", "block3"]
    tools = [Does(meet, "meet"), Does(slow, "slow")]
    tools += [Does(lambda i=i: order.append(i) or Observation(""), f"block{i}") for i in range(4)]
    say = lambda p: "ok" + END if "Return" in p else section(*names)  # noqa: E731
    trace, _ = run(say, Asking(*tools), Limits(call_seconds=0.5))
    text = TOKENIZER.decode(trace.segments[0].tokens)
    assert trace.ending == "answer" and order == [0, 1, 2, 3]
    assert text.index("met 0") < text.index("[Stopped: the call took longer") < text.index("met 1")


# --------------------------------------------------------------------------------------------------- seconds, cancelled
@pytest.mark.parametrize(
    "ending, where",
    [(e, w) for e in ("seconds", "cancelled") for w in ("turn", "call", "queue")] + [("cancelled", "reset")],
)  # the clock begins with the first turn
def test_an_episode_that_is_stopped_keeps_what_was_drawn(where, ending):
    """In the middle of a turn the trace has its first tokens; nothing of it stays in the engine."""
    say = lambda p: "word " * 10**5 if where in ("turn", "queue") else calling()  # noqa: E731
    hang, engine = threading.Event(), Scripted(say, max_length=10**6, pace=1)
    env = Asking(Does(lambda: hang.wait() or Observation("")))
    if where == "reset":
        env.reset = lambda seed: asyncio.sleep(600)

    async def work(policy):
        stop = asyncio.Event()
        limits = Limits(tokens=10**6, turn_tokens=10**6, seconds=0.5 if ending == "seconds" else 600)
        if ending == "cancelled":
            asyncio.get_running_loop().call_later(0.5, stop.set)
        trace = await rollout(env, policy, GREEDY, limits, stop=stop)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        return trace

    with AsyncEngine(engine) as running:
        policy = EnginePolicy(running, TOKENIZER)
        if where == "queue":
            engine.settings = type(engine.settings)(queue=1)
            full = running.submit(Request([65], (), SampleConfig(max_tokens=10**6, seed=1)), lambda event: None)
            trace = asyncio.run(work(policy))
            assert running.abort(full)
        else:
            trace = asyncio.run(work(policy))
        assert not running.stats()["running"]
    hang.set()
    assert (trace.ending, trace.valid, bool(trace.rewards)) == (ending, ending == "seconds", ending == "seconds")
    assert env.closes == 1
    drawn = engine.given[turn_seed(0, 0)].tokens if where in ("turn", "call") else []
    assert runs_of(trace) == [drawn] * bool(drawn) and len(drawn) < 10**6


def test_a_task_that_is_cancelled_leaves_nothing_behind():
    engine, env = Scripted(lambda p: "word " * 10**5, pace=1, max_length=10**6), Asking()

    async def work(policy):
        limits = Limits(tokens=10**6, turn_tokens=10**6)
        task = asyncio.ensure_future(rollout(env, policy, GREEDY, limits))
        while not engine.given or not engine.given[turn_seed(0, 0)].tokens:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    with AsyncEngine(engine) as running:
        asyncio.run(work(EnginePolicy(running, TOKENIZER)))
        assert env.closes == 1
        while running.stats()["running"]:
            pass
    assert len(engine.given[turn_seed(0, 0)].tokens) < 4 * 10**5


# ------------------------------------------------------------------------------------------------------------ many episodes
def test_many_episodes_wait_for_a_queue_with_room_for_two():
    engine = Scripted(lambda p: f"{after(p, 'user<|im_middle|>').partition(END)[0]}!{END}", queue=2)
    episodes = ((Asking(question=f"question {i}"), i) for i in range(9))
    with AsyncEngine(engine) as running:
        found = dict(play(episodes, EnginePolicy(running, TOKENIZER), GREEDY, LIMITS, width=5))
    assert [found[i].answer for i in range(9)] == [f"question {i}!" for i in range(9)]
    assert {r.sampling.seed for r in engine.requests} == {turn_seed(i, 0) for i in range(9)}


def test_of_64_episodes_those_without_a_hanging_tool_are_done_while_it_hangs():
    """The tool hangs until the 63 others have ended: if one of them waited for it, none of this would end."""
    others_are_done = threading.Event()
    hangs = Does(lambda: others_are_done.wait(timeout=120) and Observation("at last"))
    healthy = Does(lambda: Observation("at once"))
    say = lambda p: f"{after(p, 'do:0').strip().partition(END)[0]}{END}" if "Return" in p else calling()  # noqa: E731

    async def work(policy):
        ended = []
        envs = [Asking(hangs if i == 5 else healthy) for i in range(64)]
        async with Rollouts(zip(envs, range(64), strict=True), policy, GREEDY, LIMITS, width=64) as episodes:
            async for place, trace in episodes:
                ended.append((place, trace.answer))
                if len(ended) == 63:
                    assert (episodes.open, episodes.endings) == (1, {"answer": 63})
                    others_are_done.set()
        return ended

    with AsyncEngine(Scripted(say)) as running:
        ended = asyncio.run(work(EnginePolicy(running, TOKENIZER)))
    assert ended[-1] == (5, "at last") and {answer for _, answer in ended[:-1]} == {"at once"}
    assert sorted(place for place, _ in ended) == list(range(64))


def test_a_mistake_in_one_episode_ends_all_and_closes_them():
    begun, hang = [], threading.Event()

    def episodes():
        for i in range(100):
            begun.append(Asking(Does(hang.wait if i != 3 else lambda: None + 1)))
            yield begun[-1], i

    with AsyncEngine(Scripted(calling)) as running, pytest.raises(TypeError):
        list(play(episodes(), EnginePolicy(running, TOKENIZER), GREEDY, LIMITS, width=8))
    hang.set()
    assert len(begun) == 8 and all(env.resets == env.closes for env in begun)


def test_tokens_that_changed_behind_a_context_are_an_error():
    with AsyncEngine(Scripted(lambda p: END)) as running:
        context = Context(EnginePolicy(running, TOKENIZER), (), "plain", [{"role": "user", "content": "x"}])
    prompt = context.prompt()
    context.take(prompt, Completion([65, END_ID], [-1.0, -2.0], [0, 0], [], "stop"))
    context.say([66, END_ID])
    context.add({"role": "user", "content": "y"})
    context.take(context.prompt(), Completion([END_ID], [-1.0], [0], [], "stop"))
    with pytest.raises(TraceError, match="are not those that were sampled there"):
        context.segments("answer")
