"""`k25 data build`: sources to ArrayRecord shards that hold everything, with a manifest (K2.5 §3.3).

A shard is written by one worker under another name and then renamed, so that what has its name is whole. A build that
was killed goes on with the shards that are missing and ends with the same bytes. Until the end all of them lie in
`unfinished`, so that nothing trains on half of a data set.
"""

import base64
import collections
import datetime
import decimal
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from k25_jax.config import to_dict
from k25_jax.data.attach import as_list
from k25_jax.data.media import MEDIA, checked_pixels, resolve_media
from k25_jax.data.normalise import canonical
from k25_jax.data.records import MAX_RECORD_BYTES, DataError, Record, RecordError, parse_record, read_bytes
from k25_jax.data.sources import MANIFEST
from k25_jax.data.statistics import Counts, Joined, Reader
from k25_jax.data.workers import DEADLINE, Lost, Unit, run
from k25_jax.runtime.paths import size_and_time, to_path
from k25_jax.text.tokenizer import load_tokenizer

SHARD_RECORDS = 2048  # in a shard, unless the number of shards is given


@dataclass(frozen=True)
class Shards:
    """The job of the workers: the records that `reader` reads, as shard files of `folder`."""

    reader: Reader
    folder: str
    count: int

    def start(self) -> Callable[[Unit, Lost, Callable[[int], None]], dict]:
        """In a worker: write shards."""
        joined, tokenizer = Joined(self.reader.sources), load_tokenizer(self.reader.data.tokenizer)

        contain = functools.partial(contained, fps=self.reader.data.video_fps)

        def work(unit: Unit, lost: Lost, begin: Callable[[int], None]) -> dict:
            name, counts = shard_name(unit.number, self.count), Counts()
            draft = Path(self.folder, f"draft-{unit.number}-{os.getpid()}")
            writer = ArrayRecordWriter(str(draft), "group_size:1")
            for index in range(*unit[1:]):
                begin(index)
                record = self.reader.examine(index, joined, tokenizer, lost, counts, contain)
                if record is not None:
                    writer.write(json.dumps(record.data).encode())
            writer.close()
            result = {"counts": counts.to_json(), "bytes": draft.stat().st_size, "sha256": _sha256(draft)}
            os.replace(draft, Path(self.folder, name))
            write_json(Path(self.folder, f"{name}.json"), result)  # last: what has this file is whole
            return result

        return work


def shard_name(number: int, count: int) -> str:
    """The file of a shard."""
    return f"data.array_record-{number:05d}-of-{count:05d}"


