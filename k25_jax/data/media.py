"""Media of records: from a path, bytes or base64 to pixels and clips that are small enough for the packs (K2.5 §3.2)."""

import re
from collections.abc import Callable, Mapping

import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.records import RecordError
from k25_jax.runtime.paths import AnyPath, inside
from k25_jax.text.chat import part_kind
from k25_jax.vision.base64 import decode_base64, is_data_url, read_data_url
from k25_jax.vision.image import load_image, preprocess
from k25_jax.vision.patchpack import Clip
from k25_jax.vision.video import chunks, format_timestamp, load_video

MEDIA = ("image", "video")
MAX_FRAMES = 256


# ----------------------------------------------------------------------------------------------------------- where it is
def resolve_media(part: Mapping, root: AnyPath | Mapping | None) -> dict:
    """A part whose media is a path that was checked, or bytes; anything odd is left for `part_kind` to name."""
    part = dict(part)
    for kind in MEDIA:
        coded, value = part.pop(f"{kind}_base64", None), part.get(kind)
        if coded is not None:
            part[kind] = _decode(coded, f"{kind}_base64")
        elif isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            part[kind] = value["bytes"]
        elif isinstance(value, Mapping) and isinstance(value.get("path"), str):
            part[kind] = _find(root, value["path"])
        elif isinstance(value, str):
            part[kind] = _find(root, value)
    return part


def _decode(coded, name: str) -> bytes:
    if not isinstance(coded, str):
        raise RecordError("base64", f"{name} must be a string of base64, not {type(coded).__name__}")
    try:
        return read_data_url(coded) if is_data_url(coded) else decode_base64(coded)
    except ValueError as problem:
        raise RecordError("base64", f"{name} {problem}") from None


def _find(root: AnyPath | Mapping | None, path: str) -> AnyPath | bytes:
    """The file below a folder, or the bytes in an archive, that a record names."""
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://", path):
        raise RecordError(
            "path", f"{path[:200]!r} is an address, which is not fetched; store the file and give its path"
        )
    if root is None:
        raise RecordError("path", f"{path[:200]!r}: this source has no folder for media; give base64")
    if isinstance(root, AnyPath):
        return _inside(root, path)
    if path not in root:
        raise RecordError("missing", f"{path[:200]!r}: no such member beside the record ({', '.join(root)[:200]})")
    return root[path]


def _inside(root: AnyPath, path: str) -> AnyPath:
    """A file below `root`. Paths in records come from anywhere: links and `..` must not lead out of the folder."""
    shown = repr(path[:200])
    try:
        file = inside(root, path)
        exists = file is not None and file.is_file()
    except (OSError, ValueError, RuntimeError) as problem:
        raise RecordError("path", f"{shown} is not a path ({problem})") from None
    if file is None:
        raise RecordError("path", f"{shown} leads out of {root}; move the file into the folder")
    if not exists:
        raise RecordError("missing", f"{shown}: no such file in {root}")
    return file


# ------------------------------------------------------------------------------------------------------------ what it is
class MediaReader:
    """Reads the images and videos of one record, small enough for the packs."""

    def __init__(self, name: str, data: DataConfig, model: K25Config):
        self._name, self._data, self._vision = name, data, model.vision

    def load(self, part: Mapping) -> list[tuple[str | None, Clip]]:
        """The clips of a part, each with its time as text."""
        self._check_packs()
        kind = "image" if "image" in part else "video"
        source = part[kind]
        return self._image(source) if kind == "image" else self._video(source, self._title(source))

    def pixels(self, part: Mapping) -> np.ndarray:
        """The picture of a part as it is seen: uint8 RGB [h, w, 3]."""
        self._check_packs()
        part_kind(part, "image")
        source = part["image"]
        is_array = isinstance(source, np.ndarray)
        return checked_pixels(source) if is_array else load_image(source, name=self._title(source))

    def _check_packs(self):
        if not self._data.packs:
            raise RecordError("media", "holds media, but data.packs is 0 (text only)")

    def _title(self, source: AnyPath | bytes | np.ndarray) -> str:
        """What errors call it; where that begins with the record's name, `prepare` cuts it off again."""
        return str(source) if isinstance(source, AnyPath) else self._name

    def _image(self, source: AnyPath | bytes | np.ndarray) -> list[tuple[None, Clip]]:
        rgb, name = self.pixels({"image": source}), self._title(source)
        limit = self._data.pack_patches
        budget = min(self._data.max_image_patches, limit)
        return _shrink(lambda budget: [(None, preprocess(rgb, self._vision, budget, name))], budget, limit)

    def _video(self, source: AnyPath | bytes | np.ndarray, name: str) -> list[tuple[str, Clip]]:
        frames_a_clip, data = self._vision.pos_time, self._data
        budget = max(1, min(data.max_frame_patches, data.pack_patches // frames_a_clip))
        clips_a_pack = max(1, data.pack_patches // (budget * frames_a_clip))
        max_frames = min(MAX_FRAMES, data.packs * clips_a_pack * frames_a_clip)

        def read(max_patches: int) -> list[tuple[str, Clip]]:
            frames, times = load_video(source, data.video_fps, max_frames, max_patches, self._vision, name=name)
            return [(format_timestamp(time), clip) for time, clip in chunks(frames, times, self._vision, name)]

        return _shrink(read, budget, budget)


def checked_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pixels in memory, if they are a picture: uint8 RGB [h, w, 3]; raises RecordError."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise RecordError("image", f"pixels must be uint8 [h, w, 3], not {pixels.dtype} {pixels.shape}")
    return pixels


def _shrink(read: Callable[[int], list], budget: int, limit: int) -> list[tuple[str | None, Clip]]:
    """Clips read with `budget` patches a frame, or with less until the padded frames have at most `limit`."""
    while True:
        clips = read(budget)
        excess = max(len(clip.patches) // clip.grid[0] for _, clip in clips) - limit
        if excess <= 0 or budget == 1:
            return clips
        budget = max(1, budget - excess)
