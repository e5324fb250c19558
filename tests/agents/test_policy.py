"""The engine, a server and a recorded trace as policies: the same tokens, log-probabilities and versions from each."""

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from benchmarks.serving import CONFIG, minute_engine, minute_model, random_weights, serving, until_idle
from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EndpointPolicy, EnginePolicy, PolicyError
from k25_jax.agents.replay import Recorded, ReplayError
from k25_jax.agents.rollout import Rollouts, play, rollout
from k25_jax.agents.tasks import TaskEnv
from k25_jax.agents.trace import Trace, load, save, to_json
from k25_jax.checkpoint.load import load_model
from k25_jax.config import ConfigError
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import Completion, EngineConfig, EngineError
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
SAMPLING = SampleConfig(temperature=1.0, top_p=1.0)
SETTINGS = EngineConfig(rows=(8,), pieces=(4,), piece=64, pages=512, vision_patches=(256,), vision_tokens=256)


class Heard(AsyncEngine):
    """An engine of which every event is noted: `told` are (prompt, completion)."""

    def __init__(self, engine):
        self.told: list[tuple[list[int], Completion]] = []
        super().__init__(engine)

    def submit_soon(self, request, on_event=None):
        completion = Completion()
        self.told.append((list(request.tokens), completion))
        return super().submit_soon(request, lambda event: (completion.add(event), on_event(event)))


class Talk(TaskEnv):
    """A task's question with its picture, then the question twice more; a tool that nobody has taught the model."""

    async def reset(self, seed):
        self._left = 2
        messages = await super().reset(seed)
        self.tools = [Clock()]
        return messages

    async def step(self, said):
        self._left -= 1
        return [{"role": "user", "content": self._task.question(self._index)}] if self._left >= 0 else ()

    async def close(self):
        pass


class Clock:
    name, description, parameters = "clock", "", {"type": "object", "properties": {}}

    def call(self, arguments):
        return Observation("noon")


@pytest.fixture(scope="module")
def model():
    return load_model("base")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model.params, model.config, SETTINGS)


@pytest.fixture(scope="module")
def talks(engine, model) -> tuple[list[Trace], list]:
    """Sixteen talks at once, about two pictures each with eight seeds; and all that the engine told."""
    with Heard(engine) as running:
        return talk(running, model, [TaskEnvAt(i, s) for i in range(2) for s in range(8)], 16), running.told


@dataclasses.dataclass
class TaskEnvAt:
    index: int
    seed: int

    def env(self):
        return Talk("scenes:test", self.index), self.seed


def talk(running, model, which, width) -> list[Trace]:
    policy = EnginePolicy(running, model.tokenizer)
    found = dict(play([one.env() for one in which], policy, SAMPLING, Limits(turn_tokens=24, turns=4), width))
    return [found[place] for place in range(len(which))]


def parts(one: Completion) -> list[list]:
    return [one.tokens, one.logprobs, one.versions]


# ------------------------------------------------------------------------------------------------------------- the engine
def test_tokens_of_the_traces_are_those_of_the_engine_bit_by_bit(talks):
    traces, told = talks
    left = list(told)
    for trace in traces:
        (segment,) = trace.segments
        places = np.flatnonzero(np.diff(segment.sampled, prepend=False, append=False)).reshape(-1, 2)
        for begin, end in places.tolist():
            turn = (segment.tokens[begin:end], segment.logprobs[begin:end], segment.versions[begin:end])
            prompt, turn = segment.tokens[:begin].tolist(), [array.tolist() for array in turn]
            at = next(i for i, (asked, one) in enumerate(left) if asked == prompt and turn == parts(one))
            assert segment.logprobs[begin:end].tobytes() == np.asarray(left[at][1].logprobs, np.float32).tobytes()
            del left[at]
    assert not left and len(told) > 16 and {trace.ending for trace in traces} >= {"answer"}


