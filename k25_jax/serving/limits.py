"""Where a server listens, and its limits."""

import dataclasses
import os
import pathlib

from k25_jax.serving.access import is_loopback


class ServerError(ValueError):
    """A server that cannot be set up like this; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, and its limits."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    concurrency: int = 256  # requests that are answered at once; others get 429
    body_bytes: int = 2**25
    held_bytes: int = 2**28  # of all bodies that are being read
    body_seconds: float = 60.0  # in which a body must have arrived
    start_seconds: float = 60.0  # that a request waits for a server that is starting
    stall_seconds: float = 60.0  # a client that takes nothing for so long is left
    unread_bytes: int = 2**18  # of an answer that the system holds for a client
    grace_seconds: float = 30.0  # for requests under way when the server stops
    readers: int = 2  # threads that read small bodies without media, and as many for the others
    small_bytes: int = 2**16  # of a body that is small
    callers: int = 16  # threads that wait for the engine

    def __post_init__(self):
        seconds = ("body_seconds", "start_seconds", "stall_seconds")
        sizes = ("body_bytes", "held_bytes", "small_bytes", "unread_bytes")
        for name in (*sizes, *seconds, "concurrency", "readers", "callers"):
            if getattr(self, name) <= 0:
                raise ServerError(f"{name}={getattr(self, name)} must be positive")


def check_reach(host: str, key: str) -> None:
    """Raise ServerError for a server without a key that other machines can reach."""
    if not key and not is_loopback(host):
        raise ServerError(f"host={host} can be reached from other machines: that needs an API key")


def read_key(variable: str, file: str) -> str:
    """The API key from an environment variable or a file; "" when neither is named. Raises ServerError."""
    if variable and file:
        raise ServerError("--api_key_env and --api_key_file are two places for one key: give one")
    if not variable and not file:
        return ""
    key = os.environ.get(variable, "").strip() if variable else pathlib.Path(file).read_text().strip()
    if not key:
        raise ServerError(f"{'$' + variable if variable else file} holds no API key: put one there")
    return key
