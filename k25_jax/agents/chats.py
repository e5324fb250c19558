"""Good traces as chats to learn from: rejection-sampling fine-tuning (K2.5 §3.5).

A trainable segment becomes a record of the form `conversation` (`data.forms`) that renders to exactly the segment's tokens,
with weight 1 on what the model drew and 0 elsewhere. A segment for which that cannot be is left out and counted by its
reason: a turn that was cut off, calls spelt in another way than the chat template's, a video, pictures that would be scaled.
Tools are declared by their turn `tool_declare` as the model read it, since a trace keeps tokens and no schemas.
"""

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from k25_jax.agents.trace import Segment, Trace, TraceError, load
from k25_jax.agents.transcript import Turn, check_vocabulary, turns
from k25_jax.config import DataConfig
from k25_jax.data.normalise import canonical
from k25_jax.data.packing import expand_media
from k25_jax.data.records import Record, RecordError
from k25_jax.runtime.paths import AnyPath, make_folder, write
from k25_jax.text.chat import ChatError, render
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import BadCall, parse
from k25_jax.vision.image import ImageError, target_size, unpatchify
from k25_jax.vision.patchpack import Clip

PICTURES = "pictures"  # folder beside the records
RETURN = "## Return of "


class Unfit(ValueError):
    """A trace or segment that does not become a record: (reason, detail); the reason is what is counted."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclasses.dataclass
class Harvest:
    """What became of traces: records to write, pictures by name, and how many were left out for which reason."""

    records: list[dict] = dataclasses.field(default_factory=list)
    pictures: dict[str, Clip] = dataclasses.field(default_factory=dict)
    left_out: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # reason -> the first trace, and why
    traces: int = 0

    @property
    def most_patches(self) -> int:
        """Of one picture: what data.max_image_patches and data.pack_patches must allow."""
        return max((len(clip.patches) for clip in self.pictures.values()), default=0)

    def counts(self) -> dict:
        """What `k25 data traces` prints as JSON."""
        return {
            "traces": self.traces,
            "records": len(self.records),
            "pictures": len(self.pictures),
            "most_patches": self.most_patches,
            "left_out": dict(self.left_out.most_common()),
            "examples": self.examples,
        }

    def leave_out(self, trace: Trace, problem: Unfit) -> None:
        """Count it."""
        reason, detail = problem.args
        self.left_out[reason] += 1
        self.examples.setdefault(reason, f"{trace.id}: {detail}")


def harvest(
    traces: Iterable[Trace],
    tokenizer: Tokenizer,
    min_reward: float,
    rewards: Sequence[str] = (),
    per_group: int = 0,
) -> Harvest:
    """Records of the traces whose rewards (all, or those named) reach `min_reward`; of each group the best `per_group`.

    The better of two has the larger mean of these rewards, then the fewer sampled tokens. Records that say the same are
    written once.
    """
    found, seen, groups = Harvest(), set(), {}
    for trace in traces:
        found.traces += 1
        try:
            groups.setdefault((trace.task, trace.group), []).append((_rank(trace, min_reward, rewards), trace))
        except Unfit as problem:
            found.leave_out(trace, problem)
    for members in groups.values():
        kept = 0
        for _, trace in sorted(members, key=lambda member: member[0]):
            try:
                if per_group and kept >= per_group:
                    raise Unfit("group", f"{per_group} of its group are taken")
                kept += _take(found, trace, tokenizer, seen)
            except Unfit as problem:
                found.leave_out(trace, problem)
    return found


def _rank(trace: Trace, min_reward: float, names: Sequence[str]) -> tuple:
    """The less, the better; raises Unfit."""
    if not trace.valid:
        raise Unfit(trace.ending, trace.problem or "it is not scored")
    if not trace.rewards:
        raise Unfit("unscored", "it has no rewards")
    if missing := [name for name in names if name not in trace.rewards]:
        raise Unfit("unscored", f"it has no reward {missing[0]}; there are {', '.join(trace.rewards)}")
    values = [trace.rewards[name] for name in names or trace.rewards]
    if min(values) < min_reward:
        raise Unfit("reward", f"{min(values):g} < {min_reward:g}")
    return -sum(values) / len(values), trace.length, trace.id


def _take(found: Harvest, trace: Trace, tokenizer: Tokenizer, seen: set[str]) -> bool:
    """Add the records of a trace, all or none; whether any of them was new."""
    segments = [segment for segment in trace.segments if segment.trainable and segment.sampled.any()]
    if not segments:
        raise Unfit("empty", "nothing in it was sampled to be learnt")
    check_vocabulary(segments, tokenizer, trace.id)
    records, new = [to_chat(trace, segment, tokenizer) for segment in segments], []
    for record in records:
        content = {name: record[name] for name in ("messages", "mode")}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        if key not in seen:
            seen.add(key)
            new.append(record)
    if not new:
        raise Unfit("duplicate", "another trace says the same")
    found.records += new
    found.pictures |= {picture_name(key): trace.clips[key] for segment in segments for key in segment.clips}
    return True


# ------------------------------------------------------------------------------------------------- a segment as a record
def to_chat(trace: Trace, segment: Segment, tokenizer: Tokenizer) -> dict:
    """The record of one segment, checked to render to its tokens; raises Unfit."""
    parts = turns(segment, tokenizer)
    if any(not turn.kind for turn in parts):
        raise Unfit("no chat", "it holds tokens outside of any turn")
    mode = next((turn.mode for turn in parts if segment.sampled[turn.body : turn.end].any()), "")
    clips = iter(segment.clips)
    messages = [_message(turn, segment, tokenizer, mode, clips, trace) for turn in parts]
    _check(messages, mode, segment, tokenizer, trace)
    kept = {"task": trace.task, "group": trace.group, "trace": trace.id, "rewards": dict(trace.rewards)}
    return {"messages": messages, "mode": mode} | kept


def picture_name(key: str) -> str:
    """The path of a clip's picture beside the records."""
    return f"{PICTURES}/{key}.png"


