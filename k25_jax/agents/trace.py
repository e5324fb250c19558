"""What an episode leaves behind: every token in the order in which the model had it, saved and read bit for bit (K2.5 §3.5).

A trace is all that training, rewards and reports know of an episode. One agent's context is a segment; what it starts (K2.5
§3.7) are segments of their own that name it as their parent, so that the segments are a tree.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.runtime.paths import AnyPath, make_folder, write
from k25_jax.vision.patchpack import Clip

KEY = re.compile("[0-9a-f]{32}")
# What NumPy and zipfile raise of damaged bytes, which may also say that they are of gigabytes, compressed or encrypted.
DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, MemoryError, RuntimeError, SyntaxError)
DAMAGED += (AttributeError, OverflowError, struct.error, zipfile.BadZipFile, zlib.error)
# answer: a turn without a call; turns: a call in the last turn; calls: one too many; tokens, context, length, seconds: the
# limit of all turns, of the context, of a turn, of time; media: a <|media_pad|> without a picture. The last two: not by it.
ENDINGS = ("answer", "turns", "calls", "tokens", "context", "length", "seconds", "media", "cancelled", "infrastructure")


class TraceError(ValueError):
    """A trace that does not hold together, or cannot be read; the message says which, and what is wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The context of one agent: T tokens, those of media_pad once for each vision token, up to the last that was sampled.

    A media_pad that was sampled is the last token, a target only: there is no picture for it. `reason` is one of ENDINGS,
    or why the context was dropped and another segment goes on.
    """

    tokens: np.ndarray  # int32 [T]
    sampled: np.ndarray  # bool [T]: the model drew this token
    logprobs: np.ndarray  # float32 [T], of the distribution that it was drawn from; NaN where none was
    versions: np.ndarray  # int32 [T], of the weights that it was drawn from; -1 where none was
    clips: tuple[str, ...] = ()  # by content (`clip_key`), in the order of their media_pads
    agent: str = "main"
    parent: int | None = None  # the segment that started this one
    stage: int = 0  # the turn of the parent in which it did
    trainable: bool = True
    reason: str = ""

    def __post_init__(self):
        length = len(self.tokens)
        for name, dtype in (("tokens", np.int32), ("sampled", bool), ("logprobs", np.float32), ("versions", np.int32)):
            array = getattr(self, name)
            if array.shape != (length,) or array.dtype != dtype:
                raise TraceError(
                    f"{self.agent}: {name} is {array.dtype}{list(array.shape)}, not {dtype.__name__}[{length}]"
                )
        if not (np.isfinite(self.logprobs[self.sampled]).all() and np.isnan(self.logprobs[~self.sampled]).all()):
            raise TraceError(f"{self.agent}: sampled tokens must have a finite log-probability, and others none")

    @property
    def length(self) -> int:
        """Sampled tokens, ends of turns included: what budgets and N count."""
        return int(self.sampled.sum())

    @property
    def turns(self) -> int:
        """Turns of the model: runs of sampled tokens."""
        return int((np.diff(self.sampled, prepend=False) & self.sampled).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One episode. `rewards` are named components in [0, 1]; what is trained on is composed of them at update time.

    `clips` has every image and video chunk of the segments once. `answer` is what was answered, "" where `ending` is not
    "answer"; `problem` says more of the ending, and what failed where it is "infrastructure".
    """

    id: str
    group: str  # samples of one problem, whose mean is the baseline
    task: str
    seed: int
    segments: tuple[Segment, ...]
    clips: Mapping[str, Clip] = dataclasses.field(default_factory=dict)
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ending: str = ""
    problem: str = ""
    answer: str = ""

    def __post_init__(self):
        if self.ending not in ENDINGS:
            raise TraceError(f"{self.id}: ending={self.ending!r} is none of {', '.join(ENDINGS)}")
        for number, segment in enumerate(self.segments):
            if segment.parent is not None and not 0 <= segment.parent < number:
                raise TraceError(
                    f"{self.id}: segment {number} names {segment.parent} as its parent, which is not before it"
                )
            if missing := [key for key in segment.clips if key not in self.clips]:
                raise TraceError(f"{self.id}: segment {number} shows {missing[0]}, which is not among its clips")
        for name, value in self.rewards.items():
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise TraceError(f"{self.id}: the reward {name}={value} does not lie in [0, 1]")

    @property
    def valid(self) -> bool:
        """Whether it may be scored and trained on: it ended by what the model did."""
        return self.ending not in ("cancelled", "infrastructure")

    @property
    def length(self) -> int:
        """Sampled tokens of all trainable segments."""
        return sum(segment.length for segment in self.segments if segment.trainable)


def clip_key(clip: Clip) -> str:
    """A hash of what a clip shows: its patches, grid and groups."""
    whole = hashlib.sha256(json.dumps([clip.grid, clip.merge, str(clip.patches.dtype)]).encode())
    whole.update(np.ascontiguousarray(clip.patches).tobytes())
    return whole.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------------- files
