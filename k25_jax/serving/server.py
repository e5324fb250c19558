"""A server with OpenAI's API over the engine: chat, completions, models, health, metrics (K2.5 §4).

The event loop only moves bytes. Bodies are read, with their images and texts, in a few threads; calls of the engine, which
wait for the step under way, have threads of their own. Each request has a queue that the engine fills; who reads slowly
gets larger chunks, and who reads nothing is left.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from aiohttp import web

from k25_jax.sampling.async_engine import AsyncEngine, Stream
from k25_jax.sampling.requests import EngineError, Overloaded
from k25_jax.sampling.sample import PromptError
from k25_jax.serving.access import Access
from k25_jax.serving.connection_log import ConnectionLog
from k25_jax.serving.errors import ApiError, from_text, overloaded, show, starting, stopped, too_large, unavailable
from k25_jax.serving.event_queue import EventQueue
from k25_jax.serving.limits import ServerConfig, check_reach
from k25_jax.serving.metrics import Metrics
from k25_jax.serving.requests import Ask, Served, chat_ask, completion_ask
from k25_jax.serving.responses import Answer

logger = logging.getLogger(__name__)

KEEP_OPEN = 75.0  # seconds that an idle connection stays
OPEN_ROUTES = ("/health",)  # for these no key is needed
TOIL = (b"_url", b"\\u00")  # what names media in a body, also with its letters escaped


class Server:
    """Serves an engine until `stop`. Without `key`, only this machine may ask.

    It may start without an engine: then requests wait until `open` brings one.
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        served: Served | None,
        config: ServerConfig | None = None,
        key: str = "",
    ):
        self._engine, self._served, self._config = engine, served, config or ServerConfig()
        check_reach(self._config.host, key)
        self._access = Access(key)
        self._metrics, self._created = Metrics(), int(time.time())
        self._reading = ThreadPoolExecutor(self._config.readers, "k25-read")
        self._toiling = ThreadPoolExecutor(self._config.readers, "k25-toil")
        self._calling = ThreadPoolExecutor(self._config.callers, "k25-call")
        self._open, self._held, self._queues, self._noted = 0, 0, set(), set()
        self._stopping, self._idle, self._hurry, self._ending = False, *(asyncio.Event() for _ in range(3))
        self._idle.set()
        self._began, self._waits_for, self._opened = time.monotonic(), "", asyncio.Event()
        if engine is not None:
            self._opened.set()
        self._runner: web.AppRunner | None = None

    # -------------------------------------------------------------------------------------------------- start and stop
    async def start(self) -> str:
        """Listen; returns the address, such as http://127.0.0.1:8000."""
        app = web.Application(client_max_size=self._config.body_bytes, middlewares=[self._guard])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)  # a slash in a name need not be escaped
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEP_OPEN,
            shutdown_timeout=1.0,
            auto_decompress=False,
            logger=ConnectionLog(logger),
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, self._config.host, self._config.port).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def open(self, engine: AsyncEngine, served: Served) -> None:
        """The engine is there: answer, also the requests that waited for it."""
        self._engine, self._served = engine, served
        self._opened.set()

    def say(self, what: str) -> None:
        """What is being done for the start, for /health: "" when all is done."""
        self._waits_for = what

    async def stop(self) -> None:
        """Take no more requests, give those under way their time, end the rest, and close."""
        self._stopping = True
        self._ending.set()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._hurry)]
        await asyncio.wait(waits, timeout=self._config.grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for queue in self._queues:
            queue.fail(stopped())
        await self._runner.cleanup()
        await self._idle.wait()  # what was cancelled gives its place back
        for pool in (self._reading, self._toiling, self._calling):
            await asyncio.to_thread(pool.shutdown, cancel_futures=pool is not self._calling)

    def hurry(self) -> None:
        """Let `stop` wait no longer."""
        self._hurry.set()

    def update_weights(self, params, version: int) -> None:
        """`AsyncEngine.update_weights`: answers under way go on with the new weights. From any thread; waits for a step."""
        self._engine.update_weights(params, version)

    # ---------------------------------------------------------------------------------------------------------- routes
    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat_ask)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, completion_ask)

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [await self._describe()]})

    async def _model(self, http: web.Request) -> web.Response:
        if http.match_info["name"] != self._served.name:
            raise ApiError(f"there is no such model here, only {self._served.name!r}", "model", "model_not_found", 404)
        return web.json_response(await self._describe())

    async def _describe(self) -> dict:
        version = (await self._stats())["version"]
        described = {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "k25_jax"}
        return described | {"max_model_len": self._served.max_length, "policy_version": version}

    async def _health(self, http: web.Request) -> web.Response:
        """`starting` (status 503) until an engine is there, then `ok`; what is still being prepared stands beside it."""
        if self._stopping:
            raise stopped()
        more = {"preparing": self._waits_for} if self._waits_for else {}
        if not self._opened.is_set():
            more |= {"seconds": round(time.monotonic() - self._began, 1)}
            return web.json_response({"status": "starting"} | more, status=503, headers={"Retry-After": "1"})
        await self._stats()
        return web.json_response({"status": "ok"} | more)

    async def _show_metrics(self, http: web.Request) -> web.Response:
        text = self._metrics.text(await self._stats())
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _stats(self) -> dict[str, int]:
        """What the engine counts; an ApiError when it is not there any more."""
        await self._until_open()
        try:
            return await asyncio.wrap_future(self._calling.submit(self._engine.stats))
        except EngineError as problem:
            raise unavailable(problem) from None

    async def _until_open(self) -> None:
        """Wait for the engine of a server that is starting; an ApiError when that takes long, or it stops."""
        if self._opened.is_set():
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (self._opened, self._ending)]
        try:
            await asyncio.wait(waits, timeout=self._config.start_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._stopping:
            raise stopped()
        if not self._opened.is_set():
            raise starting(self._waits_for)

    # ------------------------------------------------------------------------------------------------------ who may ask
    @web.middleware
    async def _guard(self, http: web.Request, handler) -> web.StreamResponse:
        """Keys, errors in OpenAI's form, and counts, around every request."""
        began, status = time.monotonic(), 499
        resource = http.match_info.route.resource
        route = resource.canonical if resource else "other"
        try:
            response = await self._guarded(http, handler, route)
            status = response.status
            return response
        except asyncio.CancelledError:
            self._metrics.left.inc()
            raise
        finally:
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - began)

    async def _guarded(self, http: web.Request, handler, route: str) -> web.StreamResponse:
        try:
            if route not in OPEN_ROUTES:
                self._access.check(http.headers, http.host)
            return await handler(http)
        except ApiError as error:
            return _error_response(error)
        except web.HTTPException as error:
            if error.status == 413:
                return _error_response(too_large(self._config.body_bytes))
            reason = {404: f"there is nothing at {http.path}", 405: f"{http.method} is not for {http.path}"}
            return _error_response(ApiError(reason.get(error.status, error.reason), status=error.status))
        except ConnectionError:
            self._metrics.left.inc()
            return web.Response(status=499)  # nobody gets to see it
        except Exception:
            return _error_response(_failed(route))

    @contextlib.contextmanager
    def _place(self):
        """A place among those that are answered at once."""
        if self._stopping:
            raise stopped()
        if self._open >= self._config.concurrency:
            raise overloaded(f"{self._open} requests are being answered, the most there may be; try again later")
        self._open += 1
        self._metrics.open.set(self._open)
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)
            if not self._open:
                self._idle.set()

    # --------------------------------------------------------------------------------------------------------- answers
    async def _answer(self, http: web.Request, read: Callable[[bytes, Served], Ask]) -> web.StreamResponse:
        began = time.monotonic()
        with self._place():
            await self._until_open()
            ask = await self._read(http, read)
            self._note(ask)
            queue = EventQueue()
            streams = await self._submit(ask, queue)
            self._metrics.tokens.labels("prompt").inc(sum(len(request.tokens) for request in ask.requests))
            answer = Answer(ask, self._served)
            self._queues.add(queue)
            try:
                events = await queue.take()
                self._metrics.first.observe(time.monotonic() - began)
                return await (self._stream if ask.stream else self._whole)(http, answer, queue, events)
            finally:
                self._queues.discard(queue)
                self._metrics.tokens.labels("drawn").inc(answer.usage()["completion_tokens"])
                if not answer.finished:
                    self._calling.submit(self._abort, streams)

    async def _read(self, http: web.Request, read: Callable[[bytes, Served], Ask]) -> Ask:
        """The body, read in another thread; what is held of all large bodies at once is bounded.

        Those that take work, being large or with media, have threads of their own, so that the others wait for none of them.
        """
        size = http.content_length or self._config.body_bytes
        large = size > self._config.small_bytes
        if large and self._held and self._held + size > self._config.held_bytes:
            raise overloaded("too many large bodies are being read; try again later")
        self._held += size
        try:
            raw = await self._body(http)
            pool = self._toiling if large or any(sign in raw for sign in TOIL) else self._reading
            return await asyncio.wrap_future(pool.submit(read, raw, self._served))
        finally:
            self._held -= size

    def _note(self, ask: Ask) -> None:
        """Say in the log, once, what requests ask for and do not get; they are told each time."""
        for note in set(ask.notes) - self._noted:
            self._noted.add(note)
            logger.warning("%s (further ones are not logged)", note)

    async def _body(self, http: web.Request) -> bytes:
        if http.content_type != "application/json":
            raise ApiError("the header must say Content-Type: application/json", status=415)
        if (encoding := http.headers.get("Content-Encoding", "")).lower() not in ("", "identity"):
            problem = f"a body of Content-Encoding {show(encoding)} is not taken; send it as it is, without the header"
            raise ApiError(problem, status=415)
        if (http.content_length or 0) > self._config.body_bytes:
            raise too_large(self._config.body_bytes)
        try:
            async with asyncio.timeout(self._config.body_seconds):
                return await http.read()
        except TimeoutError:
            raise ApiError(f"the body did not arrive in {self._config.body_seconds:g} seconds", status=408) from None
        except web.RequestPayloadError as problem:
            raise ApiError(f"the body is broken: {problem}") from None

    async def _submit(self, ask: Ask, queue: EventQueue) -> list[Stream]:
        """Hand the requests to the engine; when the client leaves meanwhile, they are aborted."""
        future: Future = self._calling.submit(self._submit_all, ask, queue)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._abort_submitted)
            raise
        except Overloaded as problem:
            raise overloaded(str(problem)) from None
        except PromptError as problem:
            raise from_text(problem, "messages" if ask.chat else "prompt") from None
        except EngineError as problem:
            raise unavailable(problem) from None

    def _submit_all(self, ask: Ask, queue: EventQueue) -> list[Stream]:
        streams: list[Stream] = []
        try:
            for number, request in enumerate(ask.requests):
                streams.append(self._engine.submit(request, lambda event, number=number: queue.put(number, event)))
        except Exception:
            self._abort(streams)
            raise
        return streams

    def _abort_submitted(self, future: Future) -> None:
        if not future.cancelled() and not future.exception():
            self._calling.submit(self._abort, future.result())

    def _abort(self, streams: list[Stream]) -> None:
        with contextlib.suppress(EngineError):
            for stream in streams:
                self._engine.abort(stream)

    async def _whole(self, http: web.Request, answer: Answer, queue: EventQueue, events) -> web.StreamResponse:
        while True:
            for number, event in events:
                answer.add(number, event)
            if answer.finished:
                break
            events = await queue.take()
        data = json.dumps(answer.body()).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"} | _warnings(answer))
        response.content_length = len(data)
        await self._prepare(http, response)
        await self._send(http, response, data)
        await response.write_eof()
        return response

    async def _stream(self, http: web.Request, answer: Answer, queue: EventQueue, events) -> web.StreamResponse:
        """Server-sent events. What fails after the first is an event too, behind which there is no [DONE]."""
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers | _warnings(answer))
        await self._prepare(http, response)
        try:
            while True:
                for number, event in events:
                    answer.add(number, event)
                await self._send(http, response, b"".join(map(_event, answer.chunks())))
                if answer.finished:
                    break
                events = await queue.take()
            await self._send(http, response, b"data: [DONE]\n\n")
        except ConnectionError:
            raise
        except Exception as problem:
            error = problem if isinstance(problem, ApiError) else _failed(http.path)
            await self._send(http, response, _event(error.body()))
        await response.write_eof()
        return response

    async def _prepare(self, http: web.Request, response: web.StreamResponse) -> None:
        """Begin an answer, of which the system holds only so much for a client that does not read."""
        if http.transport is None:
            raise ConnectionResetError("the client has left")
        connection = http.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._config.unread_bytes)
        await response.prepare(http)

    async def _send(self, http: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Write, as fast as the client reads; one that does not read any more is cut off."""
        try:
            async with asyncio.timeout(self._config.stall_seconds):
                await response.write(data)
        except TimeoutError:
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError("the client reads nothing") from None


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _warnings(answer: Answer) -> dict[str, str]:
    """What the answer does not keep, as a header."""
    return {"Warning": ", ".join(f'299 k25 "{note}"' for note in answer.notes)} if answer.notes else {}


def _error_response(error: ApiError) -> web.Response:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    return web.json_response(error.body(), status=error.status, headers=headers)


def _failed(where: str) -> ApiError:
    """The error for the exception that is being handled, which is a mistake of ours."""
    logger.exception("%s failed", where)
    return ApiError("the server failed; its log says how", status=500)
