"""What a tool gives back to the model, and what is not the model's doing (K2.5 §4.4)."""

from dataclasses import dataclass

STATUSES = ("ok", "error", "deadline", "died")


class InfrastructureError(RuntimeError):
    """The machinery failed, not the model: whoever runs the episode tries again, and leaves it out of what is scored."""


@dataclass(frozen=True)
class Observation:
    """Text and encoded images for the model. `status`: ok, or how what it asked for failed (one of STATUSES)."""

    text: str
    images: tuple[bytes, ...] = ()
    status: str = "ok"

    def content(self) -> list[dict]:
        """The parts of a message."""
        return [{"type": "text", "text": self.text}, *({"type": "image", "image": image} for image in self.images)]


class Excerpt:
    """The beginning and the end of a text of any length, and how much is left out between them."""

    def __init__(self, most: int):
        self._head, self._tail, self._length = "", "", 0
        self._room = (most - most // 2, most // 2)

    def add(self, text: str):
        """More of the text."""
        self._length += len(text)
        more = self._room[0] - len(self._head)
        self._head += text[:more]
        if rest := text[more:]:
            self._tail = (self._tail + rest)[-self._room[1] :] if self._room[1] else ""

    def join(self, other: "Excerpt"):
        """More of the text, itself an excerpt of the same size."""
        self.add(other._head)
        self._length += other._left_out()  # there is none unless the head is full
        self.add(other._tail)

    def ends_line(self) -> bool:
        """Whether what comes next begins a line."""
        return not self._length or (self._tail or self._head).endswith("\n")

    def _left_out(self) -> int:
        return self._length - len(self._head) - len(self._tail)

    def __str__(self) -> str:
        if not self._left_out():
            return self._head + self._tail
        return f"{self._head}\n[.. {self._left_out()} characters left out ..]\n{self._tail}"
