"""`k25 generate` and `k25 chat`: a model, a prompt, an answer on the terminal."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from k25_jax.checkpoint.load import Model, load_model
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader, Prompt, default_mode, from_ids, from_messages
from k25_jax.sampling.requests import EngineError, Request, TokenEvent, fitting
from k25_jax.sampling.sample import SEEDS, PromptError, SampleConfig, fold_seed
from k25_jax.text.chat import THINK
from k25_jax.text.conversation import Conversation
from k25_jax.text.stops import StopTexts
from k25_jax.text.turn import TurnForm

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
            messages = [*self.system(), user(parts, text)]
            return from_messages(messages, self.model.tokenizer, self.reader, self.mode)
        try:
            tokens = [int(item) for item in args.prompt_ids.split(",")]
        except ValueError:
            raise PromptError(f"--prompt_ids={args.prompt_ids!r} must be integers with commas between them") from None
        return from_ids(tokens, self.clips(), config)

    def clips(self) -> list:
        """Clips of --image, then of --video."""
        videos = [clip for path in self.args.video for _, clip in self.reader.video(path)]
        return [self.reader.image(path) for path in self.args.image] + videos

    @property
    def mode(self) -> str:
        """Of the chat template."""
        return self.args.mode or default_mode(self.model)

    def system(self) -> list[dict]:
        """The message of --system, if there is one."""
        return [{"role": "system", "content": self.args.system}] * bool(self.args.system)

    def conversation(self, turns: Sequence[dict | list[int]] = ()) -> Conversation:
        """A conversation behind --system, of messages and of tokens that were sampled."""
        conversation = Conversation(self.model.tokenizer, mode=self.mode, load_media=self.reader.load)
        for turn in [*self.system(), *turns]:
            if isinstance(turn, dict):
                conversation.add(turn)
            else:
                conversation.prompt()
                conversation.say(turn)
        return conversation

    def ends(self, templated: bool) -> tuple[int, ...]:
        """Token ids that end an answer: the model's, and behind the chat template the end of a turn."""
        if self.args.ignore_eos:
            return ()
        turn = {self.model.tokenizer.special["<|im_end|>"]} if templated else set()
        return tuple({*self.model.config.eos_ids} | turn)

    def answer(
        self, prompt: Prompt, ends: tuple[int, ...], show: Callable[[str], None], form: TurnForm | None = None
    ) -> dict:
        """Sample until an end token, a stop text or --max_tokens; `show` gets the text piece by piece.

        `form` is that of the turn, in whose content the stop texts count; without one they count everywhere.
        """
        args, tokenizer = self.args, self.model.tokenizer
        if "" in args.stop:
            raise PromptError("--stop is empty: give the text that ends the answer")
        if not (args.temperature >= 0 and SEEDS[0] <= args.seed <= SEEDS[1]):
            problem = f"temperature={args.temperature} must be at least 0, seed={args.seed} a signed number of 64 bits"
            raise PromptError(problem)
        try:
            how = SampleConfig(args.max_tokens, args.temperature, args.top_p, fold_seed(args.seed), ends)
        except ValueError as error:
            raise PromptError(str(error)) from None
        stops, texts, tokens, logprobs = StopTexts(tokenizer, args.stop, form), [], [], []
        marks = {tokenizer.special[name]: name for name in THINK if name in tokenizer.special}  # the others are no text

        def say(units: list[tuple[int | None, str]]):
            for token, text in units:
                texts.append(marks.get(token) or text)
                show(texts[-1])

        for event in self.events(Request(prompt.tokens, prompt.clips, how)):
            tokens.append(event.token)
            logprobs.append(event.logprob)
            if event.token in ends:
                break
            say(stops.push(event.token))
            if stops.found:
                break
        say(stops.flush())
        return {"tokens": tokens, "logprobs": logprobs, "text": "".join(texts)}

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
    templated = args.prompt_ids is None and not args.raw
    form = TurnForm(console.mode) if templated else None
    out = console.answer(console.prompt(), console.ends(templated), (lambda _: None) if args.json else show, form)
    print(json.dumps(out) if args.json else "")
    return 0


def chat(args) -> int:
    """A conversation, line by line. What was sampled stays in it as it is, and is never tokenised again."""
    console = Console(args)
    conversation, turns, parts = console.conversation(), [], []
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
            conversation, turns, parts = console.conversation(), [], []
        elif command in ("/image", "/video"):
            parts.append({command[1:]: rest.strip()})
        elif line.startswith("/"):
            print(HELP)
        elif line:
            turn, parts = user(parts, line), []
            try:
                turns += [turn, reply(console, conversation, turn)]
            except ValueError as error:  # a bad file or a full context must not end the conversation
                print(f"error: {error}")
                conversation = console.conversation(turns)  # as it was
            else:
                print()


def reply(console: Console, conversation: Conversation, turn: dict) -> list[int]:
    """Add a message and the model's answer to it, which is shown; returns the answer's tokens, up to the turn's end."""
    conversation.add(turn)
    prompt = from_ids(conversation.prompt(), conversation.rendered.clips, console.model.config)
    tokens = console.answer(prompt, console.ends(templated=True), show, TurnForm(console.mode))["tokens"]
    end = console.model.tokenizer.special["<|im_end|>"]
    if end in tokens:
        tokens = tokens[: tokens.index(end) + 1]
    elif set(tokens[-1:]) & {*console.model.config.eos_ids}:
        tokens = tokens[:-1]
    conversation.say(tokens)
    return tokens


def show(text: str) -> None:
    """Print at once, without a line end."""
    print(text, end="", flush=True)
