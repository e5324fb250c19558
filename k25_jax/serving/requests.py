"""Bodies of OpenAI's chat and completions API to what the engine is asked. All that is wrong is an ApiError.

Beyond OpenAI's fields: those for thinking (`serving.thinking`); `reasoning_content` in messages; `ignore_eos`;
`stop_token_ids`; `return_token_ids`. What cannot be kept is refused: penalties, JSON on demand, echo. Strict tools are
taken with a note.
"""

import dataclasses
import pathlib
import secrets
from collections.abc import Collection, Sequence

from k25_jax.sampling.prompt import MediaReader, Prompt, from_ids, from_messages
from k25_jax.sampling.requests import Request
from k25_jax.sampling.sample import SEEDS, PromptError, SampleConfig, fold_seed
from k25_jax.serving.bounds import BoundedReader, BoundedTokenizer, Exceeded
from k25_jax.serving.errors import ApiError, from_text, show
from k25_jax.serving.fields import Fields, read_json
from k25_jax.serving.media import MediaOpener
from k25_jax.serving.messages import convert_messages, read_tools
from k25_jax.serving.thinking import read_thinking
from k25_jax.text.chat import ChatError
from k25_jax.text.tokenizer import Tokenizer, TokenizerError
from k25_jax.text.tool_calls import CallIds, call_parts
from k25_jax.text.turn import TurnForm
from k25_jax.vision.image import ImageError
from k25_jax.vision.patchpack import PackError
from k25_jax.vision.video import VideoError

IGNORED = {  # fields that cannot change an answer here, and what they are elsewhere
    "user": "who asks",
    "safety_identifier": "who asks",
    "metadata": "notes on a stored answer",
    "store": "keeps the answer for its owner",
    "service_tier": "a price",
    "prompt_cache_key": "for a cache; here prompts that begin alike share one anyway",
    "prompt_cache_retention": "for the same cache",
    "cache_control": "for the same cache",
    "prediction": "a guess at the answer, which makes it come faster",
}
NEUTRAL = {  # fields that would change the answer, and what they may say: that nothing is changed
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
    "top_k": (-1, 0),
}
CHAT_NEUTRAL = {
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "functions": [],
    "function_call": ("none", "auto"),
    "verbosity": "medium",
    "web_search_options": None,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
}
STRICT = "tools with strict=true: arguments are not constrained to the schema here; check them before the call is made"
COMPLETION_NEUTRAL = {"echo": False, "best_of": 1, "suffix": ""}
MARKS = 3  # tokens that a message, or a tool, has at least
STOPS, STOP_LENGTH = 16, 1000  # texts that may end an answer, and their characters
PROMPT_ERRORS = (PromptError, ChatError, TokenizerError, ImageError, VideoError, PackError)


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """The model that is served and what a request may ask of it."""

    name: str
    tokenizer: Tokenizer
    reader: MediaReader
    max_length: int  # tokens of a prompt and its answer
    mode: str = "plain"  # of the chat template, where a request does not say
    max_tokens: int | None = None  # of an answer; None: up to max_length
    top_logprobs: int = 20
    choices: int = 64  # answers of a request
    media_root: pathlib.Path | None = None
    media_bytes: int = 2**26  # of the files of a request
    media_seconds: float = 30.0  # after which no further image or video of a request is read


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """What a body asks for: one engine request a prompt, and the form of the answer."""

    chat: bool
    requests: Sequence[Request]
    stream: bool
    include_usage: bool
    top_logprobs: int | None  # None: no log-probabilities
    return_token_ids: bool
    form: TurnForm | None = None  # of the answer's turn; None: a text
    names: Collection[str] = ()  # of the declared tools
    ids: CallIds = dataclasses.field(default_factory=CallIds)  # of the calls before
    call_id: str | None = None  # of the call that the prompt has begun
    notes: tuple[str, ...] = ()  # what was asked for and is not kept, though answered


