"""`k25 generate` and `k25 chat`: a model, a prompt, an answer on the terminal."""

import json
import sys
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from k25_jax.checkpoint.load import Model, load_model
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader, Prompt, from_ids, from_messages
from k25_jax.sampling.requests import EngineError, Request, TokenEvent, fitting
from k25_jax.sampling.sample import PromptError, SampleConfig
from k25_jax.text.tokenizer import StreamDecoder

LEAST_ROOM = 4096  # tokens of a conversation that an engine is built for, where the model has as many
HELP = "/image FILE and /video FILE attach media to your next message, /reset forgets the conversation, /quit ends."


class Console:
    """A loaded model with the flags of the command line. Its engine keeps what it has read of a conversation."""

    def __init__(self, args):
        self.args = args
        self.model: Model = load_model(args.checkpoint, jnp.dtype(args.dtype))
        self.engine: Engine | None = None
        self.reader = MediaReader(self.model.config, args.max_image_patches, args.max_frame_patches, args.fps)

    def prompt(self) -> Prompt:
        """The prompt that the flags describe."""
        args, config = self.args, self.model.config
        if args.prompt_ids is None:
            text = args.prompt if args.prompt is not None else sys.stdin.read()
            if args.raw:
                return from_ids(self.model.tokenizer.encode(text, allow_special=True), self.clips(), config)
            parts = [{"image": path} for path in args.image] + [{"video": path} for path in args.video]
            return from_messages(self.with_system([user(parts, text)]), self.model.tokenizer, self.reader)
        try:
            tokens = [int(item) for item in args.prompt_ids.split(",")]
        except ValueError:
            raise PromptError(f"--prompt_ids={args.prompt_ids!r} must be integers with commas between them") from None
        return from_ids(tokens, self.clips(), config)

    def clips(self) -> list:
        """Clips of --image, then of --video."""
        videos = [clip for path in self.args.video for _, clip in self.reader.video(path)]
        return [self.reader.image(path) for path in self.args.image] + videos

    def with_system(self, messages: list[dict]) -> list[dict]:
        """The conversation behind --system."""
        return [{"role": "system", "content": self.args.system}] * bool(self.args.system) + messages

    def ends(self, templated: bool) -> tuple[int, ...]:
        """Token ids that end an answer: the model's, and behind the chat template the end of a turn."""
        if self.args.ignore_eos:
            return ()
        turn = {self.model.tokenizer.special["<|im_end|>"]} if templated else set()
        return tuple({self.model.config.eos_id} | turn)

    def answer(self, prompt: Prompt, ends: tuple[int, ...], show: Callable[[str], None]) -> dict:
        """Sample until an end token, a stop text or --max_tokens; `show` gets the text piece by piece."""
        args, tokenizer = self.args, self.model.tokenizer
        if "" in args.stop:
            raise PromptError("--stop is empty: give the text that ends the answer")
        if not (args.temperature >= 0 and 0 <= args.seed < 2**32):
            raise PromptError(f"temperature={args.temperature} must be at least 0, seed={args.seed} in [0, 2**32)")
        try:
            how = SampleConfig(args.max_tokens, args.temperature, args.top_p, args.seed, ends)
        except ValueError as error:
            raise PromptError(str(error)) from None
        stream, text, tokens, logprobs = StreamDecoder(tokenizer, skip_special=True), "", [], []
        held = max(map(len, args.stop), default=1) - 1  # characters that may turn out to begin a stop text
        shown = 0
        for event in self.events(Request(prompt.tokens, prompt.clips, how)):
            tokens.append(event.token)
            logprobs.append(event.logprob)
            if event.token in ends:
                text += stream.flush()
                break
            text += stream.push(event.token)
            cut = min((text.find(stop) for stop in args.stop if stop in text), default=-1)
            if cut >= 0:
                text = text[:cut]
                break
            show(text[shown : max(len(text) - held, shown)])
            shown = max(len(text) - held, shown)
        else:
            text += stream.flush()
        show(text[shown:])
        return {"tokens": tokens, "logprobs": logprobs, "text": text}

    def events(self, request: Request) -> Iterator[TokenEvent]:
        """The tokens of one answer as they are drawn; whoever stops listening ends it."""
        engine = self.engine = self.engine_for(len(request.tokens) + request.sampling.max_tokens)
        number = engine.submit(request)
        try:
            while engine.busy:
                for event in engine.step():
                    if isinstance(event, TokenEvent):
                        yield event
                    elif event.error:
                        raise EngineError(event.error)
        finally:
            engine.abort(number)
            while engine.busy:
                engine.step()

    def engine_for(self, length: int) -> Engine:
        """The engine, or a larger one when `length` tokens are more than it takes."""
        args, config = self.args, self.model.config
        most = config.text.max_length
        if self.engine is not None and min(length, most) <= self.engine.max_length:
            return self.engine
        self.engine = None  # its memory first
        room = min(most, max(LEAST_ROOM, 1 << (length - 1).bit_length()))
        patches = max(args.max_image_patches, 4 * args.max_frame_patches)
        return Engine(self.model.params, config, fitting(config, 1, room, patches, args.dtype))


def user(parts: list[dict], text: str) -> dict:
    """The user's message: media first, then the text."""
    return {"role": "user", "content": [*parts, {"text": text}]}


def generate(args) -> int:
    """One answer."""
    console = Console(args)
    ends = console.ends(templated=args.prompt_ids is None and not args.raw)
    out = console.answer(console.prompt(), ends, (lambda _: None) if args.json else show)
    print(json.dumps(out) if args.json else "")
    return 0


def chat(args) -> int:
    """A conversation, line by line."""
    console = Console(args)
    messages, parts = [], []
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return 0
        if command == "/reset":
            messages, parts = [], []
        elif command in ("/image", "/video"):
            parts.append({command[1:]: rest.strip()})
        elif line.startswith("/"):
            print(HELP)
        elif line:
            turn = user(parts, line)
            try:
                prompt = from_messages(console.with_system([*messages, turn]), console.model.tokenizer, console.reader)
                text = console.answer(prompt, console.ends(templated=True), show)["text"]
            except ValueError as error:  # a bad file or a full context must not end the conversation
                print(f"error: {error}")
                parts = []
                continue
            print()
            messages += [turn, {"role": "assistant", "content": text}]
            parts = []


def show(text: str) -> None:
    """Print at once, without a line end."""
    print(text, end="", flush=True)
