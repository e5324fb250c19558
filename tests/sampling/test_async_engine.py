"""The engine in its thread: many callers, slow ones and faulty ones, and what they hear when it stops."""

import asyncio
import threading
import time

import pytest

from engines import CONFIG, PARAMS, SETTINGS, prompts
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import Completion, EngineError, FinishEvent, Request
from k25_jax.sampling.sample import PromptError, SampleConfig

PROMPTS = prompts()


@pytest.fixture(scope="module")
def engine():
    engine = Engine(PARAMS, CONFIG, SETTINGS)
    engine.warm_up()
    return engine


def ask(p: int, tokens: int = 6, n: int = 1) -> Request:
    return Request(*PROMPTS[p], SampleConfig(tokens, 1.0, 0.9, p), n=n)


def put_together(stream, n: int = 1) -> list[Completion]:
    out = [Completion() for _ in range(n)]
    for event in stream:
        out[event.sample].add(event)
    return out


def test_callers_in_many_threads_get_their_own_answers(engine):
    expected = engine.generate([ask(p, n=2) for p in range(12)])
    found = [None] * 12
    with AsyncEngine(engine) as loop:

        def caller(p):
            found[p] = put_together(loop.submit(ask(p, n=2)), 2)

        threads = [threading.Thread(target=caller, args=(p,)) for p in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [[s.tokens for s in samples] for samples in found] == [[s.tokens for s in samples] for samples in expected]
    assert not engine.busy


def test_an_event_loop_gets_events_as_they_come(engine):
    (expected,), (other,) = engine.generate([ask(3), ask(6)])

    async def answer(loop, request):
        events, aio = asyncio.Queue(), asyncio.get_running_loop()
        deliver = lambda event: aio.call_soon_threadsafe(events.put_nowait, event)  # noqa: E731
        await asyncio.to_thread(loop.submit, request, deliver)
        completion = Completion()
        while not completion.reason:
            completion.add(await events.get())
        return completion

    async def both(loop):
        return await asyncio.gather(answer(loop, ask(3)), answer(loop, ask(6)))

    with AsyncEngine(engine) as loop:
        got = asyncio.run(both(loop))
    assert [one.tokens for one in got] == [expected.tokens, other.tokens]


def test_what_is_cancelled_before_the_engine_takes_it_is_not_done(engine):
    """The engine waits in a callback meanwhile; whoever asked before and after is answered."""
    ((expected,),) = engine.generate([ask(1)])
    held, go, drawn = threading.Event(), threading.Event(), engine.stats()["drawn"]
    with AsyncEngine(engine) as loop:
        loop.submit(ask(3), lambda event: held.set() or go.wait())
        held.wait()
        gone, kept = loop.submit_soon(ask(6)), loop.submit_soon(ask(1))
        assert gone.cancel()
        go.set()
        (found,) = put_together(kept.result())
        assert found.tokens == expected.tokens and not kept.cancel()
        assert loop.abort_soon(kept.result()).result() is False
    assert not engine.busy and engine.stats()["drawn"] == drawn + 2 * 6


def test_a_reader_who_does_not_read_loses_its_request_and_nobody_else_waits(engine):
    (expected,) = engine.generate([ask(1, 30)])
    with AsyncEngine(engine, room=4) as loop:
        slow, bad = loop.submit(ask(0, 30)), loop.submit(ask(2, 9), lambda event: 1 / 0)
        events = []
        loop.submit(ask(1, 30), events.append)
        deadline = time.monotonic() + 300
        while slow.unfinished or bad.unfinished or not events or not isinstance(events[-1], FinishEvent):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (lost,) = put_together(slow)
        assert lost.reason == "error" and "4 tokens unread" in lost.error and len(lost.tokens) == 4
        assert [event.token for event in events[:-1]] == expected[0].tokens
        stats = loop.stats()
    assert stats["pages_used"] == 0 and stats["running"] == stats["waiting"] == 0


def test_errors_reach_the_caller_and_only_the_caller(engine):
    with AsyncEngine(engine) as loop:
        going = loop.submit(ask(4, 20))
        with pytest.raises(PromptError, match="empty"):
            loop.submit(Request([]))
        with pytest.raises(EngineError, match="another model"):
            loop.update_weights(PARAMS | {"embed": PARAMS["embed"][:-1]}, 1)
        loop.update_weights(PARAMS, 3)
        gone = loop.submit(ask(5, 30))
        assert loop.abort(gone) and put_together(gone)[0].reason == "abort"
        (answer,) = put_together(going)
        assert answer.reason == "length" and set(answer.versions) <= {0, 3}
    with pytest.raises(EngineError, match="closed"):
        loop.submit(ask(1))
    loop.close()


def test_closing_ends_what_is_open(engine):
    loop = AsyncEngine(engine)
    stream = loop.submit(ask(3, 20, n=2))
    loop.close()
    assert {sample.reason for sample in put_together(stream, 2)} <= {"error", "length"}


def test_an_engine_that_breaks_tells_everybody(engine, monkeypatch, caplog):
    loop = AsyncEngine(engine)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    try:
        (answer,) = put_together(loop.submit(ask(3)))
        assert answer.reason == "error" and "ZeroDivisionError" in answer.error
    except EngineError as error:  # it broke before it took the request
        assert "ZeroDivisionError" in str(error)
    with pytest.raises(EngineError, match="the engine stopped: ZeroDivisionError"):
        loop.stats()
    loop.close()
    assert "the engine stopped" in caplog.text
