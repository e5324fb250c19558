"""Videos, and animated GIF and WebP files, to sampled frames and to chunks of up to four of them (K2.5 §3.2)."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from k25_jax.config import VisionConfig
from k25_jax.runtime.paths import AnyPath
from k25_jax.vision.frame_sampler import Damage, FrameSampler, Late
from k25_jax.vision.image import MAX_PIXELS, ImageError, check_pixels, open_source, patchify, source_name, to_rgb
from k25_jax.vision.orientation import from_matrix, turn
from k25_jax.vision.patchpack import Clip

# The demuxers tried. Playlists are left out: they make the library open other files and addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,h264,hevc"
# Until PyAV 19, texts that are not UTF-8 are an error unless this is said; since then it is not a parameter.
_ANY_TEXT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Brands of pictures and animations in HEIF and AVIF: the demuxer of mp4 takes them, and gives one picture, or a tile of it.
_HEIF = frozenset(b"avif avis avci avcs heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1".split())

ANIMATION = 64  # a pixel of an animation, which Pillow composes, counts as so many
_MILLISECOND = 1e-3  # the clock of animations

logger = logging.getLogger(__name__)


class VideoError(ValueError):
    """A video that cannot be used; the message names the file, the reason and the remedy."""


@contextmanager
def _library():
    """Around one call of PyAV or Pillow: whatever it raises of damaged bytes becomes Damage."""
    try:
        yield
    except Exception as problem:  # decoders of damaged bytes raise nearly every type there is
        raise Damage(f"{type(problem).__name__}: {problem}") from problem


def load_video(
    source: str | AnyPath | bytes | np.ndarray,
    fps: float = 2.0,
    max_frames: int = 256,
    max_patches: int = 4096,
    config: VisionConfig | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    seconds: float = math.inf,
) -> tuple[list[np.ndarray], list[float]]:
    """Decode a video, or an animated GIF or WebP, to (frames, timestamps) at `fps` (K2.5 §3.2).

    `source` may also be frames in memory, uint8 RGB [frames, h, w, 3], `fps` of them a second.
    Frames are uint8 RGB [h, w, 3], all of one size, scaled down to `max_patches` patches as `target_size` does, not
    padded; timestamps are seconds since the first frame. A video slower than `fps` gives all its frames, each once; one
    longer than `max_frames / fps` is sampled more thinly, evenly over its length. Where the file's clock agrees, a frame's
    time is its number divided by the rate, as the public processor has it. Turns and mirrors of the display matrix are
    applied; the shape of pixels is not, as in the public readers: a picture of 720 x 576 has that size, however wide its
    pixels are. Raises VideoError; a damaged video of which some frames can be decoded gives those, and logs a warning. So
    does one that takes more than `MAX_WORK` to decode. One that takes longer than `seconds` is refused.
    """
    name = name or ("video" if isinstance(source, np.ndarray) else source_name(source))
    if not (fps > 0 and max_frames >= 1):
        raise VideoError(
            f"{name}: fps={fps} must be positive and max_frames={max_frames} at least 1; check data.video_fps"
        )
    sampler = FrameSampler(fps, max_frames, max_patches, config or VisionConfig(), seconds)
    if isinstance(source, np.ndarray):
        _read_array(source, sampler, fps, max_pixels, name)
        return sampler.frames, sampler.times
    with open_source(source, name, VideoError) as file:
        head = file.read(512)
        file.seek(0)
        if kind := _picture(head):
            raise VideoError(f"{name}: is {kind}, which is not read as a video; convert it to mp4, GIF or WebP")
        animation = head[:4] == b"GIF8" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        try:
            (_read_animation if animation else _read_stream)(file, sampler, max_pixels, name)
        except Damage as problem:
            if not sampler.frames:
                raise VideoError(
                    f"{name}: cannot be decoded ({problem}); fetch it again or drop the record"
                ) from problem
            logger.warning("%s: is damaged (%s); went on with the %d frames kept", name, problem, len(sampler.frames))
        except Late:
            raise VideoError(
                f"{name}: takes more than {seconds:g} s to decode; cut it into shorter videos or scale it down"
            ) from None
    if not sampler.frames:
        raise VideoError(f"{name}: holds no frame; fetch it again or drop the record")
    return sampler.frames, sampler.times


def _picture(head: bytes) -> str:
    """What a file that begins so is, if it is a picture or an animation that would lose its frames here; else ""."""
    if head.startswith(b"\x89PNG"):
        return "a PNG picture or animation (APNG)"
    size = int.from_bytes(head[:4]) if head[4:8] == b"ftyp" else 0
    brands = [head[place : place + 4] for place in range(8, min(size, len(head)), 4) if place != 12]  # 12: a version
    return "a picture or animation in AVIF or HEIF" if _HEIF.intersection(brands) else ""


def _read_array(frames: np.ndarray, sampler: FrameSampler, fps: float, max_pixels: int, name: str):
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


def _read_animation(file: BinaryIO, sampler: FrameSampler, max_pixels: int, name: str):
    """Feed the frames of a GIF or WebP file to the sampler."""
    with _library():
        image = Image.open(file, formats=("GIF", "WEBP"))
    with image:
        index, milliseconds = 0, 0
        while True:
            with _library():
                try:
                    image.seek(index)
                except EOFError:
                    return
            check_pixels(image.width, image.height, max_pixels, name, VideoError)
            sampler.count(ANIMATION * image.width * image.height)
            with _library():
                image.load()
            time = milliseconds / 1000  # rounded once
            if sampler.wants(time, _MILLISECOND / 2):
                sampler.keep(_frame_of(image, name), time, _MILLISECOND / 2)
            delay = image.info.get("duration", 0)  # browsers read 10 and less as 100
            index, milliseconds = index + 1, milliseconds + (delay if delay > 10 else 100)


def _frame_of(image: Image.Image, name: str) -> np.ndarray:
    try:
        return to_rgb(image, name)
    except ImageError as problem:
        raise Damage(str(problem)) from problem


def _read_stream(file: BinaryIO, sampler: FrameSampler, max_pixels: int, name: str):
    """Feed the frames of a video container to the sampler."""
    try:
        with _library():
            container = av.open(file, options={"format_whitelist": CONTAINERS}, **_ANY_TEXT)
    except Damage as problem:
        raise VideoError(
            f"{name}: is not a video in a known container ({CONTAINERS}), or its header is damaged or cut off "
            f"({problem}); convert it to mp4, fetch it again, or drop the record"
        ) from problem
    with container:
        stream = _video_stream(container, name)
        check_pixels(stream.codec_context.width, stream.codec_context.height, max_pixels, name, VideoError)
        expected = _length(container, stream)
        sampler.expect(expected)
        clock, orientations, broken, end = _Clock(stream), {}, 0, 0.0
        for packet in _packets(container, stream):
            sampler.count(_scans(packet, stream))
            with _library():
                try:
                    decoded = packet.decode()
                except av.error.FFmpegError:
                    broken += 1
                    continue
            for frame in decoded:
                check_pixels(frame.width, frame.height, max_pixels, name, VideoError)
                sampler.count(frame.width * frame.height)
                time, tick, length = clock.read(frame)
                end = max(end, time + length)
                if sampler.wants(time, tick / 2):
                    sampler.keep(_frame_rgb(frame, orientations, name), time, tick / 2)
    if broken:
        raise Damage(f"{broken} packets could not be decoded")
    if end < 0.99 * expected - 0.5:
        raise Damage(f"it stops at {format_timestamp(end)} of {format_timestamp(expected)}")


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    packets = container.demux(stream)
    while True:
        with _library():
            packet = next(packets, None)
        if packet is None:
            return
        yield packet


def _scans(packet: av.Packet, stream: av.VideoStream) -> int:
    """The pixels of a packet's scans: a frame of progressive JPEG may have any number of them, in a few bytes each."""
    context = stream.codec_context
    return bytes(packet).count(b"\xff\xda") * context.width * context.height if context.name == "mjpeg" else 0


