"""Groups from the real engine, of the embedded base model: direct answers, and a tool in the sandbox."""

import dataclasses
import threading

import pytest

import rollouts
from k25_jax.checkpoint.load import load_model
from k25_jax.config import EpisodeConfig, ProblemsConfig, load_experiment
from k25_jax.rl.problems import problems_of
from k25_jax.rl.sampler import Cancelled, Sampler, seed_of


@pytest.fixture(scope="module")
def params():
    return load_model("base").params


def sampler(tmp_path, *problems: ProblemsConfig) -> Sampler:
    experiment = load_experiment(str(rollouts.write_experiment(tmp_path)))
    episode = EpisodeConfig(tokens=12, turn_tokens=12, context=512)  # a tool is declared in so many tokens
    return Sampler(
        dataclasses.replace(experiment, rl=dataclasses.replace(experiment.rl, problems=problems, episode=episode))
    )


def test_a_group_is_committed_when_it_is_done_and_is_the_same_again(tmp_path, params):
    own, committed = sampler(tmp_path, ProblemsConfig("puzzles:train", records=2)), {}
    asked = dict(zip("ab", problems_of(own._config), strict=True))
    own.update(params, 3)
    done = own.groups(asked, 3, committed.__setitem__)
    assert done == committed and [len(traces) for traces in done.values()] == [3, 3]
    assert [trace.id for trace in done["b"]] == ["b-0-0", "b-0-1", "b-0-2"]
    assert all(trace.seed == seed_of(trace.id, 0) and "outcome" in trace.rewards for trace in done["a"])
    assert all(set(s.versions[s.sampled].tolist()) == {3} for trace in done["a"] for s in trace.segments)
    again = own.groups(asked, 3, lambda name, traces: None)
    for one, other in zip(done["a"] + done["b"], again["a"] + again["b"], strict=True):
        assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]
    threading.Timer(0.05, own.cancel).start()
    with pytest.raises(Cancelled):
        while True:
            own.groups(asked, 3, lambda name, traces: None)
    own.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "k25-engine"]


def test_problems_with_a_tool_have_a_sandbox_and_leave_none(tmp_path, params, bwrap):
    own = sampler(tmp_path, ProblemsConfig("puzzles:train", records=1, tool="ipython", ability="agentic"))
    own.update(params, 0)
    traces = own.groups({"a": problems_of(own._config)[0]}, 2, lambda name, traces: None)["a"]
    assert all(trace.valid and trace.segments for trace in traces)
    own.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("k25-engine", "k25-kernel-pool")]
