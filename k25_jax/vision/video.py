"""Videos, and animated GIF and WebP files, to sampled frames and to chunks of up to four of them (K2.5 §3.2)."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from k25_jax.config import VisionConfig
from k25_jax.vision.image import (
    MAX_PIXELS,
    check_pixels,
    open_source,
    patchify,
    resize,
    source_name,
    target_size,
    to_rgb,
)
from k25_jax.vision.patchpack import Clip

# The demuxers tried. Playlists are left out: they make the library open other files and addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,h264,hevc"

MAX_WORK = 2**38  # pixels decoded, in all; each frame or packet counts for at least LEAST_WORK
LEAST_WORK = 2**16
_MILLISECOND = 1e-3  # the clock of animations

logger = logging.getLogger(__name__)


class VideoError(ValueError):
    """A video that cannot be used; the message names the file, the reason and the remedy."""


class _Damage(Exception):
    """A part of the video is lost; the frames already kept are good."""


class _Sampler:
    """Keeps the first frame of each `interval` seconds, at most `max_frames` in all, resized as they come.

    When too many come (the length was unknown, or the file lied about it), the interval doubles and the frames that are
    no longer first in theirs go. So the memory is bounded and the frames stay uniform, whatever the file says.
    """

    def __init__(self, fps: float, max_frames: int, max_patches: int, config: VisionConfig):
        self.interval = 1.0 / fps if max_frames > 1 else math.inf
        self.max_frames, self.max_patches, self.config = max_frames, max_patches, config
        self.frames: list[np.ndarray] = []
        self.times: list[float] = []
        self.size: tuple[int, int] = (0, 0)  # of the kept frames; set by the first
        self.due = 0.0  # when the next interval begins
        self.work = 0  # pixels decoded, whether kept or not
        self.expected = 0.0  # length of the video by its header; 0: unknown

    def expect(self, seconds: float):
        """Widen the interval so that a video of this length gives at most `max_frames`."""
        self.expected = seconds
        self.interval = max(self.interval, seconds / self.max_frames)

    def count(self, pixels: int):
        """Count the work of decoding; raises _Damage when a video goes on and on, whatever its header says."""
        self.work += max(pixels, LEAST_WORK)
        if self.work > MAX_WORK:
            raise _Damage(f"more than {MAX_WORK} pixels to decode; cut it into shorter videos or scale it down")

    def wants(self, time: float, slack: float = 0.0) -> bool:
        """Whether a frame at `time` begins an interval; it may be early by `slack`, the rounding error of its clock."""
        full = len(self.frames) >= self.max_frames
        return time + slack >= self.due and not (full and time <= 1.05 * self.expected)  # headers are a little off

    def keep(self, rgb: np.ndarray, time: float, slack: float = 0.0):
        """Take a frame that was wanted."""
        if len(self.frames) >= self.max_frames:
            self._thin(slack)
        if time + slack < self.due:
            return
        if not self.frames:
            self.size, _ = target_size(*rgb.shape[:2], self.max_patches, patch=self.config.patch_size)
        self._append(resize(rgb, *self.size), time, slack)

    def _append(self, frame: np.ndarray, time: float, slack: float):
        self.frames.append(frame)
        self.times.append(time)
        self.due = ((time + slack) // self.interval + 1) * self.interval

    def _thin(self, slack: float):
        frames, times = self.frames, self.times
        spacing = (times[-1] - times[0]) / (len(times) - 1)  # wider than the interval when the video is slow
        self.interval, self.due, self.frames, self.times = 2 * max(self.interval, spacing), 0.0, [], []
        for frame, time in zip(frames, times, strict=True):
            if time + slack >= self.due:
                self._append(frame, time, slack)


def load_video(
    source: str | Path | bytes | np.ndarray,
    fps: float = 2.0,
    max_frames: int = 256,
    max_patches: int = 4096,
    config: VisionConfig | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
) -> tuple[list[np.ndarray], list[float]]:
    """Decode a video, or an animated GIF or WebP, to (frames, timestamps) at `fps` (K2.5 §3.2).

    `source` may also be frames in memory, uint8 RGB [frames, h, w, 3], `fps` of them a second.
    Frames are uint8 RGB [h, w, 3], all of one size, scaled down to `max_patches` patches as `target_size` does, not
    padded; timestamps are seconds since the first frame. A video slower than `fps` gives all its frames, each once; one
    longer than `max_frames / fps` is sampled more thinly, evenly over its length. Rotation metadata is applied. Raises
    VideoError; a damaged video of which some frames can be decoded gives those, and logs a warning. So does one that takes
    more than `MAX_WORK` to decode.
    """
    name = name or ("video" if isinstance(source, np.ndarray) else source_name(source))
    if not (fps > 0 and max_frames >= 1):
        raise VideoError(
            f"{name}: fps={fps} must be positive and max_frames={max_frames} at least 1; check data.video_fps"
        )
    sampler = _Sampler(fps, max_frames, max_patches, config or VisionConfig())
    if isinstance(source, np.ndarray):
        _read_array(source, sampler, fps, max_pixels, name)
        return sampler.frames, sampler.times
    with open_source(source, name, VideoError) as file:
        head = file.read(12)
        file.seek(0)
        animation = head[:4] == b"GIF8" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
        try:
            (_read_animation if animation else _read_stream)(file, sampler, max_pixels, name)
        except VideoError:
            raise
        except Exception as problem:  # decoders of damaged bytes raise nearly every type there is
            reason = str(problem) if isinstance(problem, _Damage) else f"{type(problem).__name__}: {problem}"
            if not sampler.frames:
                raise VideoError(
                    f"{name}: cannot be decoded ({reason}); fetch it again or drop the record"
                ) from problem
            logger.warning("%s: is damaged (%s); went on with the %d frames kept", name, reason, len(sampler.frames))
    if not sampler.frames:
        raise VideoError(f"{name}: holds no frame; fetch it again or drop the record")
    return sampler.frames, sampler.times


def _read_array(frames: np.ndarray, sampler: _Sampler, fps: float, max_pixels: int, name: str):
    """Feed frames in memory to the sampler."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise VideoError(
            f"{name}: an array of frames must be uint8 [frames, h, w, 3], not {frames.dtype} {frames.shape}"
        )
    check_pixels(frames.shape[2], frames.shape[1], max_pixels, name, VideoError)
    sampler.expect(len(frames) / fps)
    for index, frame in enumerate(frames):
        if sampler.wants(index / fps, _MILLISECOND / 2):
            sampler.keep(frame, index / fps, _MILLISECOND / 2)


