"""Messages of a kernel over ZeroMQ's protocol, against pyzmq itself; and what is not read."""

import json
import resource
import time

import pytest
import zmq

from k25_jax.sandbox import wire
from k25_jax.sandbox.wire import Closed, Connection, TooLarge


@pytest.fixture
def pair(tmp_path_factory):
    """A publisher of pyzmq, and a connection to it."""
    path = str(tmp_path_factory.mktemp("s") / "s")
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind(f"ipc://{path}")
    connection = Connection(path, b"SUB", 10.0)
    assert publisher.recv() == b"\x01"  # the subscription
    yield publisher, connection
    connection.close()
    context.destroy(linger=0)


def message(content: bytes, parent="asked", kind="stream"):
    header = {"msg_id": "1", "msg_type": kind}
    return [
        b"topic",
        b"<IDS|MSG>",
        b"",
        *(json.dumps(part).encode() for part in (header, {"msg_id": parent}, {})),
        content,
    ]


def receive(connection, parent=None, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if connection.wait(0.1) and (found := connection.receive(parent)) is not None:
            return found
    return None


@pytest.mark.parametrize("size", [0, 1, 200, 255, 256, 65_535, 2**18, 3 * 2**20])
def test_messages_of_all_sizes(pair, size):
    publisher, connection = pair
    for i in range(3):
        publisher.send_multipart(message(json.dumps({"text": "x" * size, "i": i}).encode()))
        found = receive(connection, "asked")
        assert found.kind == "stream" and found.content == {"text": "x" * size, "i": i} and found.size > size


def test_many_messages_in_one_read_and_other_parents(pair):
    publisher, connection = pair
    for i in range(1000):
        publisher.send_multipart(message(b'{"i": %d}' % i, "asked" if i % 10 == 0 else "other"))
    assert [receive(connection, "asked").content["i"] for _ in range(100)] == list(range(0, 1000, 10))


def test_requests_and_replies(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("s") / "s")
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{path}")
    connection = Connection(path, b"DEALER", 10.0)
    asked = connection.send("execute_request", {"code": "é" * 1000}, time.monotonic() + 10, [bytes(2**20)])
    identity, *parts = router.recv_multipart()
    assert parts[:2] == [b"<IDS|MSG>", b""] and json.loads(parts[2])["msg_id"] == asked and parts[6] == bytes(2**20)
    router.send_multipart([identity, *message(b"{}", asked)])
    assert receive(connection, asked).parent == asked
    router.close()
    with pytest.raises(Closed):
        receive(connection)
    connection.close()
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "content",
    [
        b'"' + b"x" * (13 * 2**20) + b'"',
        b'{"a": "' + "é".encode() * (3 * 2**20) + b'"}',
        b'{"a": [' + b"{}," * 500_000 + b"0]}",
        b'{"a": [' + b'"",' * 500_000 + b"0]}",
        b'{"a": "' + b'\\"' * 5 + b'", "b": [' + b"1," * 500_000 + b"0]}",
    ],
)
def test_what_is_too_large_is_known_by_its_size(pair, content):
    publisher, connection = pair
    publisher.send_multipart(message(content))
    publisher.send_multipart(message(b"{}"))
    found = receive(connection, "asked")
    assert found.content is None and found.size > len(content) and receive(connection, "asked").content == {}


def test_text_with_many_signs_is_read(pair):
    publisher, connection = pair
    text = '[1, {"a": "b\\\\"}, ' * 400_000
    publisher.send_multipart(message(json.dumps({"text": text}).encode()))
    assert receive(connection, "asked").content == {"text": text}


@pytest.mark.parametrize(
    "parts",
    [
        [b"x"] * 200,
        message(b"{}") + [bytes(2**20)] * 80,
        [b"x" * 2**25] * 3,
        [b"<IDS|MSG>", b"", b'{"a": "' + b"x" * 2**17 + b'"}', b"{}", b"{}", b"{}"],
    ],
)
def test_too_many_parts_or_bytes_end_it(pair, parts):
    publisher, connection = pair
    publisher.send_multipart(parts)
    with pytest.raises(TooLarge):
        receive(connection)


@pytest.mark.parametrize(
    "parts",
    [
        [b"x"],
        message(b"[]"),
        message(b"{"),
        message(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        message(b"\xff"),
        message(b'{"'),
    ],
)
def test_what_is_no_message_is_an_exception(pair, parts):
    publisher, connection = pair
    publisher.send_multipart(parts)
    with pytest.raises((ValueError, RecursionError, UnicodeDecodeError)):
        receive(connection)


def test_strings_without_an_end_take_no_time(pair):
    publisher, connection = pair
    publisher.send_multipart(message(b'{"a": ' + b'"\\' * (2 * 2**20)))
    began = time.process_time()
    with pytest.raises(ValueError):
        receive(connection)
    assert time.process_time() - began < 10.0  # it is linear: a fraction of a second


def test_what_is_not_asked_for_is_not_read(pair):
    """Where pyzmq would take in a thousand messages, this process takes none."""
    publisher, connection = pair
    publisher.setsockopt(zmq.SNDTIMEO, 100)
    publisher.setsockopt(zmq.XPUB_NODROP, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    data = bytes(2**16)
    with pytest.raises(zmq.Again):
        while True:
            publisher.send_multipart(message(data), copy=True)
            sent += 1
    assert sent >= 1000 and connection.wait(0)  # they wait on the publisher's side, which is this process here
    assert len(connection._ahead) == 0 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert wire.MOST_KEPT < wire.MOST_BYTES
