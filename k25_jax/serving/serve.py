"""`k25 serve`: a model, its engine and its server, from the flags to a clean end."""

import asyncio
import json
import pathlib
import signal
import sys

import jax.numpy as jnp

from k25_jax.checkpoint.load import Model, load_model
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader, default_mode
from k25_jax.sampling.requests import EngineConfig
from k25_jax.serving.limits import ServerConfig, ServerError, check_reach, read_key
from k25_jax.serving.requests import Served
from k25_jax.serving.server import Server

TOP_LOGPROBS = 20


def serve(args) -> int:
    """Serve until SIGTERM or Ctrl-C; a second one ends what is still being answered."""
    key = read_key(args.api_key_env, args.api_key_file)
    check_reach(args.host, key)
    sizes = engine_config(args)
    config = ServerConfig(args.host, args.port, args.concurrency, grace_seconds=args.grace_seconds)
    root = _media_root(args.media_root)
    model = load_model(args.checkpoint, jnp.dtype(args.dtype))
    engine = Engine(model.params, model.config, sizes, model.tokenizer)
    served = _served(args, model, engine, root)
    print(f"compiling for {args.slots} answers at once ..", file=sys.stderr, flush=True)
    engine.warm_up()
    with AsyncEngine(engine) as loop:
        asyncio.run(_serve(loop, served, config, key, args.api_key_env))
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
        model.config, args.max_image_patches, args.max_frame_patches, args.fps, max_pixels=args.max_pixels
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


async def _serve(loop: AsyncEngine, served: Served, config: ServerConfig, key: str, variable: str) -> None:
    server, stop = Server(loop, served, config, key), asyncio.Event()

    def on_signal():
        if stop.is_set():
            server.hurry()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    url = await server.start()
    print(f"serving {served.name} at {url}/v1\n{_example(url, served.name, key, variable)}", flush=True)
    await stop.wait()
    print("stopping: requests under way are finished first (again to end at once)", file=sys.stderr, flush=True)
    await server.stop()


def _example(url: str, name: str, key: str, variable: str) -> str:
    """A command to try the server with; the key is not in it."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64})
    header = f' -H "Authorization: Bearer ${variable or "API_KEY"}"' if key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
