"""Episodes with a scripted model and a real sandbox: calls are made, mistakes are answered, limits hold."""

import json

import pytest

from k25_jax.agents.loop import Episode, play
from k25_jax.agents.tools import IPython, declaration
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError
from k25_jax.text.conversation import Conversation
from scripted import END, TOKENIZER, Scripted, call

SAMPLING = SampleConfig(max_tokens=200, temperature=0.0, stop_ids=(TOKENIZER.special[END],))


def episode(tool, question="what is 6*7?") -> Episode:
    conversation = Conversation(TOKENIZER, [declaration(tool)], "instant")
    conversation.add({"role": "user", "content": question})
    return Episode(conversation, [tool])


def after(text: str, marker: str) -> str:
    return text.rpartition(marker)[2]


@pytest.fixture(scope="module")
def tool(sandbox):
    return IPython(sandbox, seconds=20)


def test_a_call_is_made_and_its_result_is_read(tool):
    def say(prompt):
        if "## Return of functions.ipython:0" in prompt:
            return after(prompt, "ipython:0\n").partition(END)[0] + END
        return call(json.dumps({"code": "6*7"}))

    one = episode(tool)
    play(Scripted(say), [one], SAMPLING, turns=3)
    assert (one.ending, one.answer) == ("answer", "42")
    assert [o.text for o in one.observations] == ["42"] and len(one.said) == 2
    rendered = one.conversation.rendered
    assert sum(rendered.weights) == one.sampled  # all that was sampled is learnt, and nothing else


def test_a_bad_call_is_answered_and_the_episode_goes_on(tool):
    def say(prompt):
        if "Error:" in prompt:
            return "sorry" + END
        return call('{"code": ')

    one = episode(tool)
    play(Scripted(say), [one], SAMPLING, turns=3)
    assert (one.ending, one.answer) == ("answer", "sorry")
    assert one.observations[0].status == "error" and "not JSON" in one.observations[0].text


def test_limits_end_an_episode_without_an_answer(tool):
    forever = episode(tool)
    play(Scripted(lambda prompt: call('{"code": "1"}')), [forever], SAMPLING, turns=2)
    assert (forever.ending, forever.answer, len(forever.said), len(forever.observations)) == ("turns", "", 2, 1)

    long = episode(tool)
    play(Scripted(lambda prompt: "word " * 100), [long], SAMPLING, turns=2)
    assert (long.ending, long.answer) == ("length", "")

    full = episode(tool)
    engine = Scripted(lambda prompt: "never asked", max_length=210)
    play(engine, [full], SAMPLING, turns=2)
    assert (full.ending, full.said, engine.requests) == ("context", [], [])


def test_a_failure_of_the_machinery_is_not_the_models():
    class Broken(IPython):
        def __init__(self):
            pass

        def call(self, arguments):
            raise InfrastructureError("the disk is gone")

    one = episode(Broken())
    play(Scripted(lambda prompt: call('{"code": "1"}')), [one], SAMPLING, turns=3)
    assert (one.ending, one.answer) == ("infrastructure", "")


def test_episodes_are_played_side_by_side(tool):
    def say(prompt):
        return f"{after(prompt, 'user<|im_middle|>').partition(END)[0]}!{END}"

    episodes = [episode(tool, f"question {i}") for i in range(5)]
    engine = Scripted(say)
    play(engine, episodes, SAMPLING, turns=3)
    assert [e.answer for e in episodes] == [f"question {i}!" for i in range(5)]
    assert [r.sampling.seed for r in engine.requests] == [0, 1, 2, 3, 4]