def chat_ask(raw: bytes, served: Served) -> Ask:
    """A body of /v1/chat/completions."""
    fields = Fields(read_json(raw))
    _check_model(fields, served)
    mode, keep_thinking = read_thinking(fields, served.mode)
    messages = fields.take("messages", list, required=True)
    if len(messages) * MARKS > served.max_length:
        raise _too_long(
            f"messages: {len(messages)} of them exceed the context of {served.max_length} tokens", "messages"
        )
    use = read_tools(fields, mode)
    several = fields.take("parallel_tool_calls", bool, default=True)
    if len(use.tools) * MARKS > served.max_length:
        raise _too_long(f"tools: {len(use.tools)} of them exceed the context of {served.max_length} tokens", "tools")
    one_call = use.read and (use.forced is not None or not several)
    wanted = fields.take("logprobs", bool, default=False)
    top = fields.number("top_logprobs", int, None, 0, served.top_logprobs)
    if top is not None and not wanted:
        raise fields.error("top_logprobs", "needs logprobs=true", "invalid_value")
    most = [fields.number(name, int, None, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    if None not in most and most[0] != most[1]:
        raise fields.error("max_tokens", "and max_completion_tokens differ; send one of them", "invalid_value")
    special = served.tokenizer.special
    ends = tuple(special[name] for name in ("<|im_end|>", "<|tool_call_end|>")[: 1 + one_call] if name in special)
    how = _how(fields, served, (top or 0) if wanted else None, ends)
    fields.neutral(**CHAT_NEUTRAL)
    fields.end()
    opener = MediaOpener(served.media_root, served.media_bytes)
    messages = convert_messages(messages, opener, mode)
    try:
        tokenizer = BoundedTokenizer(served.tokenizer, served.max_length)
        reader = BoundedReader(served.reader, served.max_length, served.media_seconds)
        prompt = from_messages(messages, tokenizer, reader, mode, use.tools, keep_thinking)
    except Exceeded as problem:
        raise _too_long(f"messages: {problem}", "messages") from None
    except PROMPT_ERRORS as problem:
        raise from_text(problem, "messages") from None
    ids, call_id = _ids_of(messages), None
    if use.forced is not None:
        call_id, _ = ids.read(use.forced, [use.forced])
        prompt = dataclasses.replace(prompt, tokens=prompt.tokens + _begun_call(served.tokenizer, call_id))
    form = TurnForm(mode, use.read, call_id is not None)
    request = how.request(prompt, most[0] or most[1], "messages", served, form)
    notes = (STRICT,) if use.strict else ()
    return dataclasses.replace(how.ask(True, [request], form), names=use.names, ids=ids, call_id=call_id, notes=notes)


def completion_ask(raw: bytes, served: Served) -> Ask:
    """A body of /v1/completions: texts, in which special tokens count as such, or token ids."""
    fields = Fields(read_json(raw))
    _check_model(fields, served)
    prompts = _prompts(fields, served)
    top = fields.number("logprobs", int, None, 0, min(5, served.top_logprobs))
    most = fields.number("max_tokens", int, 16, 1, 2**31)
    how = _how(fields, served, top, (), len(prompts))
    fields.neutral(**COMPLETION_NEUTRAL)
    fields.end()
    requests = [how.request(prompt, most, "prompt", served) for prompt in prompts]
    return how.ask(False, requests)


@dataclasses.dataclass(frozen=True)
class _How:
    """What both kinds of bodies say in the same way."""

    n: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    seed: int
    stream: bool
    include_usage: bool
    return_token_ids: bool
    top_logprobs: int | None

    def request(
        self, prompt: Prompt, max_tokens: int | None, param: str, served: Served, form: TurnForm | None = None
    ) -> Request:
        """What the engine is asked for one prompt; without max_tokens as much as there is room for."""
        room, length = served.max_length - len(prompt.tokens), len(prompt.tokens)
        allowed = min(room, served.max_tokens or room)
        if room < 1 or (max_tokens or 1) > room:
            asked = f"{length} tokens and max_tokens={max_tokens or 1}"
            raise _too_long(f"{param}: {asked} exceed the context of {served.max_length}", param)
        if (max_tokens or 1) > allowed:
            raise ApiError(f"max_tokens={max_tokens} must be at most {allowed} here", "max_tokens", "invalid_value")
        sampling = SampleConfig(max_tokens or allowed, self.temperature, self.top_p, self.seed, self.stop_ids)
        return Request(prompt.tokens, prompt.clips, sampling, self.n, self.stop, self.top_logprobs or 0, form)

    def ask(self, chat: bool, requests: list[Request], form: TurnForm | None = None) -> Ask:
        """Everything together."""
        shown = (self.stream, self.include_usage, self.top_logprobs, self.return_token_ids)
        return Ask(chat, requests, *shown, form)


def _how(fields: Fields, served: Served, top_logprobs: int | None, ends: tuple[int, ...], prompts: int = 1) -> _How:
    """The fields of both kinds of bodies."""
    n = fields.number("n", int, 1, 1, max(1, served.choices // prompts))
    stream, options = fields.take("stream", bool, default=False), fields.take("stream_options", dict)
    if options is not None and not stream:
        raise fields.error("stream_options", "needs stream=true", "invalid_value")
    inner = Fields(options or {}, "stream_options")
    include_usage = inner.take("include_usage", bool, default=False)
    inner.neutral(include_obfuscation=False)
    inner.end()
    stop_ids = () if fields.take("ignore_eos", bool, default=False) else (*served.reader.config.eos_ids, *ends)
    seed = fields.number("seed", int, None, *SEEDS)
    top_p = fields.number("top_p", float, 1.0, 0, 1)
    if top_p == 0:
        raise fields.error("top_p", "must be above 0; for the likeliest tokens send temperature=0", "invalid_value")
    fields.ignored(*IGNORED)
    fields.neutral(**NEUTRAL)
    stops, special = _stops(fields), served.tokenizer.special
    stop_ids += (*(special[stop] for stop in stops if stop in special), *_stop_ids(fields))
    return _How(
        n,
        stops,
        tuple(dict.fromkeys(stop_ids)),
        fields.number("temperature", float, 1.0, 0, 2),
        top_p,
        secrets.randbits(32) if seed is None else fold_seed(seed),
        stream,
        include_usage,
        fields.take("return_token_ids", bool, default=False),
        top_logprobs,
    )


def _check_model(fields: Fields, served: Served):
    name = fields.take("model", str, required=True)
    if name != served.name:
        raise ApiError(f"there is no model {show(name)} here, only {served.name!r}", "model", "model_not_found", 404)


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.take("stop", str, list, default=[])
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH for stop in stops):
        problem = f"must be up to {STOPS} texts of 1 to {STOP_LENGTH} characters"
        raise fields.error("stop", problem, "invalid_value")
    return tuple(dict.fromkeys(stops))


def _stop_ids(fields: Fields) -> list[int]:
    ids = fields.take("stop_token_ids", list, default=[])
    if len(ids) > STOPS or not all(_is_id(token) for token in ids):
        raise fields.error("stop_token_ids", f"must be up to {STOPS} token ids", "invalid_value")
    return ids


def _prompts(fields: Fields, served: Served) -> list[Prompt]:
    """`prompt`: a text, token ids, or a list of texts or of lists of token ids."""
    value = fields.take("prompt", str, list, required=True)
    items = [value] if isinstance(value, str) or (value and _is_id(value[0])) else value
    if not 1 <= len(items) <= served.choices:
        raise fields.error("prompt", f"must hold 1 to {served.choices} prompts, not {len(items)}", "invalid_value")
    prompts = []
    for number, item in enumerate(items):
        where = "prompt" if items is not value else f"prompt[{number}]"
        if isinstance(item, list) and len(item) > served.max_length:
            problem = f"{where}: {len(item)} tokens exceed the context of {served.max_length}"
            raise _too_long(problem, where)
        if not isinstance(item, str) and not (isinstance(item, list) and all(_is_id(token) for token in item)):
            raise ApiError(f"{where} must be a string or a list of token ids, not {show(item)}", where, "invalid_type")
        try:
            encode = BoundedTokenizer(served.tokenizer, served.max_length).encode
            tokens = encode(item, allow_special=True) if isinstance(item, str) else item
            prompts.append(from_ids(tokens, [], served.reader.config))
        except Exceeded as problem:
            raise _too_long(f"{where}: {problem}", where) from None
        except (PromptError, TokenizerError) as problem:
            raise ApiError(f"{where}: {problem}", where, "invalid_value") from None
        if not tokens:
            raise ApiError(f"{where} is empty", where, "invalid_value")
    return prompts


def _too_long(problem: str, param: str) -> ApiError:
    remedy = "shorten the prompt, use fewer or smaller images, or lower max_tokens"
    return ApiError(f"{problem}; {remedy}", param, "context_length_exceeded")


def _is_id(token) -> bool:
    return isinstance(token, int) and not isinstance(token, bool)


def _ids_of(messages: Sequence[dict]) -> CallIds:
    """The ids of all calls in messages that were rendered."""
    ids = CallIds()
    for message in messages:
        for call in message.get("tool_calls", ()):
            call_parts(call, ids)
    return ids


def _begun_call(tokenizer: Tokenizer, call_id: str) -> list[int]:
    """The tokens up to where a call's arguments begin."""
    special = tokenizer.special
    begin = [special["<|tool_calls_section_begin|>"], special["<|tool_call_begin|>"]]
    return [*begin, *tokenizer.encode(call_id), special["<|tool_call_argument_begin|>"]]