def _message(turn: Turn, segment: Segment, tokenizer: Tokenizer, mode: str, clips, trace: Trace) -> dict:
    sampled = segment.sampled[turn.body : turn.end]
    tokens = segment.tokens[turn.body : turn.end].tolist()
    end = tokenizer.special["<|im_end|>"]
    if tokens[-1:] != [end]:
        raise Unfit("cut off", f"a turn of {turn.name} has no end")
    if turn.kind == "assistant":
        if sampled.any() and not sampled.all():
            raise Unfit("cut off", "a turn was cut off before its end")
        return _said(turn, tokens, tokenizer, mode, bool(sampled.any()))
    if sampled.any():
        raise Unfit("no chat", f"tokens of a turn of {turn.name} were sampled")
    content = _content(tokens[:-1], tokenizer, clips, trace)
    message = {"role": turn.kind, "content": content}
    first = content[0]["text"] if content and content[0]["type"] == "text" else ""
    if turn.kind == "system" and first.startswith(RETURN) and "\n" in first:
        call, _, rest = first.removeprefix(RETURN).partition("\n")
        parts = [*([{"type": "text", "text": rest}] if rest else []), *content[1:]]
        message = {"role": "tool", "tool_call_id": call, "content": parts}
    return message if turn.name == message["role"] else message | {"name": turn.name}


def _said(turn: Turn, tokens: Sequence[int], tokenizer: Tokenizer, mode: str, learnt: bool) -> dict:
    """A turn of the assistant's, with its calls word for word. A given one without a thought is opened as in instant mode."""
    said = parse(tokens, tokenizer, turn.mode)
    content = said.content
    if mode == "plain" and said.reasoning:
        content = f"<think>{said.reasoning}</think>{content}"
    message = {"role": "assistant", "content": content}
    if mode == "thinking":
        message["reasoning_content"] = said.reasoning
    for call in said.calls:
        if isinstance(call, BadCall):
            raise Unfit("calls", f"a call that could not be made: {call.error}")
    if said.calls:
        written = zip(said.calls, _arguments(tokens, tokenizer), strict=True)
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}
            for call, text in written
        ]
    if turn.name != "assistant":
        message["name"] = turn.name
    return message if learnt else message | {"weight": 0}