class _Clock:
    """Tells the time of frames since the first: number / rate where the file's clock agrees, else as the file says."""

    def __init__(self, stream: av.VideoStream):
        rate = _fraction(stream.average_rate)
        self._rate = rate if rate > 0 else Fraction(25)
        self._start, self._time = None, -1 / self._rate

    def read(self, frame: av.VideoFrame) -> tuple[float, float, float]:
        """(seconds since the first frame, seconds of a tick of the clock, seconds that the frame is shown)."""
        tick, step = _fraction(frame.time_base), 1 / self._rate
        if frame.pts is None:
            self._time += step
        else:
            self._start = frame.pts if self._start is None else self._start
            self._time = (frame.pts - self._start) * tick
        number = round(self._time * self._rate)
        agrees = abs(number * step - self._time) <= tick  # both ends of the span are rounded to ticks
        time = number / float(self._rate) if agrees else float(self._time)
        return time, float(tick), float(frame.duration * tick if frame.duration else step)


def _fraction(value) -> Fraction:
    """PyAV's rational number, of whichever class; 0 for what is not one."""
    return Fraction(value.numerator, value.denominator) if value is not None and value.denominator else Fraction(0)


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
        return max(0.0, float(stream.duration * _fraction(stream.time_base)))
    if container.duration and len(container.streams) == 1:
        return max(0.0, container.duration / av.time_base)
    return 0.0


def _frame_rgb(frame: av.VideoFrame, orientations: dict, name: str) -> np.ndarray:
    """The pixels of a frame as it is shown; `orientations` keeps what was found out of the display matrices so far."""
    matrix = _display_matrix(frame)
    if matrix not in orientations:
        orientations[matrix] = from_matrix(matrix)
        if orientations[matrix] is None:
            logger.warning(
                "%s: its display matrix %s is neither a turn nor a mirror; shown as it is stored", name, matrix
            )
    with _library():
        rgb = frame.to_ndarray(format="rgb24")
    return turn(rgb, orientations[matrix] or 1)


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """(a, b, c, d) of `orientation.MATRICES`, with any scale, as the container or the stream says."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # until PyAV 19, other side data of an unknown kind is an error; the angle can be had
        angle = -math.radians(frame.rotation)
        return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    numbers = np.frombuffer(data, "=i4") / 65536
    return tuple(numbers[[0, 1, 3, 4]].tolist())


def format_timestamp(seconds: float) -> str:
    """Seconds as HH:MM:SS.mmm, as the public processor writes them: cut off to milliseconds, the day left out."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours % 24:02d}:{minutes:02d}:{whole:02d}.{int(seconds % 1 * 1000):03d}"


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
