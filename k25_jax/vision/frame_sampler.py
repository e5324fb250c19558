"""Which frames of a video are kept, and how much work it may make (K2.5 §3.2)."""

import math
from time import monotonic

import numpy as np

from k25_jax.config import VisionConfig
from k25_jax.vision.image import resize, target_size

MAX_WORK = 2**38  # pixels decoded, in all; each frame or packet counts for at least LEAST_WORK
LEAST_WORK = 2**16


class Damage(Exception):
    """A part of the video is lost; the frames already kept are good."""


class Late(Exception):
    """The time allowed for decoding is over."""


class FrameSampler:
    """Keeps the first frame of each `interval` seconds, at most `max_frames` in all, resized as they come.

    When too many come (the length was unknown, or the file lied about it), the interval doubles and the frames that are
    no longer first in theirs go. So the memory is bounded and the frames stay uniform, whatever the file says.
    """

    def __init__(self, fps: float, max_frames: int, max_patches: int, config: VisionConfig, seconds: float):
        self.interval = 1.0 / fps if max_frames > 1 else math.inf
        self.max_frames, self.max_patches, self.config = max_frames, max_patches, config
        self.frames: list[np.ndarray] = []
        self.times: list[float] = []
        self.size: tuple[int, int] = (0, 0)  # of the kept frames; set by the first
        self.due = 0.0  # when the next interval begins
        self.work = 0  # pixels decoded, whether kept or not
        self.seconds, self.began = seconds, monotonic()
        self.expected = 0.0  # length of the video by its header; 0: unknown

    def expect(self, seconds: float):
        """Widen the interval so that a video of this length gives at most `max_frames`."""
        self.expected = seconds
        self.interval = max(self.interval, seconds / self.max_frames)

    def count(self, pixels: int):
        """Count the work of decoding; raises Damage when a video goes on and on, Late when time is up."""
        if monotonic() - self.began > self.seconds:
            raise Late
        self.work += max(pixels, LEAST_WORK)
        if self.work > MAX_WORK:
            raise Damage(f"more than {MAX_WORK} pixels to decode; cut it into shorter videos or scale it down")

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