def test_traces_are_saved_and_loaded_bit_by_bit_and_their_pictures_once(talks, tmp_path):
    traces, _ = talks
    save(tmp_path, "talks", traces)
    again = load(tmp_path, "talks")
    assert [to_json(trace) for trace in again] == [to_json(trace) for trace in traces]
    for old, new in zip(traces, again, strict=True):
        for a, b in zip(old.segments, new.segments, strict=True):
            for name in ("tokens", "sampled", "logprobs", "versions"):
                assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
                assert getattr(a, name).dtype == getattr(b, name).dtype
        assert {key: clip.patches.tobytes() for key, clip in old.clips.items()} == {
            key: clip.patches.tobytes() for key, clip in new.clips.items()
        }
    assert len(list((tmp_path / "clips").iterdir())) == 2


def test_equal_seeds_give_equal_episodes_whatever_else_runs(engine, model, talks):
    with AsyncEngine(engine) as running:
        alone = talk(running, model, [TaskEnvAt(1, 3)], 1)
    (trace,) = alone
    like = talks[0][8 + 3]
    assert trace.segments[0].tokens.tolist() == like.segments[0].tokens.tolist() and trace.ending == like.ending
    np.testing.assert_allclose(trace.segments[0].logprobs, like.segments[0].logprobs, atol=1e-4)
    firsts = {tuple(t.segments[0].tokens[t.segments[0].sampled].tolist()) for t in talks[0][8:]}
    assert len(firsts) > 1  # other seeds, other episodes


def test_weights_that_change_in_an_episode_are_told_apart(engine, model):
    """The env changes the weights between the turns, as a learner does."""
    with AsyncEngine(engine) as running:
        env, versions = Talk("scenes:test", 0), iter(range(11, 99))
        step = env.step

        async def change(said):
            await asyncio.to_thread(running.update_weights, model.params, next(versions))
            return await step(said)

        env.step = change
        running.update_weights(model.params, 10)
        trace = asyncio.run(
            rollout(env, EnginePolicy(running, model.tokenizer), dataclasses.replace(SAMPLING, temperature=0.0))
        )
    (segment,) = trace.segments
    begins = np.flatnonzero(segment.sampled & ~np.roll(segment.sampled, 1))
    assert segment.versions[begins].tolist() == list(range(10, 10 + len(begins))) and len(begins) == 3