def to_json(trace: Trace) -> dict:
    """A trace without its clips, as JSON that `from_json` turns back into the same bits."""
    record = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace) if f.name not in ("segments", "clips")}
    return record | {"rewards": dict(trace.rewards), "segments": [_segment_to_json(s) for s in trace.segments]}


def _segment_to_json(segment: Segment) -> dict:
    """Floats are written so that they come back exactly; what was not sampled has neither log-probability nor version."""
    at = np.flatnonzero(segment.sampled)
    kept = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment)}
    kept |= {"tokens": segment.tokens.tolist(), "sampled": at.tolist()}
    kept |= {name: getattr(segment, name)[at].tolist() for name in ("logprobs", "versions")}
    return kept | {"clips": list(segment.clips)}


def from_json(record: Mapping, clips: Mapping[str, Clip]) -> Trace:
    """The trace of a record, with its clips out of `clips`; raises TraceError."""
    try:
        segments = tuple(_segment_from_json(segment) for segment in record["segments"])
        wanted = sorted({key for segment in segments for key in segment.clips})
        given = dict(record) | {"segments": segments, "clips": {key: clips[key] for key in wanted}}
        return Trace(**_checked(Trace, given))
    except TraceError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
        name = str(record.get("id", "?"))[:80] if isinstance(record, Mapping) else "?"
        raise TraceError(f"trace {name}: not as it was written: {type(error).__name__}: {error}") from error


def _segment_from_json(record: Mapping) -> Segment:
    tokens, at = (_integers(record[name], name) for name in ("tokens", "sampled"))
    length = len(tokens)
    if (np.diff(at, prepend=-1) < 1).any():
        raise TraceError("sampled must hold rising places, from 0 on")
    arrays = {"tokens": tokens, "sampled": np.zeros(length, bool), "logprobs": np.full(length, np.nan, np.float32)}
    arrays["versions"] = np.full(length, -1, np.int32)
    arrays["sampled"][at] = True
    arrays["logprobs"][at] = np.asarray(record["logprobs"], np.float32).reshape(len(at))
    arrays["versions"][at] = _integers(record["versions"], "versions").reshape(len(at))
    return Segment(**_checked(Segment, dict(record) | arrays | {"clips": tuple(record["clips"])}))


def _integers(values, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind != "i"):
        raise TraceError(f"{name} must be a list of integers")
    if len(array) and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise TraceError(f"{name} must be integers of 32 bits")
    return array.astype(np.int32)


def _checked(kind: type, given: Mapping) -> Mapping:
    """What a record gives for the fields of a dataclass, if plain ones have their type."""
    for field in dataclasses.fields(kind):
        value = given.get(field.name)
        if field.name in given and field.type in (str, int, bool) and not isinstance(value, field.type):
            raise TraceError(f"{field.name} must be {field.type.__name__}, not {str(value)[:80]!r}")
    return given


def save(folder: AnyPath, name: str, traces: Sequence[Trace]) -> None:
    """Write traces to NAME.jsonl in `folder`, and each clip once to clips/, by its content; the lines come last."""
    make_folder(folder / "clips")
    for key, clip in {key: clip for trace in traces for key, clip in trace.clips.items()}.items():
        if not (file := folder / "clips" / f"{key}.npz").exists():
            content = io.BytesIO()
            np.savez(content, patches=clip.patches, grid=clip.grid, merge=clip.merge, source=clip.source)
            write(file, content.getvalue())
    write(folder / f"{name}.jsonl", "".join(json.dumps(to_json(trace)) + "\n" for trace in traces))


def load(folder: AnyPath, name: str) -> list[Trace]:
    """The traces of NAME.jsonl in `folder`, as they were saved; raises TraceError."""
    file, clips = folder / f"{name}.jsonl", {}
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(f"{file}: {error}") from error
    for key in itertools.chain.from_iterable(map(_clips_of, records)):
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise TraceError(f"{file}: {str(key)[:80]!r} is no name of a clip")
        if key not in clips:
            clips[key] = _read_clip(folder / "clips" / f"{key}.npz", key)
    return [from_json(record, clips) for record in records]


def _clips_of(record) -> list:
    try:
        return [key for segment in record["segments"] for key in segment["clips"]]
    except (KeyError, TypeError):  # `from_json` says what is wrong with it
        return []


def _read_clip(file: AnyPath, key: str) -> Clip:
    """The clip of this content; raises TraceError when the file holds another."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            grid, merge = (tuple(int(n) for n in arrays[name]) for name in ("grid", "merge"))
            clip = Clip(arrays["patches"], grid, str(arrays["source"]), merge)
    except DAMAGED as error:
        raise TraceError(f"{file}: {type(error).__name__}: {error}") from error
    if clip_key(clip) != key:
        raise TraceError(f"{file}: holds another clip than its name says")
    return clip
