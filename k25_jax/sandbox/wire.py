"""What comes from a kernel and goes to it: ZeroMQ's wire protocol (ZMTP 3.0) and Jupyter's messages, under a budget.

A ZeroMQ socket takes in whatever the other side sends, in a thread of its own: a message in endless parts, or what is
sent while nobody listens. Here nothing is read but what is asked for, one message at a time; what is not read stays in
the memory of the sandbox, which is limited. Of a message that is too large to be read only its size is known.
"""

import datetime
import json
import re
import select
import socket
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass

MOST_BYTES = 64 * 2**20  # of one message; more ends the kernel
MOST_KEPT = 12 * 2**20  # of one message that is read: from here on it is skipped
MOST_UNICODE = 4 * 2**20  # the same, where Python takes four bytes for each
MOST_NAMES = 2**16  # bytes of a header
MOST_PARTS = 64
MOST_TOKENS = 200_000  # in a message: strings, and signs between them; parsed, each takes up to 100 bytes
_MORE, _LONG, _COMMAND = 1, 2, 4
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_DELIMITER = b"<IDS|MSG>"
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,:]', re.DOTALL)
_CHUNK = 2**18


class Closed(Exception):
    """The other side has ended the connection."""


class TooLarge(Exception):
    """A message of more than MOST_BYTES."""


@dataclass(frozen=True)
class Message:
    """One message. `content` is None if it was too large to be read; `size` counts the bytes of it all."""

    kind: str
    parent: str
    content: dict | None
    size: int


class Connection:
    """One socket of a kernel, by its path. Nothing is read in the background."""

    def __init__(self, path: str, kind: bytes, seconds: float):
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(seconds)
            self._socket.connect(path)
            self._socket.sendall(_GREETING + _frame(_COMMAND, b"\x05READY\x0bSocket-Type" + _sized(kind)))
            self._exactly(len(_GREETING))
            self._exactly(self._exactly(2)[1])  # it is READY, too: what came before that would be refused
            if kind == b"SUB":
                self._socket.sendall(_frame(0, b"\x01"))  # to everything
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._ahead, self._messages = memoryview(b""), self._incoming()

    def close(self):
        """End the connection."""
        self._socket.close()

    def wait(self, seconds: float) -> bool:
        """Whether there is something to read, within this time."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(self._ahead) or bool(waiting.poll(max(0.0, 1000 * seconds)))

    def send(self, kind: str, content: dict, until: float, buffers: Sequence[bytes] = ()) -> str:
        """Send a request; its id, which nobody else knows before."""
        name = uuid.uuid4().hex
        now = datetime.datetime.now(datetime.UTC).isoformat()
        header = {"msg_id": name, "msg_type": kind, "session": "k25", "username": "k25", "date": now, "version": "5.3"}
        parts = [_DELIMITER, b"", *(json.dumps(part).encode() for part in (header, {}, {}, content)), *buffers]
        for i, part in enumerate(parts):
            data = memoryview(_frame(0 if i + 1 == len(parts) else _MORE, part))
            while data:
                try:
                    data = data[self._socket.send(data) :]
                except BlockingIOError:
                    waiting = select.poll()
                    waiting.register(self._socket, select.POLLOUT)
                    if not waiting.poll(max(0.0, 1000 * (until - time.monotonic()))):
                        raise TimeoutError("did not take what was sent to it") from None
                except OSError as problem:
                    raise Closed from problem
        return name

    def receive(self, parent: str | None = None) -> Message | None:
        """The next message; None while it is not whole, or if it does not answer `parent`. Reads a chunk at most."""
        parts = next(self._messages)
        if parts is None:
            self._read()
            parts = next(self._messages)
        return None if parts is None else _parse(*parts, parent)

    def skip(self):
        """Drop up to a chunk of what was sent."""
        try:
            if not self._socket.recv(_CHUNK):
                raise Closed
        except BlockingIOError:
            pass

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (piece := self._socket.recv(size - len(data))):
                raise Closed
            data += piece
        return data

    def _read(self):
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as problem:
            raise Closed from problem
        if not data:
            raise Closed
        self._ahead = memoryview(data)

    def _incoming(self) -> Generator[tuple[list[bytes | None], int] | None, None, None]:
        """The parts and the size of each message; None when more has to be read first."""
        while True:
            parts, size, flags = [], 0, _MORE
            while flags & _MORE:
                flags = (yield from self._take(1))[0]
                length = int.from_bytes((yield from self._take(8 if flags & _LONG else 1)), "big")
                size += length
                if size > MOST_BYTES or len(parts) >= MOST_PARTS:
                    raise TooLarge
                part = yield from self._take(length, size <= MOST_KEPT)
                if flags & _COMMAND:
                    flags, size = _MORE, size - length  # of the connection itself; nothing to do
                else:
                    parts.append(part)
            yield parts, size

    def _take(self, size: int, keep: bool = True) -> Generator[None, None, bytes | None]:
        """The next bytes; None if they are not kept."""
        taken = bytearray()
        while size:
            while not self._ahead:
                yield
            piece, self._ahead = self._ahead[:size], self._ahead[size:]
            size -= len(piece)
            if keep:
                taken += piece
        return taken if keep else None


def _frame(flags: int, data: bytes) -> bytes:
    length = bytes([len(data)]) if len(data) < 256 else len(data).to_bytes(8, "big")
    return bytes([flags | (_LONG if len(data) >= 256 else 0)]) + length + data


def _sized(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _parse(parts: list[bytes | None], size: int, parent: str | None) -> Message | None:
    """Raises an exception of any kind if it is not a message as it should be."""
    parts = parts[parts.index(_DELIMITER) + 2 :]
    if any(part is None or len(part) > MOST_NAMES for part in parts[:2]):
        raise TooLarge
    header, asked = (json.loads(bytes(part)) for part in parts[:2])
    answered = asked.get("msg_id", "")
    if parent is not None and answered != parent:
        return None
    content = parts[3]
    parts.clear()
    return Message(str(header["msg_type"]), answered, _content(content), size)


def _content(data: bytearray | None) -> dict | None:
    if data is None or (len(data) > MOST_UNICODE and not data.isascii()):
        return None
    for count, _ in enumerate(_TOKEN.finditer(data)):
        if count > MOST_TOKENS:
            return None
    text = data.decode("utf-8", "surrogatepass")
    data.clear()
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("the content of a message must be an object")
    return content
