"""Any server with the OpenAI chat completions API as an answerer (K2.5 §4).

What fails on the way (no connection, no answer in time, 408, 409, 429, 5xx, an answer that cannot be read) is asked again
and counted; a request that the server refuses for good ends the evaluation, for the next would be refused as well. The
key comes from an environment variable and is written nowhere.
"""

import asyncio
import base64
import io
import itertools
import json
import logging
import os
import random
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import av
import numpy as np
import openai
from PIL import Image

from k25_jax.config import ConfigError
from k25_jax.data.records import RecordError, read_bytes
from k25_jax.evals.protocol import Answer, AnswererError, Request
from k25_jax.text.chat import part_kind

KEY = "OPENAI_API_KEY"
MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp",
        b"BM": "image/bmp", b"II*\0": "image/tiff", b"MM\0*": "image/tiff"}  # fmt: skip
TOO_LONG = ("context_length_exceeded", "context length", "maximum context", "too many tokens")
AGAIN = (408, 409, 425, 429)
MOST_PAUSE = 60.0  # seconds between two tries
GIVE_UP = 16  # requests in a row without an answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """Asks `model` at `url`, such as http://127.0.0.1:8000/v1, at most `concurrency` requests at a time.

    A request has `timeout` seconds, and `retries` more tries; the waits between them start at `pause` seconds and double.
    """

    url: str
    model: str
    concurrency: int = 16
    timeout: float = 3600.0
    retries: int = 5
    pause: float = 1.0
    key_variable: str = KEY
    identity: Mapping = field(init=False)

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(
                f"--url={parts.scheme}://{parts.hostname or ''}: must read http(s)://host:port/v1, without a name, a "
                f"password or a query; the key goes into the environment variable {self.key_variable}"
            )
        if not self.model:
            raise ConfigError("--url needs --model: the name by which the server knows the model")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise ConfigError(
                f"concurrency={self.concurrency} must be at least 1, retries={self.retries} at least 0 and "
                f"timeout={self.timeout} positive"
            )
        object.__setattr__(self, "identity", {"url": self.url.rstrip("/"), "model": self.model})

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Answerer`. Raises AnswererError when the server refuses, or answers nothing any more."""
        with asyncio.Runner() as runner:
            client = runner.run(self._open())
            try:
                yield from self._answer(runner, client, enumerate(requests))
            finally:
                runner.run(client.close())

    def _answer(self, runner, client, numbered) -> Iterator[tuple[int, Answer]]:
        pending, lost = {}, 0
        while True:
            for number, request in itertools.islice(numbered, self.concurrency - len(pending)):
                pending[runner.get_loop().create_task(self._ask(client, request))] = number
            if not pending:
                return
            for task in runner.run(_first(pending)):
                number, answer = pending.pop(task), task.result()
                lost = lost + 1 if answer.finish == "error" else 0
                yield number, answer
                if lost >= max(GIVE_UP, self.concurrency):
                    raise AnswererError(
                        f"{self.url}: {lost} requests in a row had no answer, the last one: {answer.error}. Look at "
                        "the server, then give the same command again: what was answered is kept"
                    )

    async def _open(self) -> openai.AsyncOpenAI:
        key = os.environ.get(self.key_variable) or "none"  # servers of one's own ask for no key
        return openai.AsyncOpenAI(api_key=key, base_url=self.url, max_retries=0, timeout=self.timeout)

    async def _ask(self, client: openai.AsyncOpenAI, request: Request) -> Answer:
        """One answer, after as many tries as it takes; never raises for what may pass."""
        jitter = random.Random(request.seed)
        messages = [api_message(message) for message in request.messages]
        for tries in itertools.count():
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._once(client, messages, request, tries)
            except openai.APIStatusError as problem:
                reason, wait = self._refused(problem, tries), _asked_to_wait(problem)
                if isinstance(reason, Answer):
                    return reason
            except (openai.APIError, TimeoutError, ValueError, RecursionError) as problem:
                slow = isinstance(problem, (TimeoutError, openai.APITimeoutError))
                reason = f"no answer in {self.timeout:g} s" if slow else f"{type(problem).__name__}: {problem}"
                wait = 0.0
            if tries == self.retries:
                return Answer("", None, "error", tries, self._clean(reason))
            logger.info("%s: %s; once more", self.url, self._clean(reason))
            await asyncio.sleep(max(wait, min(self.pause * 2**tries, MOST_PAUSE) * jitter.uniform(0.5, 1.0)))

    async def _once(self, client: openai.AsyncOpenAI, messages: list[dict], request: Request, tries: int) -> Answer:
        settings = request.settings
        # The answer is read here, not by the client, which lets through whatever JSON comes.
        raw = await client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=messages,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=request.seed,
        )
        return read_completion(raw.content, settings.context, tries)

    def _refused(self, problem: openai.APIStatusError, tries: int) -> str | Answer:
        """Why to ask again; an answer when the prompt was too long; raises AnswererError for all else."""
        text = self._clean(str(problem))
        if problem.status_code in AGAIN or problem.status_code >= 500:
            return text
        if problem.status_code in (400, 413, 422) and any(sign in text.lower() for sign in TOO_LONG):
            return Answer("", 0, "overflow", tries)
        remedy = f"; set the environment variable {self.key_variable}" if problem.status_code in (401, 403) else ""
        raise AnswererError(f"{self.url}: the model {self.model!r} refuses ({text}){remedy}") from None

    def _clean(self, text: str) -> str:
        """A message without the key, and not too long."""
        key = os.environ.get(self.key_variable)
        return (text.replace(key, "***") if key else text)[:500]


