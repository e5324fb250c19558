"""Tasks as environments: asked directly or with the tool, under every condition, with sandboxes that come back."""

import asyncio
import json
import threading

import numpy as np
import pytest

from k25_jax.agents import tasks
from k25_jax.agents.env import Limits
from k25_jax.agents.pictures import Pictures, Sandboxes
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import play, rollout
from k25_jax.agents.tasks import QuestionEnv, TaskEnv
from k25_jax.config import ConfigError
from k25_jax.data.tasks import TASKS, Task, make_task
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError
from scripted import END, TOKENIZER, Scripted, call

LIMITS = Limits(turn_tokens=256, turns=4)
UNASKED = ("library", "lookups")  # nothing to ask, or a tool in between


def played(env, say, **options):
    with AsyncEngine(Scripted(say, max_length=2**15)) as running:
        policy = EnginePolicy(running, TOKENIZER)
        return asyncio.run(rollout(env, policy, SampleConfig(temperature=0.0), LIMITS, **options))


@pytest.mark.parametrize("name", [name for name in TASKS if name not in UNASKED])
def test_every_task_is_an_env_whose_gold_answer_has_the_reward_1(name):
    task = make_task(f"{name}:train")
    env = TaskEnv(task, 1)
    trace = played(env, lambda prompt: task.answer(1) + END)
    assert (trace.task, trace.group) == (f"{name}:train", f"{name}:train[1]")
    assert trace.rewards == {"outcome": 1.0} and trace.answer == task.answer(1)
    assert bool(trace.clips) == (task.modality == "vision")
    cut = played(TaskEnv(f"{name}:train", 1), lambda prompt: task.answer(1) + "x" * 300)
    assert (cut.ending, cut.rewards) == ("length", {"outcome": 0.0})


class Generous(Task):
    """A task that finds something in every answer."""

    category, modality = "text_knowledge", "text"

    def question(self, index):
        return "?"

    def score(self, prediction, index):
        return 0.5


def test_without_an_answer_there_is_no_reward_whatever_the_task_says():
    assert played(TaskEnv(Generous("train"), 0), lambda prompt: "no" + END).rewards == {"outcome": 0.5}
    assert played(TaskEnv(Generous("train"), 0), lambda prompt: "no" * 999).rewards == {"outcome": 0.0}


def test_lookups_are_played_with_their_table():
    """Names are looked up until a value is no name of the table; unknown ones are told so."""
    task = make_task("lookups:train")
    for index in range(40):
        scene, record = task.scene(index), task.record(index)
        tool, field, _ = scene.tool
        asked = iter(["nobody", *scene.names])

        def say(prompt, asked=asked, tool=tool, field=field, scene=scene):
            name = next(asked, None)
            return scene.value + END if name is None else call(json.dumps({field: name}), tool)

        trace = played(TaskEnv(task, index), say)
        assert (trace.rewards, trace.segments[0].turns) == ({"outcome": 1.0}, 2 + len(scene.names))
        text = TOKENIZER.decode(trace.segments[0].tokens)
        assert "Error: nobody is not in the table" in text
        assert all(message["content"] in text for message in record["messages"] if message["role"] == "tool")


def test_pictures_are_shown_hidden_or_blank():
    clips = {}
    for condition in tasks.CONDITIONS:
        trace = played(TaskEnv("scenes:test", 3, condition), lambda prompt: "red" + END)
        clips[condition] = [clip.patches for clip in trace.clips.values()]
    (shown,), (blank,) = clips["shown"], clips["blank"]
    assert clips["hidden"] == [] and shown.shape == blank.shape and (blank == 255).all() and (shown != 255).any()
    with pytest.raises(ConfigError, match="condition='dark' must be one of shown, hidden, blank"):
        TaskEnv("scenes:test", 3, "dark")


@pytest.mark.usefixtures("bwrap")
def test_sandboxes_serve_one_episode_after_the_other_and_nothing_is_left_in_them():
    """Two at once, six episodes: two sandboxes. A model that calls nothing takes none."""
    code = {"code": "print(type(globals().get('left')).__name__, images[0].shape); left = 1"}
    say = lambda p: p.rpartition("ipython:0\n")[2].partition(END)[0] + END if "Return" in p else call(json.dumps(code))  # noqa: E731
    with Sandboxes() as sandboxes, AsyncEngine(Scripted(say)) as running:
        policy = EnginePolicy(running, TOKENIZER)
        envs = [TaskEnv("dots:train", i, "hidden", sandboxes.lend) for i in range(6)]
        how = SampleConfig(temperature=0.0), LIMITS, 2
        found = dict(play(((env, 0) for env in envs), policy, *how))
        assert {found[i].answer.strip() for i in range(6)} == {"NoneType (56, 56, 3)"}
        assert len(sandboxes._idle) == 2 and all(env.ran for env in envs)
        kernels = [sandbox._kernel for sandbox in sandboxes._idle]
        quiet = played(TaskEnv("dots:train", 0, "hidden", lambda: 1 / 0), lambda p: "3" + END)
        assert quiet.ending == "answer"
    assert not any(kernel.alive() for kernel in kernels)


@pytest.mark.usefixtures("bwrap")
def test_a_sandbox_that_failed_is_not_lent_again(monkeypatch):
    with Sandboxes() as sandboxes:
        first = Pictures(sandboxes.lend, 20)
        assert first.call({"code": "1+1"}).text == "2"
        monkeypatch.setattr(first._sandbox, "run", lambda *_: 1 / 0)
        monkeypatch.setattr(first._sandbox, "put", _broken)
        first.lay_out([np.zeros((2, 2, 3), np.uint8)])
        with pytest.raises(InfrastructureError):
            first.call({"code": "1"})
        kernel = first._sandbox._kernel
        first.close()
        assert not sandboxes._idle and not kernel.alive()


def _broken(*_):
    raise InfrastructureError("the disk is full")


def test_an_episode_ends_while_its_tool_hangs_and_the_sandbox_comes_back_later(monkeypatch):
    """The sandbox itself hangs, so that its own deadline does not help."""
    monkeypatch.setattr(tasks, "CLOSE_SECONDS", 0.05)
    come_back, events = threading.Event(), []

    class Hanging:
        def __enter__(self):
            events.append("lent")
            return self

        def __exit__(self, *_):
            events.append("given back")

        def put(self, name, data):
            come_back.wait()

        def run(self, code, seconds=60.0):
            raise InfrastructureError("too late")

    env = QuestionEnv("t", "g", lambda: [{"role": "user", "content": "?"}], lend=Hanging)
    say = lambda p: "no matter" + END if "Return" in p else call('{"code": "1"}')  # noqa: E731
    with AsyncEngine(Scripted(say)) as running:
        limits = Limits(call_seconds=0.05)
        trace = asyncio.run(rollout(env, EnginePolicy(running, TOKENIZER), SampleConfig(temperature=0.0), limits))
    assert (trace.answer, events) == ("no matter", ["lent"])
    come_back.set()
    while events != ["lent", "given back"]:
        pass
