"""Events of the engine to the bodies of OpenAI's API, whole or as the chunks of a stream.

Beyond OpenAI's fields: `reasoning_content` in messages; in each choice `policy_versions`, a list of [version of the weights,
number of tokens that it drew]; and, if asked for, `token_ids`. These, `usage` and `logprobs` count every token that was
drawn: thinking, special tokens, the token that ended the answer, and those of a stop text.
"""

import dataclasses
import secrets
import time

from k25_jax.sampling.requests import Event, TokenEvent
from k25_jax.serving.errors import ApiError
from k25_jax.serving.output_parser import OutputParser, Piece
from k25_jax.serving.requests import Ask, Served
from k25_jax.text.stops import StopTexts
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import named


@dataclasses.dataclass
class Part:
    """What came of a choice since the last time."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict] = dataclasses.field(default_factory=list)
    tokens: list[TokenEvent] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)  # characters of the answer before each token
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.tokens or self.finish_reason or self.reasoning or self.content or self.calls)


class Choice:
    """One answer in the making."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._stops = StopTexts(tokenizer, stop, ask.form)
        self._parser = OutputParser(tokenizer, ask.form, ask.names, ask.ids.copy()) if ask.form else None
        self._calls, self._part = 0, Part()
        self.drawn, self.finished = 0, False
        if ask.call_id:
            self._add(Piece("call", ask.call_id, named(ask.call_id)))

    @property
    def thought(self) -> int:
        """Tokens of the thinking."""
        return self._stops.thought

    def add(self, event: Event) -> None:
        """The next event of this answer; raises ApiError when there will be no more of it."""
        if isinstance(event, TokenEvent):
            self.drawn += 1
            self._part.tokens.append(event)
            self._part.offsets.append(self._stops.length)
            self._take(self._stops.push(event.token))
            return
        self.finished = True
        if event.reason not in ("stop", "length"):
            raise ApiError(event.error or "the answer was ended before it was done", status=500)
        self._take(self._stops.flush())
        for piece in self._parser.finish(event.reason == "stop") if self._parser else ():
            self._add(piece)
        called = event.reason == "stop" and self._calls and not isinstance(event.stopped_by, str)
        self._part.finish_reason = "tool_calls" if called else event.reason

    def take(self) -> Part:
        """What came since the last call."""
        part, self._part = self._part, Part()
        return part

    def _take(self, units: list[tuple[int | None, str]]) -> None:
        for token, text in units:
            for piece in self._parser.push(token, text) if self._parser else [Piece("content", text)]:
                self._add(piece)

    def _add(self, piece: Piece) -> None:
        part = self._part
        if piece.kind == "reasoning":
            part.reasoning += piece.text
        elif piece.kind == "content":
            part.content += piece.text
        elif piece.kind == "call":
            function = {"name": piece.name, "arguments": ""}
            part.calls.append({"index": self._calls, "id": piece.text, "type": "function", "function": function})
            self._calls += 1
        else:
            if not part.calls:  # it goes on with one that was begun in an earlier part
                part.calls.append({"index": self._calls - 1, "function": {"arguments": ""}})
            part.calls[-1]["function"]["arguments"] += piece.text


class Answer:
    """The answers to all prompts of a body."""

    def __init__(self, ask: Ask, served: Served):
        self._ask, self._tokenizer, self.notes = ask, served.tokenizer, ask.notes
        self._n = ask.requests[0].n
        self._choices = [
            Choice(ask, served.tokenizer, request.stop) for request in ask.requests for _ in range(request.n)
        ]
        prefix, kind = ("chatcmpl-", "chat.completion") if ask.chat else ("cmpl-", "text_completion")
        self._head = {
            "id": prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
        }
        self._begun = False

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self._choices)

    def add(self, number: int, event: Event) -> None:
        """An event of the request for prompt `number`; raises ApiError when an answer fails."""
        self._choices[number * self._n + event.sample].add(event)

    def usage(self) -> dict:
        """Tokens so far; a prompt counts once, whatever its number of answers."""
        prompt = sum(len(request.tokens) for request in self._ask.requests)
        drawn = sum(choice.drawn for choice in self._choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
        if self._ask.chat:
            thought = sum(choice.thought for choice in self._choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        return usage

    def body(self) -> dict:
        """The whole answer."""
        choices = [self._choice(index, choice.take(), self._message) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": self.usage()} | self._prompt_ids()

    def chunks(self) -> list[dict]:
        """What came since the last call, at most one chunk a choice; at the end the usage, if it was asked for."""
        kind = "chat.completion.chunk" if self._ask.chat else "text_completion"
        none = {"usage": None} if self._ask.include_usage else {}
        head, out = self._head | {"object": kind}, []
        if not self._begun:
            self._begun = True
            for index in range(len(self._choices)) if self._ask.chat else ():
                choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                out.append(head | {"choices": [choice | {"finish_reason": None}]} | none | self._prompt_ids())
        for index, choice in enumerate(self._choices):
            if part := choice.take():
                out.append(head | {"choices": [self._choice(index, part, _delta)]} | none)
        if self.finished and self._ask.include_usage:
            out.append(head | {"choices": [], "usage": self.usage()})
        return out

    def _prompt_ids(self) -> dict:
        if not self._ask.return_token_ids:
            return {}
        prompts = [[int(token) for token in request.tokens] for request in self._ask.requests]
        return {"prompt_token_ids": prompts[0] if self._ask.chat else prompts}

    def _choice(self, index: int, part: Part, speak) -> dict:
        """A choice whose message is written by `speak`."""
        choice = {"index": index, "finish_reason": part.finish_reason, "logprobs": self._logprobs(part)}
        if self._ask.chat:
            choice |= speak(part)
        else:
            choice["text"] = part.content
        choice["policy_versions"] = _runs([event.version for event in part.tokens])
        if self._ask.return_token_ids:
            choice["token_ids"] = [event.token for event in part.tokens]
        return choice

    @staticmethod
    def _message(part: Part) -> dict:
        message = {"role": "assistant", "content": part.content or (None if part.calls else "")}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in part.calls]
        return {"message": message}

    def _logprobs(self, part: Part) -> dict | None:
        if self._ask.top_logprobs is None:
            return None
        if self._ask.chat:
            return {"content": [self._token_logprobs(event) for event in part.tokens], "refusal": None}
        name = self._name
        top = [{name(token): logprob for token, logprob in event.alternatives} for event in part.tokens]
        return {
            "tokens": [name(event.token) for event in part.tokens],
            "token_logprobs": [event.logprob for event in part.tokens],
            "top_logprobs": top if self._ask.top_logprobs else None,
            "text_offset": part.offsets,
        }

    def _token_logprobs(self, event: TokenEvent) -> dict:
        top = [self._logprob(token, logprob) for token, logprob in event.alternatives]
        return self._logprob(event.token, event.logprob) | {"top_logprobs": top}

    def _logprob(self, token: int, logprob: float) -> dict:
        raw = self._tokenizer.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def _name(self, token: int) -> str:
        """The text of a token; of one that is no whole text its bytes, as OpenAI writes them."""
        raw = self._tokenizer.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _delta(part: Part) -> dict:
    named = {"reasoning_content": part.reasoning, "content": part.content, "tool_calls": part.calls}
    return {"delta": {name: value for name, value in named.items() if value}}


def _runs(versions: list[int]) -> list[list[int]]:
    """[version, how many tokens] for each run of equal versions."""
    runs: list[list[int]] = []
    for version in versions:
        if not runs or runs[-1][0] != version:
            runs.append([version, 0])
        runs[-1][1] += 1
    return runs
