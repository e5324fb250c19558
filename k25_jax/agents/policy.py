"""Who speaks in an episode, tokens in and tokens out: the engine in this process, or a server elsewhere (K2.5 §3.5)."""

import asyncio
import contextlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import openai

from k25_jax.config import ConfigError, K25Config
from k25_jax.sampling.async_engine import AsyncEngine, Stream
from k25_jax.sampling.prompt import MediaReader
from k25_jax.sampling.requests import Completion, EngineError, Event, Overloaded, Request
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.observation import InfrastructureError
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.vision.patchpack import Clip

PAUSE = 0.05  # seconds before an engine whose queue was full is asked again
KEY = "OPENAI_API_KEY"
AGAIN = (408, 409, 425, 429)  # what a server that is well refuses for now


class PolicyError(RuntimeError):
    """A policy that cannot be asked like this, now or later; the message says who, why, and what to do."""


class Policy(Protocol):
    """A model that goes on from token ids."""

    tokenizer: Tokenizer
    reader: MediaReader  # makes clips of pictures, and knows the model's config
    max_length: int  # tokens of a prompt and what follows
    vision_tokens: int  # of all pictures of a prompt, at most; 0: it takes none

    async def say(
        self, tokens: Sequence[int], clips: Sequence[Clip], sampling: SampleConfig, stop: asyncio.Event
    ) -> Completion:
        """What follows on a prompt with one media_pad for each vision token; log-probabilities are exact as float32.

        Once `stop` is set it ends with reason "abort" and what was drawn so far. Whoever cancels it leaves nothing behind.
        Raises InfrastructureError for what may pass, PolicyError for what will not.
        """


