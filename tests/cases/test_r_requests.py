"""What a request costs is bounded before it is paid, and what comes from others costs a line of log."""

import dataclasses
import gzip
import json
import logging
import socket
import threading
import time

import pytest

from benchmarks.serving import CHAT, LIMITS, minute_model, serving
from k25_jax.sampling.prompt import MediaReader
from k25_jax.serving.bounds import BoundedReader, BoundedTokenizer, Exceeded
from k25_jax.serving.errors import ApiError
from k25_jax.serving.requests import chat_ask, completion_ask
from k25_jax.text import tokenizer as tokenizers
from k25_jax.text.tokenizer import load_tokenizer
from saying import SayingEngine

SERVED, TOKENIZER = minute_model(), load_tokenizer()
HI = {"model": "minute", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(60)
    return connection


def send(connection, body, length=None, *headers):
    head = "".join(f"{header}\r\n" for header in headers)
    connection.sendall(f"{HEAD}{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)


def status(connection) -> int:
    return int(connection.recv(4000).split()[1])


def ask(url, body=None) -> int:
    with connect(url) as connection:
        send(connection, json.dumps(body or HI).encode())
        return status(connection)


# -------------------------------------------------------------------------------------------------------------- bodies
def test_packed_bodies_are_refused_before_they_are_unpacked():
    packed = gzip.compress(b" " * 2**25)
    with serving(SayingEngine(), SERVED) as (server, url):
        held = [connect(url) for _ in range(60)]
        for connection in held:
            send(connection, packed[:-1], len(packed), "Content-Encoding: gzip")
        assert ask(url) == 200
        assert [status(connection) for connection in held] == [415] * 60
        for connection in held:
            connection.close()
        for encoding in ("deflate", "br", "GZIP", "gzip, identity", "zstd"):
            with connect(url) as connection:
                send(connection, b"{}", None, f"Content-Encoding: {encoding}")
                assert status(connection) == 415
        with connect(url) as connection:
            send(connection, json.dumps(HI).encode(), None, "Content-Encoding: identity")
            assert status(connection) == 200


def test_large_bodies_that_do_not_come_hold_up_no_small_one():
    config = dataclasses.replace(LIMITS, held_bytes=2 * LIMITS.body_bytes)
    with serving(SayingEngine(), SERVED, config) as (_, url):
        held = [connect(url) for _ in range(2)]
        for connection in held:
            send(connection, b"{", LIMITS.body_bytes)
        until(lambda: ask(url, HI | {"user": "x" * 2**17}) == 429)
        assert ask(url) == 200
        for connection in held:
            connection.close()
        until(lambda: ask(url, HI | {"user": "x" * 2**17}) == 200)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("escaped", [False, True])
def test_requests_with_costly_media_hold_up_none_without(monkeypatch, escaped):
    """All threads that read media are busy: what has none is answered, what has some waits its turn."""
    go, busy = threading.Event(), threading.Semaphore(0)

    def load(self, part):
        busy.release()
        assert go.wait(60)
        return []

    monkeypatch.setattr(MediaReader, "load", load)
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    body = json.dumps(HI | {"messages": [{"role": "user", "content": [image]}]})
    if escaped:
        body = body.replace("image_url", "image\\u005furl")
    with serving(SayingEngine(), SERVED) as (_, url):
        held = [connect(url) for _ in range(LIMITS.readers + 2)]
        for connection in held:
            send(connection, body.encode())
        for _ in range(LIMITS.readers):
            assert busy.acquire(timeout=60)
        assert [ask(url) for _ in range(5)] == [200] * 5 and not busy.acquire(blocking=False)
        go.set()
        assert [status(connection) for connection in held] == [200] * len(held)
        for connection in held:
            connection.close()


# -------------------------------------------------------------------------------------------------------- long prompts
@pytest.fixture
def encoded(monkeypatch):
    """How many characters each call of the tokenizer was given."""
    lengths, real = [], tokenizers.Tokenizer.encode
    monkeypatch.setattr(
        tokenizers.Tokenizer, "encode", lambda self, text, *more: lengths.append(len(text)) or real(self, text, *more)
    )
    return lengths


WORDS = "word " * 600_000
LONG = {
    "a text": [{"role": "user", "content": WORDS}],
    "a part": [{"role": "user", "content": [{"type": "text", "text": WORDS}]}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": WORDS[:400]}] * 10_000}],
    "messages": [{"role": "user", "content": WORDS[:400]}] * 100,
    "empty messages": [{"role": "user", "content": ""}] * 100_000,
    "arguments": [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": WORDS}}]},
    ],
    "a result": [{"role": "tool", "tool_call_id": "a", "content": WORDS}],
    "thoughts": [{"role": "assistant", "reasoning_content": WORDS}],
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_what_is_far_too_long_is_refused_at_its_first_piece(name, encoded):
    body = {
        "model": "minute",
        "messages": LONG[name],
        "chat_template_kwargs": {"thinking": True, "keep_thinking": True},
    }
    with pytest.raises(ApiError, match=f"context of {SERVED.max_length}") as found:
        chat_ask(json.dumps(body).encode(), SERVED)
    assert found.value.code == "context_length_exceeded" and found.value.param == "messages"
    assert "shorten the prompt" in str(found.value)
    assert sum(encoded) <= tokenizers.MAX_CHARS + 1000


@pytest.mark.parametrize("many", [False, True])
def test_a_long_declaration_is_refused_too(encoded, many):
    tools = [{"type": "function", "function": {"name": "f", "description": "" if many else WORDS}}] * (
        200 if many else 1
    )
    with pytest.raises(ApiError, match=f"context of {SERVED.max_length}"):
        chat_ask(json.dumps(HI | {"tools": tools}).encode(), SERVED)
    assert sum(encoded) <= tokenizers.MAX_CHARS + 1000


@pytest.mark.parametrize("prompt", [WORDS, "<|im_end|>" * 10**6, [65] * 10**6, ["a", WORDS], [[1], [1] * 10**6]])
def test_a_long_prompt_of_a_completion_is_refused(prompt, encoded):
    with pytest.raises(ApiError, match=f"context of {SERVED.max_length}") as found:
        completion_ask(json.dumps({"model": "minute", "prompt": prompt}).encode(), SERVED)
    assert found.value.code == "context_length_exceeded"
    assert found.value.param == ("prompt" if isinstance(prompt, str) or prompt[0] == 65 else "prompt[1]")
    assert sum(encoded) <= tokenizers.MAX_CHARS + 1


def test_what_fits_is_read_as_ever(monkeypatch):
    """In any pieces, with special tokens and without, up to the last token."""
    text = "a <|im_end|>b\n\n" + "é" * 40 + "<think>x" + " " * 60_000
    for allowed in (False, True, ("<think>",)):
        due = TOKENIZER.encode(text, allowed)
        assert BoundedTokenizer(TOKENIZER, len(due)).encode(text, allowed) == due
        with pytest.raises(Exceeded):
            BoundedTokenizer(TOKENIZER, len(due) - 1).encode(text, allowed)
    several = BoundedTokenizer(TOKENIZER, 10)
    assert several.encode("12345") + several.encode("12345") == TOKENIZER.encode("1234512345")
    with pytest.raises(Exceeded):
        several.encode("1")


# --------------------------------------------------------------------------------------------------------------- media
class Reader:
    """Each image has `tokens`, and takes no time."""

    config = SERVED.reader.config

    def __init__(self, tokens):
        self.tokens, self.read = tokens, 0

    def load(self, part):
        self.read += 1
        return [(None, type("Clip", (), {"tokens": self.tokens}))]


def test_media_are_read_up_to_the_context_and_up_to_a_deadline():
    reader = Reader(4)
    bounded = BoundedReader(reader, 10, 60)
    bounded.load({}), bounded.load({})
    with pytest.raises(Exceeded, match="context of 10"):
        bounded.load({})
    late = BoundedReader(reader, 10, -1)
    with pytest.raises(ValueError, match="send fewer or smaller"):
        late.load({})
    assert reader.read == 3
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    body = json.dumps(HI | {"messages": [{"role": "user", "content": [image]}]}).encode()
    with pytest.raises(ApiError, match="took longer than the -1 seconds"):
        chat_ask(body, dataclasses.replace(SERVED, media_seconds=-1))


# ----------------------------------------------------------------------------------------------------------------- log
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = HEAD.encode()
NOT_HTTP = {
    "garbage": b"\x00\x01\x02\xff\xfe\r\n\r\n",
    "the hello of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "words": b"hello there\r\n\r\n",
    "another version": b"GET / HTTP/9.x\r\n\r\n",
    "a path with NUL": b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with a space": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long header": GET + b"X: " + b"a" * 20000 + b"\r\n\r\n",
    "a long line": b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": GET + b"".join(b"X%d: a\r\n" % number for number in range(4000)) + b"\r\n",
    "a header without a colon": GET + b"X y\r\n\r\n",
    "NUL in a header": GET + b"X: a\x00b\r\n\r\n",
    "a bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
    "a long chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdefgh\r\n0\r\n\r\n",
    "a length of letters": POST + b"Content-Length: abc\r\n\r\n{}",
    "a length below 0": POST + b"Content-Length: -1\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "two ways to end": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "a host that is none": b"GET http://[::1/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "garbage behind a request": GET + b"\r\n\x00garbage\r\n\r\n",
}  # fmt: skip
LATER = {
    "a bad chunk": (b"Transfer-Encoding: chunked\r\n\r\n", b"ZZ\r\nabc\r\n0\r\n\r\n"),
    "a chunk cut off": (b"Transfer-Encoding: chunked\r\n\r\n5\r\na", None),
    "a body cut off": (b"Content-Length: 50\r\n\r\n{", None),
}


@pytest.fixture(scope="module")
def quiet():
    with serving(SayingEngine(), SERVED, dataclasses.replace(LIMITS, body_seconds=1.0)) as (_, url):
        yield url


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_no_http_gets_one_line_of_log(quiet, caplog, name):
    caplog.set_level(logging.DEBUG)
    with connect(quiet) as connection:
        connection.sendall(NOT_HTTP[name])
        got = b""
        while part := connection.recv(4000):
            got += part
    assert b" 400 " in got
    told = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert len(told) == 1 and told[0].getMessage().startswith("what came is no HTTP: ")
    assert len(told[0].getMessage()) < 300 and "\n" not in told[0].getMessage() and "\0" not in told[0].getMessage()
    assert not any(record.exc_info for record in caplog.records) and ask(quiet) == 200


@pytest.mark.parametrize("name", LATER)
def test_a_body_that_breaks_off_leaves_no_traceback(quiet, caplog, name):
    first, second = LATER[name]
    with connect(quiet) as connection:
        connection.sendall(POST + first)
        time.sleep(0.2)  # the handler waits for the body by now
        if second is None:
            connection.shutdown(socket.SHUT_WR)
        else:
            connection.sendall(second)
        while connection.recv(4000):
            pass
    time.sleep(0.1)
    assert "Traceback" not in caplog.text and sum(record.levelno > logging.DEBUG for record in caplog.records) <= 1
    assert ask(quiet) == 200
