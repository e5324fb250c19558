"""A trace played again: the driver asks, and the trace answers with what it recorded (K2.5 §3.5)."""

import asyncio
from collections.abc import Sequence

import numpy as np

from k25_jax.agents.policy import Policy
from k25_jax.agents.trace import Segment, Trace, clip_key
from k25_jax.sampling.requests import Completion
from k25_jax.sampling.sample import SampleConfig
from k25_jax.vision.patchpack import Clip

BY_CLOCK = ("seconds", "cancelled", "infrastructure")  # endings that do not follow from the tokens
AROUND = 20  # tokens that an error shows before a difference, and behind it


class ReplayError(ValueError):
    """A trace that cannot be played again, or went another way; the message says where, and what differs."""


class Recorded:
    """A `Policy` that says what `trace` recorded, where it is asked as then; it reads text and pictures as `like` does.

    `rollout` with it, the same env and the same limits gives the same trace, bit for bit, or raises ReplayError.
    """

    def __init__(self, trace: Trace, like: Policy):
        if trace.ending in BY_CLOCK:
            raise ReplayError(f"{trace.id} ended by {trace.ending!r}: that does not follow from what was said")
        self._trace = trace
        self.tokenizer, self.reader = like.tokenizer, like.reader
        self.max_length, self.vision_tokens = like.max_length, like.vision_tokens

    async def say(
        self, tokens: Sequence[int], clips: Sequence[Clip], sampling: SampleConfig, stop: asyncio.Event
    ) -> Completion:
        """See `Policy`."""
        begin, asked = len(tokens), np.asarray(tokens, np.int32)
        reach = [(_common(asked, segment.tokens), segment) for segment in self._trace.segments]
        if not reach:
            raise ReplayError(f"{self._trace.id}: nothing was said in it, and now there is room for a turn")
        for same, segment in reach:
            if same == begin < len(segment.tokens) and segment.sampled[begin]:
                self._check_clips(clips, segment)
                return self._turn(segment, begin, sampling)
        raise ReplayError(f"{self._trace.id}: {self._difference(asked, *max(reach, key=lambda one: one[0]))}")

    def _turn(self, segment: Segment, begin: int, sampling: SampleConfig) -> Completion:
        (others,) = np.nonzero(~segment.sampled[begin:])
        end = begin + int(others[0]) if len(others) else len(segment.tokens)
        drawn = segment.tokens[begin:end].tolist()
        reason = "stop" if drawn[-1] in sampling.stop_ids else "length"
        if len(drawn) > sampling.max_tokens or (reason == "length" and len(drawn) < sampling.max_tokens):
            raise ReplayError(
                f"{self._trace.id}: at token {begin} it drew {len(drawn)} tokens, now max_tokens={sampling.max_tokens}: "
                "use the limits that it was made with"
            )
        logprobs, versions = segment.logprobs[begin:end].tolist(), segment.versions[begin:end].tolist()
        return Completion(drawn, logprobs, versions, [()] * len(drawn), reason)

    def _check_clips(self, clips: Sequence[Clip], segment: Segment) -> None:
        for number, (clip, key) in enumerate(zip(clips, segment.clips, strict=False)):
            if clip_key(clip) != key:
                raise ReplayError(f"{self._trace.id}: picture {number} ({clip.source}) is another one than it was")

    def _difference(self, asked: np.ndarray, same: int, segment: Segment) -> str:
        if same == len(asked):
            return f"at token {same} it is asked to speak where it did not"
        show = lambda tokens: self.tokenizer.decode(tokens[max(0, same - AROUND) : same + AROUND])  # noqa: E731
        if same == len(segment.tokens):
            return f"it ended with token {same}, and now goes on: {show(asked)!r}"
        return f"prompts differ from token {same} on: {show(segment.tokens)!r} then, {show(asked)!r} now"


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens at the beginning are the same."""
    length = min(len(first), len(second))
    (other,) = np.nonzero(first[:length] != second[:length])
    return int(other[0]) if len(other) else length