def test_whoever_gives_up_at_any_moment_leaves_nothing_in_the_engine(world):
    """While a request waits to be taken, while it runs, and when it is done."""
    running, _ = world

    async def work():
        policy, rng = EnginePolicy(running, TOKENIZER), random.Random(0)
        how = SampleConfig(60, stop_ids=())
        for _ in range(10):
            stop = asyncio.Event()
            saying = [asyncio.ensure_future(policy.say([65] * 20, (), how, stop)) for _ in range(8)]
            await asyncio.sleep(rng.random() * 0.02)
            for one in saying[:4]:
                one.cancel()
            await asyncio.sleep(rng.random() * 0.02)
            stop.set()
            for one in await asyncio.gather(*saying[4:]):
                assert (one.reason == "abort" and len(one.tokens) < 60) or (one.reason, len(one.tokens)) == (
                    "length",
                    60,
                )
                assert len(one.tokens) == len(one.logprobs) == len(one.versions)
        assert all(one.done() for one in asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(work())
    stats = until_idle(running)
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == 0


def test_a_stopped_engine_ends_everything(engine, model):
    running = AsyncEngine(engine)
    policy = EnginePolicy(running, model.tokenizer)
    running.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        asyncio.run(rollout(TaskEnv("facts:test", 0), policy, SAMPLING))


def test_a_tokenizer_of_another_model_is_refused(engine):
    other = dataclasses.replace(engine.config, media_pad_id=5)
    with pytest.raises(ConfigError, match="<|media_pad|> is 264, the model's 5"):
        EndpointPolicy("http://127.0.0.1:9/v1", "m", TOKENIZER, other)


# ------------------------------------------------------------------------------------------------------------- played again
def test_a_trace_is_played_again_bit_by_bit(engine, model, talks, tmp_path):
    save(tmp_path, "talks", talks[0])

    async def again(trace, index, like):
        env, limits = Talk("scenes:test", index), Limits(turn_tokens=24, turns=4)
        return await rollout(env, Recorded(trace, like), SAMPLING, limits, trace.seed)

    with AsyncEngine(engine) as running:
        like = EnginePolicy(running, model.tokenizer)
    for number, trace in enumerate(load(tmp_path, "talks")):
        assert to_json(asyncio.run(again(trace, number // 8, like))) == to_json(talks[0][number])
    with pytest.raises(ReplayError, match=r"prompts differ from token \d+ on: .* then, .* now"):
        asyncio.run(again(talks[0][0], 77, like))


def test_what_cannot_be_played_again_says_why(engine, model, talks):
    with AsyncEngine(engine) as running:
        like = EnginePolicy(running, model.tokenizer)
    trace = next(t for t in talks[0] if t.ending == "answer")

    def again(trace, limits=None, env=None):
        env = env or Talk("scenes:test", int(trace.group.partition("[")[2][:-1]))
        return asyncio.run(rollout(env, Recorded(trace, like), SAMPLING, limits or Limits(turn_tokens=24, turns=4)))

    with pytest.raises(ReplayError, match="now max_tokens=1: use the limits"):
        again(trace, Limits(turn_tokens=1))
    other = Talk("scenes:test", int(trace.group.partition("[")[2][:-1]), condition="blank")
    with pytest.raises(ReplayError, match=r"picture 0 \(image\) is another one than it was"):
        again(trace, env=other)
    with pytest.raises(ReplayError, match="ended by 'cancelled': that does not follow"):
        again(dataclasses.replace(trace, ending="cancelled"))
    with pytest.raises(ReplayError, match="nothing was said in it"):
        again(dataclasses.replace(trace, segments=()))
    longer = Talk("scenes:test", int(trace.group.partition("[")[2][:-1]))
    longer.step = lambda said: asyncio.sleep(0, [{"role": "user", "content": "?"}])
    with pytest.raises(ReplayError, match="it ended with token|prompts differ from token"):
        again(trace, Limits(turn_tokens=24, turns=9), longer)


# ------------------------------------------------------------------------------------------------------------- a server
class Chat:
    """Text alone, in turns that random weights cannot end but by chance."""

    task, mode, tools = "chat", "plain", ()

    def __init__(self, number):
        self.group = f"chat {number}"

    async def reset(self, seed):
        return [{"role": "user", "content": f"{self.group}?"}]

    async def step(self, said):
        return [{"role": "user", "content": "go on"}]

    def score(self, trace, answer):
        return {}

    async def close(self):
        pass


@pytest.fixture(scope="module")
def world():
    """A minute engine, and the real server over it on loopback."""
    params = random_weights(1)
    with AsyncEngine(minute_engine(params)) as running, serving(running, minute_model()) as (server, url):
        running.update_weights(params, 3)
        yield running, url


def chats(policy, count=12, width=6, **options) -> list[Trace]:
    async def work():
        found, limits = {}, Limits(turn_tokens=40, turns=3)
        async with Rollouts(
            ((Chat(i), i) for i in range(count)), policy, SAMPLING, limits, width, **options
        ) as episodes:
            async for place, trace in episodes:
                found[place] = trace
        return [found[place] for place in range(count)]

    return work()


def test_a_server_gives_the_traces_that_the_engine_gives(world):
    running, url = world

    async def both():
        mine = await chats(EnginePolicy(running, TOKENIZER))
        async with EndpointPolicy(f"{url}/v1", "minute", TOKENIZER, CONFIG) as policy:
            assert policy.max_length == CONFIG.text.max_length
            return mine, await chats(policy)

    mine, theirs = asyncio.run(both())
    for a, b in zip(mine, theirs, strict=True):
        (one,), (other,) = a.segments, b.segments
        assert one.tokens.tolist() == other.tokens.tolist() and a.ending == b.ending
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)  # other company, other rounding
        assert set(other.versions[other.sampled].tolist()) == {3}
    assert len({trace.ending for trace in mine}) > 1


def test_one_after_the_other_the_server_gives_the_same_bits(world):
    running, url = world

    async def both():
        mine = await chats(EnginePolicy(running, TOKENIZER), 3, 1)
        async with EndpointPolicy(f"{url}/v1", "minute", TOKENIZER, CONFIG) as policy:
            return mine, await chats(policy, 3, 1)

    mine, theirs = asyncio.run(both())
    assert [to_json(trace) for trace in mine] == [to_json(trace) for trace in theirs]


def test_a_request_that_is_given_up_ends_on_the_server_too(world):
    running, url = world

    async def work():
        async with EndpointPolicy(f"{url}/v1", "minute", TOKENIZER, CONFIG) as policy:
            stop, how = asyncio.Event(), SampleConfig(300, stop_ids=())
            saying = asyncio.ensure_future(policy.say([65] * 20, (), how, stop))
            await asyncio.sleep(0.05)
            stop.set()
            return await saying

    assert asyncio.run(work()).reason in ("abort", "stop", "length")
    assert until_idle(running)["running"] == 0


@pytest.mark.parametrize(
    "model, clips, error, match",
    [
        ("other", 0, PolicyError, "does not say the model's max_model_len; it serves minute"),
        ("minute", 1, PolicyError, "takes token ids, and no pictures beside them"),
    ],
)
def test_a_server_that_cannot_be_asked_says_why(world, model, clips, error, match):
    async def work():
        async with EndpointPolicy(f"{world[1]}/v1", model, TOKENIZER, CONFIG) as policy:
            await policy.say([65], [None] * clips, SAMPLING, asyncio.Event())

    with pytest.raises(error, match=match):
        asyncio.run(work())


def test_what_may_pass_is_infrastructure_and_what_will_not_is_raised(world):
    async def say(url, tokens):
        policy = EndpointPolicy(url, "minute", TOKENIZER, CONFIG, retries=0)
        await policy.say(tokens, (), dataclasses.replace(SAMPLING, max_tokens=4), asyncio.Event())

    with pytest.raises(PolicyError, match="max_tokens=4 exceed the context"):
        asyncio.run(say(f"{world[1]}/v1", [65] * 384))
    with pytest.raises(InfrastructureError, match="Connection error"):
        asyncio.run(say("http://127.0.0.1:9/v1", [65]))


@pytest.mark.parametrize(
    "choice, error",
    [
        ({"text": "hello", "finish_reason": "stop"}, PolicyError),
        ({"token_ids": [1, 2], "logprobs": None, "finish_reason": "stop"}, PolicyError),
        ({"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, None]}, "finish_reason": "stop"}, PolicyError),
        ({"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}, InfrastructureError),
        ({"token_ids": [1], "logprobs": {"token_logprobs": [float("nan")]}, "finish_reason": "stop"}, InfrastructureError),
        ({"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}, InfrastructureError),
        ({"token_ids": [1], "logprobs": {"token_logprobs": [-1]}, "policy_versions": [[2, 2]], "finish_reason": "stop"},
         InfrastructureError),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_a_turn_is_refused(choice, error):
    policy = EndpointPolicy("http://127.0.0.1:9/v1", "m", TOKENIZER, CONFIG, version=4)
    with pytest.raises(error):
        policy._read({"choices": [choice]})
    good = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, -0.5]}, "finish_reason": "stop"}
    assert policy._read({"choices": [good]}).versions == [4, 4]
