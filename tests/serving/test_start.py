"""A server listens before it has a model: what it says, who waits, and how it ends meanwhile."""

import asyncio
import dataclasses
import json
import pathlib
import re
import signal
import time
import urllib.error
import urllib.request

import aiohttp
import pytest

import runs
from benchmarks.serving import CONFIG, LIMITS, minute_engine, minute_model, random_weights
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.serving.server import Server

BODY = {"model": "minute", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def loop():
    with AsyncEngine(minute_engine(random_weights(1))) as loop:
        yield loop


def asked(check, **limits) -> None:
    """Run check(server, get, post) with a server without an engine; `get` and `post` give (status, body)."""

    async def main():
        server = Server(None, None, dataclasses.replace(LIMITS, **limits))
        url = await server.start()
        async with aiohttp.ClientSession(url) as session:

            async def get(path: str):
                async with session.get(path) as response:
                    return response.status, await response.json(content_type=None)

            async def post():
                async with session.post("/v1/chat/completions", json=BODY) as response:
                    return response.status, await response.json()

            await check(server, get, post)
        await server.stop()

    asyncio.run(main())


def test_health_says_starting_and_what_for_then_ok(loop):
    async def check(server, get, post):
        server.say("loading the model")
        status, body = await get("/health")
        assert (status, body["status"], body["preparing"]) == (503, "starting", "loading the model")
        server.open(loop, minute_model())
        server.say("compiling more")
        assert await get("/health") == (200, {"status": "ok", "preparing": "compiling more"})
        server.say("")
        assert await get("/health") == (200, {"status": "ok"})

    asked(check)


def test_a_request_that_comes_early_waits_and_is_answered(loop):
    async def check(server, get, post):
        early = [asyncio.ensure_future(post()), asyncio.ensure_future(get("/v1/models"))]
        done, _ = await asyncio.wait(early, timeout=0.3)
        assert not done
        server.open(loop, minute_model())
        (status, answer), (_, models) = await asyncio.gather(*early)
        assert status == 200 and answer["usage"]["completion_tokens"] == 2
        assert models["data"][0]["id"] == "minute"

    asked(check)


def test_a_request_does_not_wait_for_ever(loop):
    async def check(server, get, post):
        server.say("loading the model")
        status, body = await post()
        assert status == 503 and body["error"]["code"] == "starting" and "loading the model" in body["error"]["message"]

    asked(check, start_seconds=0.1)


def test_who_waits_hears_that_the_server_stops(loop):
    async def check(server, get, post):
        early = asyncio.ensure_future(post())
        await asyncio.sleep(0.2)
        stopping = asyncio.ensure_future(server.stop())
        assert (await early)[1]["error"]["code"] == "shutting_down"
        await stopping

    asked(check)


def until_starting(process) -> str:
    """Wait until the command listens; its address."""
    for line in process.stderr:
        if found := re.search(r"listening at (http://[\d.:]+);", line):
            return found[1]
    raise AssertionError("the server never listened")


def health(url: str) -> dict:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_at_once_while_it_starts(number):
    process = runs.start("serve", "--port=0", "--slots=7", "--no_cache")
    try:
        url = until_starting(process)
        assert health(url)["status"] == "starting"
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in said and "serving" not in said
        assert time.monotonic() - began < 10  # compiling alone takes longer
    finally:
        process.kill()


def test_a_model_that_cannot_be_loaded_is_one_line_and_ends_the_server(tmp_path):
    save_params(random_weights(1), CONFIG, tmp_path / "minute", "float32")
    weights = next(pathlib.Path(tmp_path, "minute").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    result = runs.k25("serve", f"--checkpoint={tmp_path}/minute", "--port=0")
    assert result.returncode == 2 and "\nk25 serve: error: " in result.stderr and str(weights) in result.stderr
    assert "Traceback" not in result.stderr
