"""One agent's context in the making: messages and sampled turns in, prompts out, and at the end its segment (K2.5 §3.5)."""

from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.agents.policy import Policy
from k25_jax.agents.tools import Tool, declaration, reply
from k25_jax.agents.trace import Segment, TraceError, clip_key
from k25_jax.sampling.prompt import Prompt, from_ids
from k25_jax.sampling.requests import Completion
from k25_jax.sandbox.observation import Observation
from k25_jax.text.conversation import Conversation
from k25_jax.text.tool_calls import BadCall, Call, Said
from k25_jax.vision.image import ImageError
from k25_jax.vision.patchpack import Clip, PackError


class Context:
    """A conversation whose tokens only grow, and where in it what was sampled stands."""

    def __init__(self, policy: Policy, tools: Sequence[Tool], mode: str, messages: Sequence[Mapping]):
        self._policy = policy
        declared = [declaration(tool) for tool in tools]
        self._conversation = Conversation(policy.tokenizer, declared, mode, policy.reader.load)
        for message in messages:
            self.add(message)
        self._turns: list[tuple[int, Completion]] = []  # where each begins
        self._seen = Prompt([], [])  # the last prompt of which something was sampled
        self.sampled = 0  # tokens

    def add(self, message: Mapping) -> None:
        """A message of the env."""
        self._conversation.add(message)

    def prompt(self) -> Prompt:
        """What the model goes on from."""
        tokens = self._conversation.prompt()
        return from_ids(tokens, self._conversation.rendered.clips, self._policy.reader.config)

    def take(self, prompt: Prompt, completion: Completion) -> None:
        """What was sampled after `prompt`."""
        if completion.tokens:
            self._turns.append((len(prompt.tokens), completion))
            self._seen, self.sampled = prompt, self.sampled + len(completion.tokens)

    def say(self, tokens: Sequence[int]) -> Said:
        """Go on with a sampled turn, and read it."""
        return self._conversation.say(tokens)

    def observe(self, call: Call | BadCall, observation: Observation) -> None:
        """The answer to a call. Pictures that this model cannot be shown are left out, which it is told."""
        message = reply(call, observation)
        problem = "" if self._policy.vision_tokens else "this model sees no pictures"
        if not observation.images or not problem:
            try:
                self._conversation.add(message)
                return
            except (ImageError, PackError) as error:
                problem = str(error)
        note = {"type": "text", "text": f"\n[{len(observation.images)} pictures are left out: {problem}]"}
        self._conversation.add(message | {"content": [*message["content"][:1], note]})

    def segments(self, reason: str) -> tuple[tuple[Segment, ...], list[Clip]]:
        """The segment, up to its last sampled token, and its clips; none when nothing was sampled.

        What stands behind that token no model has seen. Raises TraceError when the tokens have not only grown.
        """
        if not self._turns:
            return (), []
        tokens = [*self._seen.tokens, *self._turns[-1][1].tokens]
        length = len(tokens)
        sampled, versions = np.zeros(length, bool), np.full(length, -1, np.int32)
        logprobs = np.full(length, np.nan, np.float32)
        for begin, completion in self._turns:
            place = slice(begin, begin + len(completion.tokens))
            if tokens[place] != completion.tokens:
                raise TraceError(f"tokens {place.start} to {place.stop} are not those that were sampled there")
            sampled[place], logprobs[place], versions[place] = True, completion.logprobs, completion.versions
        keys = tuple(clip_key(clip) for clip in self._seen.clips)
        arrays = np.asarray(tokens, np.int32), sampled, logprobs, versions
        return (Segment(*arrays, keys, reason=reason),), list(self._seen.clips)