def _read_animation(file: BinaryIO, sampler: _Sampler, max_pixels: int, name: str):
    """Feed the frames of a GIF or WebP file to the sampler."""
    with Image.open(file, formats=("GIF", "WEBP")) as image:
        index, time = 0, 0.0
        while True:
            try:
                image.seek(index)
            except EOFError:
                return
            check_pixels(image.width, image.height, max_pixels, name, VideoError)
            sampler.count(image.width * image.height)
            image.load()
            if sampler.wants(time, _MILLISECOND / 2):
                sampler.keep(to_rgb(image, name), time, _MILLISECOND / 2)
            delay = image.info.get("duration", 0)  # browsers read 10 and less as 100
            index, time = index + 1, time + (delay if delay > 10 else 100) * _MILLISECOND


def _read_stream(file: BinaryIO, sampler: _Sampler, max_pixels: int, name: str):
    """Feed the frames of a video container to the sampler."""
    try:
        container = av.open(file, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except av.error.FFmpegError as problem:
        raise VideoError(
            f"{name}: is not a video in a known container ({CONTAINERS}), or its header is damaged or cut off "
            f"({problem.strerror}); convert it to mp4, fetch it again, or drop the record"
        ) from problem
    with container:
        stream = _video_stream(container, name)
        check_pixels(stream.codec_context.width, stream.codec_context.height, max_pixels, name, VideoError)
        expected = _length(container, stream)
        sampler.expect(expected)
        step = float(1 / (stream.average_rate or 25))
        broken, start, end, time = 0, None, 0.0, -step
        for packet in container.demux(stream):
            sampler.count(0)
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                broken += 1
                continue
            for frame in decoded:
                check_pixels(frame.width, frame.height, max_pixels, name, VideoError)
                sampler.count(frame.width * frame.height)
                start = frame.time if start is None else start
                time = time + step if frame.time is None else frame.time - (start or 0.0)
                tick = float(frame.time_base or 0)
                end = max(end, time + (frame.duration * tick if frame.duration else step))
                if sampler.wants(time, tick / 2):
                    sampler.keep(_frame_rgb(frame), time, tick / 2)
    if broken:
        raise _Damage(f"{broken} packets could not be decoded")
    if end < 0.99 * expected - 0.5:
        raise _Damage(f"it stops at {format_timestamp(end)} of {format_timestamp(expected)}")


def _video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    if not len(container.streams):
        raise VideoError(
            f"{name}: holds no streams, its index is damaged or cut off; fetch it again or drop the record"
        )
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            if stream.codec_context is None:
                raise VideoError(f"{name}: there is no decoder for its video; convert it to mp4 with H.264")
            return stream
    kinds = ", ".join(stream.type for stream in container.streams)
    raise VideoError(f"{name}: has no video stream, only {kinds} (a cover picture does not count); drop the record")


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds of video by the header; 0 when it does not say. The container's own counts if it has no other stream."""
    if stream.duration:
        return max(0.0, float(stream.duration * stream.time_base))
    if container.duration and len(container.streams) == 1:
        return max(0.0, container.duration / av.time_base)
    return 0.0


def _frame_rgb(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def format_timestamp(seconds: float) -> str:
    """Seconds as HH:MM:SS.mmm, to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def chunks(
    frames: Sequence[np.ndarray], timestamps: Sequence[float], config: VisionConfig, source: str = "video"
) -> list[tuple[float, Clip]]:
    """Clips of up to `config.pos_time` consecutive frames, each with the time of its first frame (K2.5 §3.2).

    Frames are uint8 [h, w, 3] of one size, as `load_video` gives them: they are padded and cut, not resized again. In
    the prompt each clip follows its time, written by `format_timestamp`. Raises VideoError.
    """
    if len(frames) != len(timestamps):
        raise VideoError(f"{source}: {len(frames)} frames but {len(timestamps)} timestamps; give one for each frame")
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{source}: its frames differ in size; resize them to one")
    clips = []
    for first in range(0, len(frames), config.pos_time):
        cut = [patchify(frame, config) for frame in frames[first : first + config.pos_time]]
        time = float(timestamps[first])
        patches = np.concatenate([patches for patches, _ in cut])
        clips.append(
            (time, Clip(patches, (len(cut), *cut[0][1]), f"{source} at {format_timestamp(time)}", config.merge))
        )
    return clips
