"""A checkpoint as an answerer: many requests at once in the sampling engine (K2.5 §4)."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from k25_jax.checkpoint.folders import BASE, COMMITTED, CheckpointError, complete_steps
from k25_jax.checkpoint.load import Model, load_model
from k25_jax.config import ConfigError
from k25_jax.evals.protocol import Answer, Request
from k25_jax.runtime.paths import AnyPath, names, read_range, size_and_time, to_path, walk
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.sampling.requests import Completion, fitting
from k25_jax.sampling.requests import Request as Sampled
from k25_jax.sampling.sample import SampleConfig
from k25_jax.text.tokenizer import Tokenizer

SPOT = 2**16  # bytes of a file that its fingerprint reads, twice
SAMPLING = "engine"  # how answers are drawn; part of the identity: change it when the same seed gives another answer


class Checkpoint:
    """Answers by a model, up to `batch` requests at once; `load` gives it when it is first asked.

    A request draws from its own seed: its answer does not depend on the others, but for the engine's rounding.
    """

    def __init__(self, load: Callable[[], Model], identity: Mapping, batch: int = 32):
        if batch < 1:
            raise ConfigError(f"batch={batch} requests at once: at least 1")
        self.identity, self.batch, self._load = {**identity, "sampling": SAMPLING}, batch, load
        self._engine: Engine | None = None

    def open(self) -> tuple[Engine, Tokenizer]:
        """The model, ready to answer; read when this is first asked for."""
        if self._engine is None:
            model = self._load()
            self._tokenizer, self._reader = model.tokenizer, MediaReader(model.config)
            special = model.tokenizer.special
            self._ends = (special["<|im_end|>"], *model.config.eos_ids)
            self._think, self._thought = special.get("<think>"), special.get("</think>")
            self._engine = Engine(model.params, model.config, fitting(model.config, self.batch))
        return self._engine, self._tokenizer

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Answerer`."""
        engine, _ = self.open()
        numbered = enumerate(requests)
        under_way: dict[int, tuple[int, Request, Completion]] = {}  # by the engine's number
        try:
            while True:
                while len(under_way) < self.batch and (item := next(numbered, None)):
                    asked = self._asked(item[1])
                    if asked is None:
                        yield item[0], Answer("", 0, "overflow")
                    else:
                        under_way[engine.submit(asked)] = (*item, Completion())
                if not under_way:
                    return
                for event in engine.step():
                    number, request, completion = under_way[event.request]
                    completion.add(event)
                    if completion.reason:
                        del under_way[event.request]
                        yield number, self._answer(request, completion)
        finally:
            for number in under_way:
                engine.abort(number)
            while engine.busy:
                engine.step()

    def _asked(self, request: Request) -> Sampled | None:
        """The request as the engine takes it; None when its prompt leaves no room for an answer."""
        settings, prompt = request.settings, from_messages(request.messages, self._tokenizer, self._reader)
        room = min(settings.context, self._engine.max_length) - len(prompt.tokens)
        if room < 1:
            return None
        tokens = min(room, settings.max_tokens)
        how = SampleConfig(tokens, settings.temperature, settings.top_p, request.seed, self._ends)
        return Sampled(prompt.tokens, prompt.clips, how)

    def _answer(self, request: Request, completion: Completion) -> Answer:
        tokens, reason = completion.tokens, completion.reason
        if reason == "length" and len(tokens) < request.settings.max_tokens:
            reason = "overflow"
        return Answer(self._text(tokens), len(tokens), reason, error=completion.error)

    def _text(self, tokens: list[int]) -> str:
        """What was said after the reasoning; nothing when it did not come to an end."""
        if self._thought in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(self._thought) :]
        elif self._think in tokens:
            tokens = []
        return self._tokenizer.decode(tokens, skip_special=True)


def open_checkpoint(directory: str | AnyPath, batch: int = 32) -> Checkpoint:
    """A run of ours, a public checkpoint or "base"; its weights are read when there is something to answer."""
    return Checkpoint(functools.partial(load_model, directory), identity_of(directory), batch)


def identity_of(directory: str | AnyPath) -> dict:
    """What tells a checkpoint from others, wherever it lies: the run's step, and a fingerprint of its files."""
    folder = BASE if str(directory) == "base" else to_path(directory)
    step = max(complete_steps(folder / "checkpoints"), default=None)
    if step is None:
        tensors = [folder / name for name in names(folder) if name.endswith(".safetensors")] if folder.is_dir() else []
        files = [folder / "config.json", folder / "generation_config.json", *tensors]
        if not any(path.is_file() for path in files):
            raise CheckpointError(f"{folder} holds no checkpoint (experiment.json with checkpoints/, or config.json)")
        return {"weights": fingerprint(folder, files)}
    weights = folder / "checkpoints" / str(step)
    files = [here / name for here, _, found in walk(weights) for name in found if name != COMMITTED]
    files = [*sorted(files), folder / "experiment.json"]
    return {"step": step, "weights": fingerprint(folder, files)}


def fingerprint(root: AnyPath, files: Iterable[AnyPath]) -> str:
    """A hash of names and sizes, and of bytes from the middle and the end of each file: quick, whatever their size."""
    whole = hashlib.sha256()
    for path in files:
        if not path.is_file():
            continue
        size = size_and_time(path)[0]
        whole.update(f"{path.relative_to(root)} {size}\n".encode())
        for start in (max(0, size // 2 - SPOT // 2), max(0, size - SPOT)):
            whole.update(read_range(path, SPOT, start))
    return whole.hexdigest()[:16]
