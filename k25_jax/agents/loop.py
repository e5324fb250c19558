"""Episodes: a model speaks, its calls are made, it goes on with what they gave, until it answers (K2.5 §3.4, §4.4)."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

from k25_jax.agents.tools import Tool, answer
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import from_ids
from k25_jax.sampling.requests import Request
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.text.conversation import Conversation
from k25_jax.text.tool_calls import Said

ENDINGS = ("answer", "turns", "length", "context", "infrastructure")


@dataclasses.dataclass
class Episode:
    """A conversation with its tools. `ending` is one of ENDINGS when it is over, "" before.

    answer: the model answered without a call; turns: it called in its last turn; length: a turn was cut off; context: no
    room for another turn; infrastructure: a tool failed through no fault of the model's, so it should not be scored.
    """

    conversation: Conversation
    tools: Sequence[Tool]
    said: list[Said] = dataclasses.field(default_factory=list)
    observations: list[Observation] = dataclasses.field(default_factory=list)
    sampled: int = 0  # tokens
    ending: str = ""
    problem: str = ""  # what the tool said that failed

    @property
    def answer(self) -> str:
        """What the model answered; "" when it did not."""
        return self.said[-1].content if self.ending == "answer" else ""


def play(
    engine: Engine,
    episodes: Sequence[Episode],
    sampling: SampleConfig,
    turns: int,
    seeds: Sequence[int] = (),
    context: int | None = None,
) -> None:
    """Play episodes to their end, at most `turns` turns of the model each; `sampling` is of each turn.

    In rounds: all that are open are sampled together, then the calls of all are made side by side. `sampling.stop_ids`
    must have the end of a turn. Episode i draws from seeds[i], or from seed + i. `context` is the most tokens of an
    episode, if the engine takes more.
    """
    room = min(engine.max_length, context or engine.max_length)
    seeds = seeds or [(sampling.seed + i) % 2**32 for i in range(len(episodes))]
    how = [dataclasses.replace(sampling, seed=seed) for seed in seeds]
    for turn in range(turns):
        asked = [
            (e, r) for e, h in zip(episodes, how, strict=True) if not e.ending and (r := _request(engine, e, h, room))
        ]
        completions = engine.generate([request for _, request in asked])
        for (episode, _), (completion,) in zip(asked, completions, strict=True):
            _speak(episode, completion.tokens, last=turn == turns - 1)
        calling = [episode for episode, _ in asked if not episode.ending]
        if not calling:
            return
        with concurrent.futures.ThreadPoolExecutor(len(calling)) as pool:
            list(pool.map(_call, calling))


def _request(engine: Engine, episode: Episode, sampling: SampleConfig, room: int) -> Request | None:
    """The next turn to sample; None when there is no room for it."""
    prompt = from_ids(episode.conversation.prompt(), episode.conversation.rendered.clips, engine.config)
    if len(prompt.tokens) + sampling.max_tokens > room:
        episode.ending = "context"
        return None
    return Request(prompt.tokens, prompt.clips, sampling)


def _speak(episode: Episode, tokens: Sequence[int], last: bool) -> None:
    said = episode.conversation.say(tokens)
    episode.said.append(said)
    episode.sampled += len(tokens)
    if not said.whole:
        episode.ending = "length"
    elif not said.calls:
        episode.ending = "answer"
    elif last:
        episode.ending = "turns"


def _call(episode: Episode) -> None:
    """Make the calls of an episode's last turn, in their order."""
    try:
        for call in episode.said[-1].calls:
            message, observation = answer(call, episode.tools)
            episode.conversation.add(message)
            episode.observations.append(observation)
    except InfrastructureError as problem:
        episode.ending, episode.problem = "infrastructure", str(problem)