async def _first(pending) -> set[asyncio.Task]:
    done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    return done


def _asked_to_wait(problem: openai.APIStatusError) -> float:
    """Seconds that the server asks for, at most a minute."""
    try:
        return min(max(float(problem.response.headers.get("retry-after", 0)), 0.0), MOST_PAUSE)
    except ValueError:
        return 0.0


def read_completion(body: bytes, context: int, retries: int = 0) -> Answer:
    """A chat completion to an answer; raises ValueError for anything else."""
    completion = json.loads(body)
    try:
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        text, finish = choice["message"].get("content") or "", choice.get("finish_reason") or "stop"
        tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens") or 0
    except (KeyError, IndexError, TypeError, AttributeError) as problem:
        raise ValueError(f"the answer is no chat completion ({type(problem).__name__}: {problem})") from None
    if not isinstance(text, str) or not isinstance(finish, str) or not isinstance(tokens, int | None):
        raise ValueError("the answer is no chat completion: content, finish_reason or completion_tokens is odd")
    if tokens is not None and prompt + tokens > context:
        finish = "overflow"
    reasoning, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in rest:
        rest = ""  # the reasoning came to no end
    return Answer(rest, tokens, finish, retries)


# ------------------------------------------------------------------------------------------------------------- messages
def api_message(message: Mapping) -> dict:
    """A message of `text.chat` as the API has it, with media as data URLs; raises ChatError, ConfigError."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    return {"role": message["role"], "content": [_api_part(part, f"content[{i}]") for i, part in enumerate(content)]}


def _api_part(part: Mapping, where: str) -> dict:
    kind = part_kind(part, where)
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(part[kind], kind, where)}}


def data_url(source, kind: str, where: str) -> str:
    """An image or a video (an array, bytes, or a path) as a data URL."""
    if isinstance(source, np.ndarray):
        data = _png(source) if kind == "image" else _mp4(source)
    elif isinstance(source, bytes):
        data = source
    else:
        try:
            data = read_bytes(source)
        except RecordError as problem:
            raise ConfigError(f"{where}.{kind}: {problem}") from None
    mime = next(
        (mime for head, mime in MIME.items() if data.startswith(head)), None if kind == "image" else "video/mp4"
    )
    if mime is None:
        raise ConfigError(f"{where}.image: is no PNG, JPEG, GIF, WebP, BMP or TIFF file ({data[:8]!r}); convert it")
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _mp4(frames: np.ndarray, fps: int = 2) -> bytes:
    """uint8 [frames, h, w, 3] without loss; sides are padded to even numbers, which the format asks for."""
    height, width = (side + side % 2 for side in frames.shape[1:3])
    padded = np.zeros((len(frames), height, width, 3), np.uint8)
    padded[:, : frames.shape[1], : frames.shape[2]] = frames
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264rgb", rate=fps, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for frame in padded:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()
