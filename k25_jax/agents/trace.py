"""What an episode leaves behind: every token in the order in which the model had it, saved and read bit for bit (K2.5 §3.5).

A trace is all that training, rewards and reports know of an episode. One agent's context is a segment; what it starts (K2.5
§3.7) are segments of their own that name it as their parent, so that the segments are a tree.
"""

import dataclasses
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from k25_jax.runtime.paths import AnyPath, make_folder, write
from k25_jax.vision.patchpack import Clip

KEY = re.compile("[0-9a-f]{32}")
ENDINGS = ("answer", "turns", "calls", "tokens", "context", "length", "seconds", "cancelled", "infrastructure")


class TraceError(ValueError):
    """A trace that does not hold together, or cannot be read; the message says which, and what is wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The context of one agent: T tokens, those of media_pad once for each vision token.

    `reason` is one of ENDINGS, or why the context was dropped and another segment goes on.
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
        if np.isnan(self.logprobs[self.sampled]).any() or not np.isnan(self.logprobs[~self.sampled]).all():
            raise TraceError(f"{self.agent}: sampled tokens must have a log-probability, and no others")

    @property
    def length(self) -> int:
        """Sampled tokens, ends of turns included: what budgets and N count."""
        return int(self.sampled.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One episode. `rewards` are named components in [0, 1]; what is trained on is composed of them at update time.

    `clips` has every image and video chunk of the segments once. `problem` says what failed where `ending` is
    "infrastructure": such a trace is not scored.
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
        """Whether it may be scored and trained on."""
        return self.ending != "infrastructure"

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
        wanted = {key for segment in segments for key in segment.clips}
        return Trace(**(dict(record) | {"segments": segments, "clips": {key: clips[key] for key in sorted(wanted)}}))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        name = record.get("id", "?") if isinstance(record, Mapping) else "?"
        raise TraceError(f"trace {name}: not as it was written: {type(error).__name__}: {error}") from error


def _segment_from_json(record: Mapping) -> Segment:
    tokens, at = np.asarray(record["tokens"], np.int32), np.asarray(record["sampled"], np.int64)
    length = len(tokens)
    arrays = {"tokens": tokens, "sampled": np.zeros(length, bool), "logprobs": np.full(length, np.nan, np.float32)}
    arrays["versions"] = np.full(length, -1, np.int32)
    arrays["sampled"][at] = True
    arrays["logprobs"][at], arrays["versions"][at] = record["logprobs"], record["versions"]
    return Segment(**(dict(record) | arrays | {"clips": tuple(record["clips"])}))


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
    except (OSError, ValueError) as error:
        raise TraceError(f"{file}: {error}") from error
    for record in records:
        for key in _clips_of(record):
            if key not in clips:
                clips[key] = _read_clip(folder / "clips" / f"{key}.npz", key)
    return [from_json(record, clips) for record in records]


def _clips_of(record) -> Iterable[str]:
    segments = record.get("segments", ()) if isinstance(record, Mapping) else ()
    return [key for segment in segments if isinstance(segment, Mapping) for key in segment.get("clips", ())]


def _read_clip(file: AnyPath, key: str) -> Clip:
    """The clip of this content; raises TraceError when the file holds another."""
    if not KEY.fullmatch(str(key)):
        raise TraceError(f"{file.parent}: {str(key)[:80]!r} is no name of a clip")
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            grid, merge = (tuple(int(n) for n in arrays[name]) for name in ("grid", "merge"))
            clip = Clip(arrays["patches"], grid, str(arrays["source"]), merge)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TraceError(f"{file}: {error}") from error
    if clip_key(clip) != key:
        raise TraceError(f"{file}: holds another clip than its name says")
    return clip
