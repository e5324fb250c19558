"""Records to try: media, and a way to the example that training sees."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.packing import Example
from k25_jax.data.records import Record, RecordError
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import load_tokenizer

MODEL, TOKENIZER = preset("tiny"), load_tokenizer()
DATA = DataConfig(packs=4, pack_patches=256, max_image_patches=64, max_frame_patches=16, seq_len=1024)


def picture(seed: int = 0, width: int = 60, height: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int = 0, width: int = 60, height: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, width, height)).save(file, "PNG")
    return file.getvalue()


def gif() -> bytes:
    frames, file = [Image.new("RGB", (48, 32), (40 * i, 0, 0)) for i in range(4)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return file.getvalue()


PNG, OTHER, GIF = png(), png(1), gif()


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_media(folder: Path) -> Path:
    """cat.png, dog.png and clip.mp4 (which is a GIF: readers look at the bytes)."""
    for name, data in (("cat.png", PNG), ("dog.png", OTHER), ("clip.mp4", GIF)):
        (folder / name).write_bytes(data)
    return folder


def example(data, root=None) -> Example:
    return prepare(Record("r", data, root), TOKENIZER, DATA, MODEL)


def same(one: Example, other: Example) -> bool:
    """Byte for byte."""
    return (
        one.tokens.tobytes() == other.tokens.tobytes()
        and one.loss_weights.tobytes() == other.loss_weights.tobytes()
        and [clip.grid for clip in one.clips] == [clip.grid for clip in other.clips]
        and all(np.array_equal(a.patches, b.patches) for a, b in zip(one.clips, other.clips, strict=True))
    )


def learnt(found: Example) -> str:
    """What is learnt, as text with its special tokens."""
    return TOKENIZER.decode(found.tokens[found.loss_weights > 0])


def text(found: Example) -> str:
    return TOKENIZER.decode(found.tokens)


def refusal(data, root=None) -> RecordError:
    """Why the record is bad."""
    try:
        found = example(data, root)
    except RecordError as problem:
        return problem
    raise AssertionError(f"{data} was read as {text(found)!r}")


def write_jsonl(folder: Path, *records) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def parquet_rows(folder: Path, rows: list[dict]) -> list[Record]:
    """Records as pyarrow pads them."""
    names = dict.fromkeys(name for row in rows for name in row)  # pyarrow takes those of the first row
    pa.parquet.write_table(pa.Table.from_pylist([names | row for row in rows]), folder / "rows.parquet")
    source = open_source(SourceConfig(str(folder / "rows.parquet")))
    return [source[i] for i in range(len(source))]


def prepared(record: Record) -> Example:
    return prepare(record, TOKENIZER, DATA, MODEL)
