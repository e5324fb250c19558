"""A storm of requests on the real server, over loopback: none lost, none mixed up, nothing left behind (K2.5 §4).

A minute model with random weights. Rounds of requests, drawn by a seed, over so many sockets at once: whole answers and
streams, greedy and sampled; clients that leave, that read slowly, that read nothing; malformed bodies. In the middle of each
round the weights change. Every answer must be, token by token, what the engine gives that request alone under the version
of the weights that the answer carries; one that was open meanwhile must be so as far as the old weights drew it. At the end
no request, page or thread is left; memory and Python objects after the last round are held against those after the second.
The figure is the number of requests whose outcome was not the due one; the bound is 0. With --json one JSON line.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import math
import pathlib
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np

from k25_jax.config import K25Config, MoEConfig, TextConfig, VisionConfig
from k25_jax.models.k25 import abstract_params
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader
from k25_jax.sampling.requests import Completion, EngineConfig
from k25_jax.serving.limits import ServerConfig
from k25_jax.serving.requests import Served, chat_ask, completion_ask
from k25_jax.serving.server import Server
from k25_jax.text.tokenizer import load_tokenizer

TEXT = TextConfig(
    vocab_size=288, d_model=24, layers=2, ffn_dim=32, heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_dim=8,
    qk_rope_dim=4, v_dim=8, max_length=384, moe=MoEConfig(experts=4, top_k=2, ffn_dim=16),
)  # fmt: skip
VISION = VisionConfig(layers=1, width=16, heads=2, mlp_dim=16, pos_height=4, pos_width=4)
IDS = {"media_begin_id": 261, "media_end_id": 263, "media_pad_id": 264, "bos_id": 256, "eos_ids": (258,), "pad_id": 276}
CONFIG = K25Config(text=TEXT, vision=VISION, **IDS)
SETTINGS = EngineConfig(
    rows=(16,), pieces=(4,), piece=16, pages=320, page_size=8, queue=4096, vision_patches=(64,), vision_tokens=32,
    alternatives=20,
)  # fmt: skip
PATCHES = 24  # of an image, before whole groups are filled up
LIMITS = ServerConfig(
    port=0, concurrency=2048, stall_seconds=1.0, unread_bytes=4096, grace_seconds=5.0, body_bytes=2**18
)
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
KINDS = {
    "whole": 0.4,
    "stream": 0.2,
    "slow": 0.06,
    "leaves": 0.12,
    "leaves at once": 0.06,
    "stalls": 0.04,
    "malformed": 0.12,
}
MALFORMED = [
    (CHAT, b"{", 400), (CHAT, b"[1, 2]", 400), (CHAT, b'{"model": "minute"}', 400), (COMPLETE, b"\xff\xfe", 400),
    (CHAT, b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}', 404),
    (COMPLETE, b'{"model": "minute", "prompt": "a", "max_tokens": "many"}', 400),
    (COMPLETE, b'{"model": "minute", "prompt": "a", "max_tokens": 100000}', 400),
    (COMPLETE, b'{"model": "minute", "prompt": [-1]}', 400), (COMPLETE, b" " * (LIMITS.body_bytes + 1), 413),
]  # fmt: skip


def random_weights(seed: int, config: K25Config = CONFIG, std: float = 0.3):
    """Norms near one, all else near zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        norm = any(word in path[-1].key for word in ("norm", "scale"))
        return jnp.asarray(norm + std * rng.standard_normal(a.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def minute_engine(params) -> Engine:
    """An engine with all its programs compiled."""
    engine = Engine(params, CONFIG, SETTINGS, load_tokenizer())
    engine.warm_up()
    return engine


def minute_model(media_root: pathlib.Path | None = None) -> Served:
    """What the server says of the minute model."""
    reader = MediaReader(CONFIG, PATCHES, PATCHES // 4, max_frames=8, max_pixels=2**16)
    return Served("minute", load_tokenizer(), reader, TEXT.max_length, choices=8, media_root=media_root)


@contextlib.contextmanager
def serving(
    loop: AsyncEngine, served: Served, config: ServerConfig = LIMITS, key: str = ""
) -> Iterator[tuple[Server, str]]:
    """A server with an event loop of its own in a thread: (server, address). Afterwards no task of it may be left."""
    ready, left = Future(), []

    async def work():
        server, stop = Server(loop, served, config, key), asyncio.Event()
        here = asyncio.get_running_loop()
        ready.set_result((server, await server.start(), lambda: here.call_soon_threadsafe(stop.set)))
        await stop.wait()
        await server.stop()
        await asyncio.sleep(0)
        left.extend(task for task in asyncio.all_tasks() if task is not asyncio.current_task())

    def run():
        try:
            asyncio.run(work())
        except BaseException as problem:
            if ready.done():
                raise
            ready.set_exception(problem)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    server, url, halt = ready.result()
    try:
        yield server, url
    finally:
        halt()
        thread.join()
    assert not left, left


# ------------------------------------------------------------------------------------------------------------ requests
@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: what is sent where; `number` finds its tokens among the expected ones; `due` is a bad body's status."""

    kind: str
    path: str
    body: dict | bytes
    number: int = -1
    due: int = 200


def bodies(count: int) -> list[tuple[str, dict]]:
    """Good bodies, all different; every second one begins as others do."""
    rng, out = np.random.default_rng(11), []
    words = lambda n: "".join(map(chr, rng.integers(97, 123, n)))  # noqa: E731
    common = words(40)
    for number in range(count):
        text = common * (number % 2) + words(int(rng.integers(4, 40)))
        how = {"model": "minute", "max_tokens": int(rng.integers(4, 24)), "return_token_ids": True}
        how |= {"temperature": 0} if number % 3 else {"temperature": 1, "top_p": 0.9, "seed": number, "n": 2}
        if number % 4 < 2:
            out.append((CHAT, how | {"messages": [{"role": "user", "content": text}]}))
        else:
            out.append((COMPLETE, how | {"prompt": text}))
    return out


def alone(loop: AsyncEngine, served: Served, good: list[tuple[str, dict]]) -> list[list[list[int]]]:
    """The tokens of every sample of each body, asked one after the other of an engine that has nothing else to do."""
    out = []
    for path, body in good:
        (request,) = (chat_ask if path == CHAT else completion_ask)(json.dumps(body).encode(), served).requests
        samples = [Completion() for _ in range(request.n)]
        for event in loop.submit(request):
            samples[event.sample].add(event)
        out.append([sample.tokens for sample in samples])
    return out


def draw(good: list[tuple[str, dict]], count: int, seed: int) -> list[Asked]:
    """The requests of a round."""
    rng, out = np.random.default_rng(seed), []
    for kind in rng.choice(list(KINDS), count, p=list(KINDS.values())):
        number = int(rng.integers(len(good)))
        path, body = good[number]
        if kind == "malformed":
            out.append(Asked(kind, *MALFORMED[rng.integers(len(MALFORMED))][:2], due=0))
            out[-1] = dataclasses.replace(out[-1], due=next(d for p, b, d in MALFORMED if b is out[-1].body))
        elif kind in ("leaves", "stalls"):
            long = {"max_tokens": 150, "ignore_eos": True, "stream": True}
            top = {"logprobs": True, "top_logprobs": 20} if path == CHAT else {"logprobs": 5}
            out.append(Asked(kind, path, body | long | (top if kind == "stalls" else {}), number))
        else:
            out.append(Asked(kind, path, body | {"stream": kind in ("stream", "slow")}, number))
    return out


async def ask(
    session: aiohttp.ClientSession, url: str, asked: Asked
) -> list[tuple[list[int], list[list[int]], str]] | str:
    """(tokens, runs of versions, why it ended) of each choice; or what else became of the request."""
    data = asked.body if isinstance(asked.body, bytes) else json.dumps(asked.body).encode()
    sent = session.post(url + asked.path, data=data, headers={"Content-Type": "application/json"})
    if asked.kind == "leaves at once":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await (await sent).read()
        return "left"
    async with sent as response:
        if asked.kind == "malformed":
            error = (await response.json())["error"]
            return "refused" if response.status == asked.due and error["message"] and error["type"] else str(error)
        if response.status != 200:
            return f"status {response.status}: {await response.text()}"
        if asked.kind == "leaves":
            await response.content.readline()
            response.close()
            return "left"
        if asked.kind == "stalls":
            await asyncio.sleep(2.5 * LIMITS.stall_seconds)
            return "left"
        if asked.kind == "whole":
            choices = (await response.json())["choices"]
        else:
            choices = await read_stream(response, 0.02 if asked.kind == "slow" else 0)
    return [(choice["token_ids"], choice["policy_versions"], choice["finish_reason"]) for choice in choices]


async def read_stream(response: aiohttp.ClientResponse, wait: float) -> list[dict]:
    """The choices of a stream, put together."""
    choices: dict[int, dict] = {}
    async for line in response.content:
        await asyncio.sleep(wait)
        if not line.strip():
            continue
        if line.strip() == b"data: [DONE]":
            return [choices[index] for index in sorted(choices)]
        for piece in json.loads(line.removeprefix(b"data: "))["choices"]:
            choice = choices.setdefault(piece["index"], {"token_ids": [], "policy_versions": []})
            choice["token_ids"] += piece.get("token_ids", [])
            for version, count in piece.get("policy_versions", []):
                runs = choice["policy_versions"]
                runs[-1:] = (
                    [[version, runs[-1][1] + count]]
                    if runs and runs[-1][0] == version
                    else [*runs[-1:], [version, count]]
                )
            choice["finish_reason"] = piece["finish_reason"]
    raise ValueError("the stream ended without [DONE]")


# ------------------------------------------------------------------------------------------------------------ the storm
def judge(asked: Asked, got, expected: dict[int, list[list[list[int]]]], during: bool) -> str:
    """What is wrong with an outcome, or "". `during`: the weights changed while the request was open."""
    if isinstance(got, str):
        return "" if got == {"malformed": "refused"}.get(asked.kind, "left") else f"{asked.kind}: {got}"
    if len(got) != asked.body.get("n", 1):
        return f"{len(got)} choices"
    for sample, (tokens, runs, reason) in enumerate(got):
        if reason not in ("stop", "length") or sum(count for _, count in runs) != len(tokens):
            return f"{reason}, versions {runs} for {len(tokens)} tokens"
        version, count = runs[0]
        due = expected[version][asked.number][sample]
        if not during and (len(runs) > 1 or tokens != due):
            return f"{tokens} of versions {runs}, not {due}"
        if during and version == min(expected) and tokens[:count] != due[:count]:
            return f"{tokens} of versions {runs} does not begin as {due}"
    return ""


async def storm(url: str, requests: list[Asked], expected: dict, sockets: int, change) -> dict:
    """Send all, change the weights when half are done, and judge what came back."""
    wrong, kinds, done, across = [], dict.fromkeys(KINDS, 0), 0, 0
    changing, changed = asyncio.Event(), asyncio.Event()
    waiting = iter(requests)

    async def change_once():
        await changing.wait()
        await asyncio.to_thread(change)
        changed.set()

    async def worker(session):
        nonlocal done, across
        for asked in waiting:
            before = changed.is_set()
            try:
                got = await ask(session, url, asked)
            except (aiohttp.ClientError, ValueError, TimeoutError) as problem:
                got = f"{type(problem).__name__}: {problem}"
            during = not before and changing.is_set()
            across += during
            if problem := judge(asked, got, expected, during):
                wrong.append(problem)
            kinds[asked.kind] += 1
            done += 1
            if done == len(requests) // 2:
                changing.set()

    connector = aiohttp.TCPConnector(limit=sockets)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=4096) as session:
        changer = asyncio.create_task(change_once())
        await asyncio.gather(*(worker(session) for _ in range(sockets)))
        await changer
    return {"answered": done, "across": across, "wrong": wrong, "kinds": kinds}


def until_idle(loop: AsyncEngine, seconds: float = 60) -> dict[str, int]:
    """The engine's counts when nothing runs any more."""
    deadline = time.monotonic() + seconds
    while (stats := loop.stats())["running"] + stats["waiting"] and time.monotonic() < deadline:
        time.sleep(0.05)
    return stats


def objects() -> int:
    """How many objects Python keeps an eye on."""
    gc.collect()
    return len(gc.get_objects())


def memory() -> dict[str, float]:
    """What of this process is in memory, and its objects, when no more of them go away: connections outlive a storm."""
    least, found = math.inf, objects()
    while found < least:
        least = found
        time.sleep(LIMITS.stall_seconds)
        found = objects()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return {"memory_mb": pages * resource.getpagesize() / 2**20, "objects": least}


def run(loop: AsyncEngine, weights, requests: int, sockets: int, rounds: int, different: int = 40) -> dict:
    """Rounds of the storm on a server of their own; version v has weights[v % 2]."""
    served, good, single, reports = minute_model(), bodies(different), {}, []
    first = loop.stats()["version"] + 1
    for version in (first, first + 1):
        loop.update_weights(weights[version % 2], version)
        single[version % 2] = alone(loop, served, good)
    threads, began = threading.active_count(), time.monotonic()
    with serving(loop, served) as (server, url):
        for version in range(first + 1, first + 1 + rounds):
            expected = {v: single[v % 2] for v in (version, version + 1)}

            def change(version=version + 1):
                server.update_weights(weights[version % 2], version)

            report = asyncio.run(storm(url, draw(good, requests, version), expected, sockets, change))
            stats = until_idle(loop)
            left = {name: stats[name] for name in ("running", "waiting", "pages_used")}
            reports.append(report | {"left": left} | memory())
        stopping = time.monotonic()
    seconds = {"seconds": stopping - began, "stop_seconds": time.monotonic() - stopping}
    return {"rounds": reports, "threads_left": threading.active_count() - threads} | seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="of a round")
    parser.add_argument("--sockets", type=int, default=1000, help="at once")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)  # for the sockets
    weights = random_weights(1), random_weights(2)
    with AsyncEngine(minute_engine(weights[0])) as loop:
        found = run(loop, weights, args.requests, args.sockets, args.rounds)
    rounds = found["rounds"]
    wrong = sum(len(one["wrong"]) for one in rounds) + sum(args.requests - one["answered"] for one in rounds)
    left = found["threads_left"] + sum(sum(one["left"].values()) for one in rounds)
    grown, more = (rounds[-1][name] - rounds[min(1, len(rounds) - 1)][name] for name in ("memory_mb", "objects"))
    if args.json:
        out = {"name": "serving", "figure": wrong, "bound": 0, "ok": not wrong and not left and more < args.requests}
        print(json.dumps(out | {"grown_mb": grown, "grown_objects": more} | found))
        return
    for number, one in enumerate(rounds, 1):
        print(f"round {number}: {one['answered']} requests, {one['kinds']}")
        print(f"  {one['across']} were open while the weights changed; left {one['left']}; {one['memory_mb']:.0f} MB")
        for problem in one["wrong"][:5]:
            print(f"  WRONG {problem}")
    print(
        f"{wrong} not as due (bound 0); {left} requests, pages and threads left; after round 2 memory {grown:+.1f} MB, "
        f"objects {more:+d}; "
        f"{args.requests * args.rounds / found['seconds']:.1f} requests/s; stopped in {found['stop_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
