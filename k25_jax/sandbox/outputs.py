"""What one call prints and shows, as its last state is: updated, cleared, drawn again, and cut to the limits."""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping

from k25_jax.sandbox.observation import Excerpt, Observation
from k25_jax.sandbox.screen import Screen

IMAGES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff")
TEXTS = ("text/markdown", "text/latex", "text/html", "image/svg+xml", "application/json", "application/javascript")
MOST_PARTS = 200  # with displays that can be updated
MOST_IMAGE_BYTES = 16 * 2**20  # of all images of a call
_BARE = re.compile(r"<[\w.]+ (?:object|(?:object )?at 0x[0-9a-f]+)>")


class Outputs:
    """Takes the messages of a kernel. `check` says why an image cannot be shown, "" if it can."""

    def __init__(self, output_chars: int, images: int, check: Callable[[bytes], str]):
        self._most, self._most_images, self._check = output_chars, images, check
        self._clear()
        self._clear_next = self.failed = False

    def add(self, kind: str, content: Mapping | None, size: int = 0):
        """One message; `content` None: it was too large. Raises an exception of any kind if it is damaged."""
        if kind == "clear_output":
            self._clear_next = True
            if not content["wait"]:
                self._cleared()
        elif content is None:
            self._cleared()
            self._line(f"[an output of {size / 2**20:.1f} MB or of very many parts is left out]")
        elif kind == "stream":
            self._cleared()
            self._stream(content["name"], content["text"])
        elif kind in ("display_data", "execute_result", "update_display_data"):
            self._cleared()
            name = (content.get("transient") or {}).get("display_id")
            self._show(content["data"], name, kind == "update_display_data")
        elif kind == "error":
            self._cleared()
            self.failed = True
            self._line("\n".join(content["traceback"]))

    def observation(self, status: str, note: str) -> Observation:
        """All of it, and what became of the call."""
        text, images = Excerpt(self._most), []
        for part in self._parts:
            if isinstance(part, bytes):
                problem = self._check(part)
                images += [] if problem else [part]
                part = f"[an image cannot be shown: {problem}]\n" if problem else f"[image {len(images)}]\n"
            if not text.ends_line():
                text.add("\n")
            if isinstance(part, str):
                text.add(part)
            else:
                text.join(part.excerpt())
        shown = str(text).rstrip("\n")
        return Observation("\n".join(part for part in (shown, note) if part), tuple(images), status)

    def _clear(self):
        self._parts: list[Screen | bytes] = []  # text, and the bytes of images
        self._named: dict[str, list[int]] = {}  # name of a display -> its places
        self._stream_name, self._text = "", None

    def _cleared(self):
        if self._clear_next:
            self._clear()
            self._clear_next = False

    def _stream(self, name: str, text: str):
        """Another stream begins a line, as its own box in a notebook."""
        if self._text is None:
            self._text = Screen(self._most)
            self._parts.append(self._text)
        elif name != self._stream_name:
            self._text.begin_line()
        self._stream_name = name
        self._text.write(text)

    def _line(self, text: str):
        self._stream("", text if text.endswith("\n") else f"{text}\n")
        self._stream_name = "a line"

    def _show(self, data: Mapping, name: str | None, update: bool):
        places = self._named.get(name, []) if name else []
        shown = self._shown(data, places if update else [])
        if update and places:
            for place in places:
                self._parts[place] = shown if isinstance(shown, bytes) else self._screen(shown)
        elif isinstance(shown, bytes) or (name and len(self._parts) < MOST_PARTS):
            if name:
                self._named.setdefault(name, []).append(len(self._parts))
            self._parts.append(shown if isinstance(shown, bytes) else self._screen(shown))
            self._text = None
        elif shown:
            self._line(shown)

    def _screen(self, text: str) -> Screen:
        screen = Screen(self._most)
        screen.write(text if text.endswith("\n") else f"{text}\n")
        return screen

    def _shown(self, data: Mapping, replaced: list[int]) -> bytes | str:
        """What stands for it: an image, or text."""
        image = next((data[kind] for kind in IMAGES if kind in data), None)
        if image is not None:
            return self._image(image, replaced)
        plain = data.get("text/plain", "")
        other = next((data[kind] for kind in TEXTS if kind in data), None)
        if other is not None and (not plain or _BARE.fullmatch(plain)):
            return other if isinstance(other, str) else json.dumps(other, ensure_ascii=False)
        if plain or not data or "text/plain" in data:
            return plain
        return f"[an output that cannot be shown: {', '.join(map(str, data))[:200]}]"

    def _image(self, encoded: str, replaced: list[int]) -> bytes | str:
        """The image, or the text that stands for it."""
        kept = [part for i, part in enumerate(self._parts) if isinstance(part, bytes) and i not in replaced]
        if len(kept) >= self._most_images:
            return f"[an image is left out: {self._most_images} are the most]"
        try:
            image = base64.b64decode(encoded)
        except binascii.Error as problem:
            return f"[an image cannot be shown: {problem}]"
        if sum(map(len, kept)) + len(image) > MOST_IMAGE_BYTES:
            return f"[an image is left out: {MOST_IMAGE_BYTES // 2**20} MB are the most for all]"
        return image
