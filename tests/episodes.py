"""Traces of episodes that a test writes: the real chat template and tools, with numbers in the place of a model's."""

import numpy as np

from k25_jax.agents.tools import declaration
from k25_jax.agents.trace import Segment, Trace, clip_key
from k25_jax.config import preset
from k25_jax.sampling.prompt import MediaReader
from k25_jax.text.conversation import Conversation
from k25_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
END = "<|im_end|>"
READER = MediaReader(preset("tiny"))


class Adder:
    """A tool."""

    name = "add"
    description = "Add two numbers."
    parameters = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}


def call(arguments: str, id_: str = "functions.add:0") -> str:
    """A section with one call, as a model writes it."""
    inside = f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    return f"<|tool_calls_section_begin|>{inside}<|tool_calls_section_end|>"


def segment(turns, mode="thinking", tools=(Adder,), versions=(0,), **fields) -> tuple[Segment, dict]:
    """A segment and its clips. `turns` are messages that are given, and texts (or tokens) that are sampled."""
    talk = Conversation(TOKENIZER, [declaration(tool) for tool in tools], mode, READER.load)
    for turn in turns:
        if isinstance(turn, dict):
            talk.add(turn)
        else:
            talk.prompt()
            talk.say(TOKENIZER.encode(turn, allow_special=True) if isinstance(turn, str) else turn)
    rendered, pad = talk.rendered, TOKENIZER.special["<|media_pad|>"]
    clips = iter(rendered.clips)
    repeats = [next(clips).tokens if token == pad else 1 for token in rendered.tokens]
    tokens, sampled = (np.repeat(array, repeats) for array in (rendered.tokens, np.array(rendered.weights) > 0))
    generator = np.random.default_rng(len(tokens))
    logprobs = np.where(sampled, -generator.exponential(1.0, len(tokens)), np.nan).astype(np.float32)
    parts = np.array_split(np.flatnonzero(sampled), len(versions))
    drawn_by = np.full(len(tokens), -1, np.int32)
    for places, version in zip(parts, versions, strict=True):
        drawn_by[places] = version
    keys = {clip_key(clip): clip for clip in rendered.clips}
    order = tuple(clip_key(clip) for clip in rendered.clips)
    return Segment(tokens.astype(np.int32), sampled, logprobs, drawn_by, order, **fields), keys


def trace(turns, id_="t0", group="g0", rewards=None, ending="answer", more=(), problem="", **settings) -> Trace:
    """A trace of one segment, and of those in `more`, each (segment, clips)."""
    parts = [segment(turns, **settings), *more]
    clips = {key: clip for _, own in parts for key, clip in own.items()}
    rewards = {"outcome": 1.0} if rewards is None else rewards
    return Trace(id_, group, "sums", 0, tuple(one for one, _ in parts), clips, rewards, ending, problem)


def picture(seed: int = 0, height: int = 28, width: int = 42) -> np.ndarray:
    """uint8 [h, w, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def asked(text: str, *pictures: np.ndarray) -> dict:
    """A user's turn."""
    parts = [{"type": "image", "image": one} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def returned(text: str, id_: str = "functions.add:0", name: str = "add") -> dict:
    """What a tool gave back."""
    return {"role": "tool", "tool_call_id": id_, "name": name, "content": text}
