"""`k25 serve`: a model, its engine and its server, from the flags to a clean end.

The server listens at once. A thread loads the model and compiles what a first request needs; then the server answers, while
that thread compiles the rest.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable

import jax.numpy as jnp

from k25_jax.checkpoint.load import Model, load_model
from k25_jax.runtime.waiting import waiting
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader, default_mode
from k25_jax.sampling.requests import EngineConfig
from k25_jax.serving.limits import ServerConfig, ServerError, check_reach, read_key
from k25_jax.serving.requests import Served
from k25_jax.serving.server import Server

TOP_LOGPROBS = 20
VIDEO_SECONDS = 60.0  # that decoding one video may take; others wait for its reader


def serve(args) -> int:
    """Serve until SIGTERM or Ctrl-C; a second one ends what is still being answered."""
    key = read_key(args.api_key_env, args.api_key_file)
    check_reach(args.host, key)
    sizes, root = engine_config(args), _media_root(args.media_root)
    config = ServerConfig(args.host, args.port, args.concurrency, grace_seconds=args.grace_seconds)
    if asyncio.run(_serve(args, sizes, root, config, key)):
        sys.stdout.flush()
        os._exit(0)  # the compiler cannot be interrupted, and there is nothing to lose
    return 0


def engine_config(args) -> EngineConfig:
    """The sizes that the flags ask for; raises ServerError. Whole groups can double the patches of a long image."""
    patches = -(-max(args.max_image_patches, 4 * args.max_frame_patches, 4) // 4) * 4
    try:
        return EngineConfig(
            rows=tuple(sorted({1, min(8, args.slots), args.slots})),
            pages=args.pages,
            max_length=args.max_length or None,
            queue=max(256, args.concurrency),
            vision_patches=tuple(sorted({max(4, patches // 16 * 4), patches, 2 * patches + 8})),
            alternatives=TOP_LOGPROBS,
            dtype=args.dtype,
        )
    except ValueError as problem:
        raise ServerError(str(problem)) from None


def _served(args, model: Model, engine: Engine, root: pathlib.Path | None) -> Served:
    reader = MediaReader(
        model.config,
        args.max_image_patches,
        args.max_frame_patches,
        args.fps,
        max_pixels=args.max_pixels,
        video_seconds=VIDEO_SECONDS,
    )
    return Served(
        args.model_name or pathlib.Path(args.checkpoint).resolve().name,
        model.tokenizer,
        reader,
        engine.max_length,
        args.mode or default_mode(model),
        args.max_tokens or None,
        TOP_LOGPROBS,
        media_root=root,
    )


def _media_root(folder: str) -> pathlib.Path | None:
    if not folder:
        return None
    root = pathlib.Path(folder).resolve()
    if not root.is_dir():
        raise ServerError(f"--media_root={folder} is no folder: name the one with the images")
    return root


async def _serve(args, sizes: EngineConfig, root: pathlib.Path | None, config: ServerConfig, key: str) -> bool:
    """Listen, prepare, answer, and stop; whether the thread that prepares is still at work."""
    server, stop, aio = Server(None, None, config, key), asyncio.Event(), asyncio.get_running_loop()
    engines: list[AsyncEngine] = []
    prepared = aio.create_future()

    def on_signal():
        if stop.is_set():
            server.hurry()
        stop.set()

    def ready(engine: AsyncEngine, served: Served):
        engines.append(engine)
        server.open(engine, served)
        print(f"serving {served.name} at {url}/v1\n{_example(url, served.name, key, args.api_key_env)}", flush=True)

    def prepare():
        try:
            _prepare(args, sizes, root, functools.partial(tell, server.say), functools.partial(tell, ready))
        except BaseException as problem:
            tell(prepared.set_exception, problem)

    def tell(function, *arguments):
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            aio.call_soon_threadsafe(function, *arguments)

    for number in (signal.SIGTERM, signal.SIGINT):
        aio.add_signal_handler(number, on_signal)
    url = await server.start()
    print(f"listening at {url}; until it answers, {url}/health says what it waits for", file=sys.stderr, flush=True)
    thread = threading.Thread(target=prepare, name="k25-prepare", daemon=True)
    thread.start()
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({stopped, prepared}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        print("stopping: requests under way are finished first (again to end at once)", file=sys.stderr, flush=True)
    stopped.cancel()
    await server.stop()
    for engine in engines:
        await asyncio.to_thread(engine.close)
    if prepared.done():
        prepared.result()
    prepared.cancel()
    return thread.is_alive()


def _prepare(args, sizes: EngineConfig, root: pathlib.Path | None, say: Callable, ready: Callable) -> None:
    """Load the model and compile its programs; `ready` once there are those for a first request, `say` what comes next."""
    say("loading the model")
    with waiting(f"loading {args.checkpoint}"):
        model = load_model(args.checkpoint, jnp.dtype(args.dtype))
    engine = Engine(model.params, model.config, sizes, model.tokenizer)
    served, told = _served(args, model, engine, root), False
    needed = len(sizes.pieces) + 1  # a text's pieces, and its answer's tokens
    for number, title in enumerate(itertools.chain(engine.compiling(), [""])):
        if not told and (number == needed or not title):
            ready(AsyncEngine(engine), served)
            told = True
        say(title and f"compiling {title}")


def _example(url: str, name: str, key: str, variable: str) -> str:
    """A command to try the server with; the key is not in it."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64})
    header = f' -H "Authorization: Bearer ${variable or "API_KEY"}"' if key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