def reader_for(tokenizer: Tokenizer, config: K25Config, patches: int = 16384) -> MediaReader:
    """Reads pictures of up to so many patches; raises ConfigError for a tokenizer of another model."""
    if (pad := tokenizer.special["<|media_pad|>"]) != config.media_pad_id:
        raise ConfigError(
            f"the tokenizer's <|media_pad|> is {pad}, the model's {config.media_pad_id}: use the model's tokenizer"
        )
    return MediaReader(config, max_image_patches=patches, max_frame_patches=min(patches // 4, 4096))


class EnginePolicy:
    """The asynchronous engine in this process; others may use it at the same time. While its queue is full one waits."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer):
        self._engine, self.tokenizer, self.max_length = engine, tokenizer, engine.max_length
        most = max(engine.settings.vision_patches, default=0) if engine.sees else 0
        self.vision_tokens = engine.settings.vision_tokens if most else 0
        # Filling up whole groups can double the patches of a long picture.
        self.reader = reader_for(tokenizer, engine.config, max(1, (most - 8) // 2))

    async def say(self, tokens, clips, sampling, stop) -> Completion:
        """See `Policy`. EngineError when the engine has stopped."""
        completion, ended, loop = Completion(), asyncio.Event(), asyncio.get_running_loop()

        def on_event(event: Event):  # in the engine's thread, which alone touches the completion until it has a reason
            completion.add(event)
            if completion.reason:
                loop.call_soon_threadsafe(ended.set)

        stream = await self._submit(Request(tokens, clips, sampling), on_event, stop)
        if stream is None:
            return Completion(reason="abort")
        try:
            await first_of(ended, stop)
            if not ended.is_set():
                self._abort(stream)
                await ended.wait()
        finally:
            if not ended.is_set():
                self._abort(stream)
        return completion

    async def _submit(self, request: Request, on_event, stop: asyncio.Event) -> Stream | None:
        """The stream of the request, as soon as the queue has room; None when it shall stop before."""
        while not stop.is_set():
            future = self._engine.submit_soon(request, on_event)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                future.add_done_callback(self._abandon)
                raise
            except Overloaded:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), PAUSE)
        return None

    def _abandon(self, future: Future) -> None:
        if not future.cancelled() and not future.exception():
            self._abort(future.result())

    def _abort(self, stream: Stream) -> None:
        with contextlib.suppress(EngineError):  # it has stopped, and all requests with it
            self._engine.abort_soon(stream)


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class EndpointPolicy:
    """`model` at an address such as http://127.0.0.1:8000/v1: any server whose completions take and return token ids.

    So do ours and vLLM's, with `return_token_ids`. Use it in `async with`. A request has `timeout` seconds, and `retries`
    more tries where a failure may pass. `tokenizer` and `config` are the model's. It takes no pictures: no server takes
    them beside token ids, and messages would be tokenised anew. Where the server does not say which weights drew a token,
    they are `version`. The key comes from an environment variable.
    """

    vision_tokens = 0

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Tokenizer,
        config: K25Config,
        timeout: float = 600.0,
        retries: int = 5,
        version: int = 0,
        key_variable: str = KEY,
    ):
        self._where, self._model, self._version = f"{model} at {url}", model, version
        self.tokenizer, self.reader, self.max_length = tokenizer, reader_for(tokenizer, config), 0
        self._key = os.environ.get(key_variable) or "none"  # servers of one's own ask for no key
        self._client = openai.AsyncOpenAI(api_key=self._key, base_url=url, max_retries=retries, timeout=timeout)

    async def __aenter__(self) -> "EndpointPolicy":
        """Ask the server for the model's context."""
        listed = await self._asked(self._client.models.with_raw_response.list())
        known = {one.get("id"): one for one in listed.get("data", ())}
        if not isinstance(most := known.get(self._model, {}).get("max_model_len"), int):
            raise PolicyError(
                f"{self._where}: the server does not say the model's max_model_len; it serves {', '.join(map(str, known))}"
            )
        self.max_length = most
        return self

    async def __aexit__(self, *_):
        await self._client.close()

    async def say(self, tokens, clips, sampling, stop) -> Completion:
        """See `Policy`. What a server has drawn when it is stopped is lost, for it was not given."""
        if clips:
            raise PolicyError(
                f"{self._where}: takes token ids, and no pictures beside them; play what shows pictures with the engine in "
                "this process, or with the pictures hidden"
            )
        body = self._client.completions.with_raw_response.create(
            model=self._model,
            prompt=[int(token) for token in tokens],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=0,
            extra_body={"return_token_ids": True, "stop_token_ids": list(sampling.stop_ids)},
        )
        asking, stopping = asyncio.ensure_future(self._asked(body)), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return self._read(asking.result()) if asking.done() else Completion(reason="abort")
        finally:
            asking.cancel()
            stopping.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _asked(self, request) -> dict:
        """The JSON object that a server answers."""
        try:
            answer = json.loads((await request).content)
        except openai.APIStatusError as problem:
            text = f"{self._where}: {str(problem).replace(self._key, '***')[:500]}"
            if problem.status_code in AGAIN or problem.status_code >= 500:
                raise InfrastructureError(text) from None
            raise PolicyError(text) from None
        except (openai.APIError, ValueError, RecursionError) as problem:
            raise InfrastructureError(f"{self._where}: {type(problem).__name__}: {problem}") from None
        if not isinstance(answer, dict):
            raise PolicyError(f"{self._where}: the server answers {type(answer).__name__}, not a JSON object")
        return answer

    def _read(self, answer: dict) -> Completion:
        try:
            (choice,) = answer["choices"]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            runs = choice.get("policy_versions", [[self._version, len(tokens)]])
            versions = [version for version, count in runs for _ in range(count)]
            odd = not all(isinstance(token, int) for token in [*tokens, *versions]) or not all(
                map(math.isfinite, logprobs)
            )
            reason = choice["finish_reason"]
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as problem:
            raise PolicyError(
                f"{self._where}: an answer must have token_ids and logprobs.token_logprobs ({type(problem).__name__}: "
                f"{problem}); use a server that knows return_token_ids"
            ) from None
        if odd or not len(tokens) == len(logprobs) == len(versions) or reason not in ("stop", "length"):
            raise InfrastructureError(
                f"{self._where}: {len(tokens)} tokens with {len(logprobs)} log-probabilities and {len(versions)} versions, "
                f"finish_reason={reason!r}"
            )
        return Completion(tokens, logprobs, versions, [()] * len(tokens), reason)
