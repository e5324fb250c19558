"""Episodes: a model speaks, its calls are made, it goes on with what they gave, until it answers (K2.5 §3.4, §4.4)."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

from k25_jax.agents.observation import InfrastructureError, Observation
from k25_jax.agents.tools import Tool, answer
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import from_ids
from k25_jax.sampling.requests import Request
from k25_jax.sampling.sample import SampleConfig
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

    @property
    def answer(self) -> str:
        """What the model answered; "" when it did not."""
        return self.said[-1].content if self.ending == "answer" else ""


def play(engine: Engine, episodes: Sequence[Episode], sampling: SampleConfig, turns: int) -> None:
    """Play episodes to their end, at most `turns` turns of the model each; `sampling` is of each turn.

    In rounds: all that are open are sampled together, then the calls of all are made side by side. `sampling.stop_ids`
    must have the end of a turn. Episode i draws from seed + i.
    """
    for turn in range(turns):
        asked = [(e, r) for i, e in enumerate(episodes) if not e.ending and (r := _request(engine, e, i, sampling))]
        completions = engine.generate([request for _, request in asked])
        for (episode, _), (completion,) in zip(asked, completions, strict=True):
            _speak(episode, completion.tokens, last=turn == turns - 1)
        calling = [episode for episode, _ in asked if not episode.ending]
        if not calling:
            return
        with concurrent.futures.ThreadPoolExecutor(len(calling)) as pool:
            list(pool.map(_call, calling))


def _request(engine: Engine, episode: Episode, number: int, sampling: SampleConfig) -> Request | None:
    """The next turn to sample; None when there is no room for it."""
    prompt = from_ids(episode.conversation.prompt(), episode.conversation.rendered.clips, engine.config)
    if len(prompt.tokens) + sampling.max_tokens > engine.max_length:
        episode.ending = "context"
        return None
    own = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)
    return Request(prompt.tokens, prompt.clips, own)


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
    except InfrastructureError:
        episode.ending = "infrastructure"