def contained(record: Record, fps: float = 2.0) -> Record:
    """The record in our spelling with its media inside, in base64; `fps` frames in memory are a second of a video.

    All fields stay, so that whatever reads the one reads the other the same. Raises RecordError.
    """
    data, root = canonical(record).data, record.root
    out = {"from": record.name} | _contain(data, root, fps)
    if "messages" in data:
        out["messages"] = [_contain_message(message, root, fps) for message in as_list(data, "messages")]
    if "parts" in data:
        out["parts"] = [_contain(part, root, fps) for part in as_list(data, "parts")]
    try:
        line = json.dumps(out, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise RecordError("form", f"a field has no form in JSON ({problem})") from None
    if len(line) > MAX_RECORD_BYTES:
        raise RecordError("too large", f"{len(line)} bytes with its media exceed {MAX_RECORD_BYTES}")
    return Record(record.name, parse_record(line))


def _contain_message(message, root, fps: float):
    if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
        return {**message, "content": [_contain(part, root, fps) for part in message["content"]]}
    return message


def _contain(part, root, fps: float):
    """A part with its media in base64; what is odd about it, reading it will say."""
    if not isinstance(part, Mapping):
        return part
    part = resolve_media(part, root)
    for kind in MEDIA:
        value = part.get(kind)
        if isinstance(value, os.PathLike):
            value = read_bytes(to_path(value))
        elif isinstance(value, np.ndarray):
            value = _png(value) if kind == "image" else _film(value, fps)
        if isinstance(value, bytes):
            del part[kind]
            part[f"{kind}_base64"] = base64.b64encode(value).decode()
    return part


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(checked_pixels(pixels)).save(file, "PNG")
    return file.getvalue()


def _film(frames: np.ndarray, fps: float) -> bytes:
    """A video that gives these very pixels again, in Matroska."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise RecordError("video", f"frames must be uint8 [frames, h, w, 3], not {frames.dtype} {frames.shape}")
    file, millisecond = io.BytesIO(), Fraction(1, 1000)
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        stream.codec_context.time_base = millisecond
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(number / fps / millisecond), millisecond
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _plain(value):
    """Numbers and lists of NumPy, dates and decimals, for JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


# ---------------------------------------------------------------------------------------------------------------- build
def build(
    reader: Reader,
    output: Path,
    shards: int = 0,
    workers: int = 0,
    deadline: float = DEADLINE,
    report: Callable[[int, int, int], None] = lambda done, total, bad: None,
) -> dict:
    """Write the data set, or go on where a build was interrupted; the manifest. Raises DataError."""
    joined = Joined(reader.sources)
    count = min(shards or -(-len(joined) // SHARD_RECORDS), len(joined))
    plan = _plan(reader, joined, count)
    unfinished = output / "unfinished"
    if (output / MANIFEST).exists():
        return _finished(output, plan)
    unfinished.mkdir(parents=True, exist_ok=True)
    with open(unfinished / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{output}: another build is writing here; wait for it, or give another --output") from None
        _check_plan(unfinished / "plan.json", plan, output)
        for draft in unfinished.glob("draft-*"):
            draft.unlink()
        _write_shards(Shards(reader, str(unfinished), count), len(joined), workers, deadline, report)
        return _finish(output, plan, count)


def _plan(reader: Reader, joined: Joined, shards: int) -> dict:
    """What decides the bytes of the output."""
    data = to_dict(reader.data)
    sources = [
        {"path": config.path, "records": len(source), "left_out": dict(source.left_out), "sha256": _fingerprint(source)}
        for config, source in zip(reader.sources, joined.sources, strict=True)
    ]
    taken = "packs pack_patches max_image_patches max_frame_patches video_fps tokenizer".split()
    config = {"data": {key: data[key] for key in taken}, "model": to_dict(reader.model)}
    return json.loads(json.dumps({"sources": sources, "shards": shards, "config": config}))


def _fingerprint(source) -> str:
    """Of names, sizes and times of the files of a source, not of their bytes."""
    digest = hashlib.sha256()
    for file in source.files():
        try:
            found = "\0".join(map(str, size_and_time(file)))
        except OSError:  # a link that leads nowhere is a bad record, not a bad source
            found = "missing"
        digest.update(f"{file}\0{found}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _finished(output: Path, plan: dict) -> dict:
    try:
        manifest = json.loads((output / MANIFEST).read_bytes())
        same = {key: manifest[key] for key in plan} == plan
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{output / MANIFEST} is no manifest ({problem}); give another --output") from None
    if not same:
        raise DataError(f"{output} holds a data set of other sources or another configuration; give another --output")
    shutil.rmtree(output / "unfinished", ignore_errors=True)
    return manifest


def _check_plan(file: Path, plan: dict, output: Path):
    if not file.exists():
        return write_json(file, plan)
    before = json.loads(file.read_bytes())
    if before != plan:
        changed = [key for key in plan if before.get(key) != plan[key]]
        raise DataError(
            f"{output} holds an unfinished build with other {' and '.join(changed)}; give another --output, or begin "
            f"anew: what was built so far is in {file.parent}"
        )


def _write_shards(job: Shards, total: int, workers: int, deadline: float, report: Callable[[int, int, int], None]):
    bounds = [total * number // job.count for number in range(job.count + 1)]
    parts = [Unit(number, bounds[number], bounds[number + 1]) for number in range(job.count)]
    folder = Path(job.folder)
    missing = [unit for unit in parts if not (folder / f"{shard_name(unit.number, job.count)}.json").exists()]
    before = total - sum(unit.last - unit.first for unit in missing)
    counts = Counts()

    def listen(done: int):
        report(before + done, total, len(counts.bad))

    for _, result in run(job, missing, workers, deadline, listen):
        counts.merge(Counts.from_json(result["counts"]))
    report(total, total, len(counts.bad))


def _finish(output: Path, plan: dict, count: int) -> dict:
    """Move the shards to their place; the manifest is the last, and makes them a data set."""
    left_out = sum((collections.Counter(source["left_out"]) for source in plan["sources"]), collections.Counter())
    unfinished, counts, shards = output / "unfinished", Counts(left_out=left_out), []
    for number in range(count):
        name = shard_name(number, count)
        result = json.loads((unfinished / f"{name}.json").read_bytes())
        part = Counts.from_json(result["counts"])
        shards.append({"name": name, "records": part.good, "bytes": result["bytes"], "sha256": result["sha256"]})
        counts.merge(part)
        if (unfinished / name).exists():
            os.replace(unfinished / name, output / name)
    lines = [json.dumps({"name": bad.name, "reason": bad.reason, "detail": bad.detail}) for bad in counts.bad]
    draft = unfinished / "bad.jsonl"
    draft.write_text("".join(f"{line}\n" for line in lines))
    os.replace(draft, output / "bad.jsonl")
    modality = "vision" if counts.total("clips") else "text"
    manifest = {"modality": modality, **counts.summary(), **plan, "files": shards}
    write_json(output / MANIFEST, manifest)
    shutil.rmtree(unfinished)
    return manifest


def write_json(file: Path, values: dict):
    """A JSON file, whole or not at all."""
    draft = file.with_name(f"draft-{file.name}-{os.getpid()}")
    with open(draft, "w") as handle:
        json.dump(values, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, file)


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