def _arguments(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterable[str]:
    """The arguments of each call as they were written."""
    begin, end = (tokenizer.special[f"<|tool_call_{name}|>"] for name in ("argument_begin", "end"))
    starts = [at + 1 for at, token in enumerate(tokens) if token == begin]
    for start in starts:
        stop = tokens.index(end, start) if end in tokens[start:] else len(tokens)
        yield tokenizer.decode(tokens[start:stop])


def _content(tokens: Sequence[int], tokenizer: Tokenizer, clips, trace: Trace) -> list[dict]:
    """Texts and pictures of a turn that was given."""
    begin, middle, pad, end = (
        tokenizer.special[f"<|media_{name}|>"] for name in ("begin", "content", "pad", "end")
    )  # fmt: skip
    parts, at = [], 0
    while at < len(tokens):
        stop = tokens.index(begin, at) if begin in tokens[at:] else len(tokens)
        if stop > at:
            parts.append({"type": "text", "text": tokenizer.decode(tokens[at:stop])})
        if stop < len(tokens):
            if end not in tokens[stop:] or middle not in tokens[stop:]:
                raise Unfit("no chat", "a picture has no end")
            kind = tokenizer.decode(tokens[stop + 1 : tokens.index(middle, stop)])
            key = next(clips, None)
            if kind != "image" or key is None or pad not in tokens[stop:]:
                raise Unfit("video", "a video cannot be written so that it is read again with the same pixels")
            check_picture(trace.clips[key])
            parts.append({"type": "image", "image": picture_name(key)})
            stop = tokens.index(end, stop) + 1
        at = stop
    return parts


def check_picture(clip: Clip) -> None:
    """Raise Unfit where reading the picture again would not give these patches."""
    if clip.grid[0] != 1:
        raise Unfit("video", f"{clip.source}: {clip.grid[0]} frames are no picture")
    try:
        height, width = unpatchify(clip).shape[1:3]
    except ImageError as problem:
        raise Unfit("picture", str(problem)) from None
    patch = height // clip.grid[1]
    if target_size(height, width, DataConfig().max_image_patches, patch=patch)[0] != (height, width):
        raise Unfit(
            "picture", f"{clip.source}: of {len(clip.patches)} patches, it would be scaled when it is read again"
        )


def _check(messages: Sequence[Mapping], mode: str, segment: Segment, tokenizer: Tokenizer, trace: Trace) -> None:
    """Raise Unfit unless the messages render to the segment's tokens, learnt where they were sampled."""
    by_name = {picture_name(key): trace.clips[key] for key in segment.clips}
    try:
        read = canonical(Record(trace.id, {"messages": messages}, None)).data["messages"]
        again = render(read, tokenizer, lambda part: [(None, by_name[part["image"]])], mode=mode)
    except (ChatError, RecordError) as problem:
        raise Unfit("spelling", f"{problem}") from None
    pad = tokenizer.special["<|media_pad|>"]
    tokens = expand_media(again.tokens, [clip.tokens for clip in again.clips], pad)
    if not np.array_equal(tokens, segment.tokens):
        raise Unfit("spelling", "the chat template writes what was said with other tokens")
    weights = np.repeat(again.weights, _repeats(again, pad))
    if not np.array_equal(weights > 0, segment.sampled):
        raise Unfit("spelling", "other tokens would be learnt than were sampled")


def _repeats(rendered, pad: int) -> list[int]:
    counts = iter([clip.tokens for clip in rendered.clips])
    return [next(counts) if token == pad else 1 for token in rendered.tokens]


# ------------------------------------------------------------------------------------------------------------- files
def trace_files(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """The files of traces that were named: lines of JSON, folders of such, or runs of the stage rl; raises TraceError."""
    files = []
    for path in paths:
        groups = path / "rl" / "groups"
        folder = groups if path.is_dir() and groups.is_dir() else path
        below = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
        if not below:
            raise TraceError(f"{folder}: holds no file of traces (*.jsonl)")
        files += below
    return files


def read_traces(files: Iterable[AnyPath]) -> Iterable[Trace]:
    """The traces of these files, a file at a time."""
    for file in files:
        yield from load(file.parent, file.name.removesuffix(".jsonl"))


def write_chats(found: Harvest, output: AnyPath) -> None:
    """Pictures, then the records, which are there when they are whole."""
    if found.pictures:
        make_folder(output.parent / PICTURES)
    for name, clip in found.pictures.items():
        content = io.BytesIO()
        Image.fromarray(unpatchify(clip)[0]).save(content, "PNG")
        write(output.parent / name, content.getvalue())
    write(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found.records))


def summary(found: Harvest, output: str) -> str:
    """What was written and what was left out, for a person."""
    lines = [f"{len(found.records)} records of {found.traces} traces" + (f": {output}" if found.records else "")]
    for reason, number in found.left_out.most_common():
        lines.append(f"  {number} left out, {reason}; as {found.examples[reason]}")
    if found.pictures:
        lines.append(
            f"{len(found.pictures)} pictures of at most {found.most_patches} patches, which data.max_image_patches and "
            "data.pack_patches must allow"
        )
    return "\n".join(lines)
