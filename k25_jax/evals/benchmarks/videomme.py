"""Video-MME: multiple choice about videos, without subtitles (K2.5 §4)."""

import re

from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks.base import VISION, Benchmark
from k25_jax.runtime.paths import AnyPath

FOLDERS = (".", "data", "videos", "../data", "../videos")  # seen from the table
SUFFIXES = (".mp4", ".mkv", ".webm")
_PREFIX = re.compile(r"^[A-Z][.):]\s*")


class VideoMme(Benchmark):
    """Fields: videoID, question, options (each with its letter), answer, duration.

    The videos lie beside the table, or in a folder `data` or `videos` beside or above it, as <videoID>.mp4.
    """

    name, category, k, max_tokens = "videomme", "video", 3, VISION

    def question(self, index: int) -> str:
        return self.rows.field(index, ("question",)).strip()

    def options(self, index: int) -> list[str]:
        return [_PREFIX.sub("", str(option)).strip() for option in self.rows.field(index, ("options",), list)]

    def right(self, index: int) -> int:
        return self.letter(index, self.rows.field(index, ("answer",)), self.options(index))

    def media(self, index: int) -> list[dict]:
        return [{"type": "video", "video": self.video(index)}]

    def video(self, index: int) -> AnyPath:
        """The file of the question's video; raises DataError."""
        name = self.rows.field(index, ("videoID",))
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{self.rows.label(index)}: videoID {name[:80]!r} is not the name of a video")
        for folder in FOLDERS:
            for suffix in SUFFIXES:
                if (path := self.rows.root / folder / f"{name}{suffix}").is_file():
                    return path
        raise DataError(
            f"{self.rows.label(index)}: there is no {name}{SUFFIXES[0]} in {', '.join(FOLDERS)} of {self.rows.root}"
        )

    def group(self, index: int) -> str:
        return self.rows.field(index, ("duration",), default="").strip()
