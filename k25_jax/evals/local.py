"""A checkpoint as an answerer: batches through the sampler (K2.5 §4)."""

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from k25_jax.checkpoint.load import BASE, Model, load_model
from k25_jax.checkpoint.store import CheckpointError, complete_steps
from k25_jax.evals.protocol import Answer, Request, digest_of
from k25_jax.sampling.prompt import MediaReader, Prompt, from_messages
from k25_jax.sampling.sample import SampleConfig, Sampler

SPOT = 2**16  # bytes of a file that its fingerprint reads, twice


class Checkpoint:
    """Answers by a model, up to `batch` requests at a time; `load` gives it when it is first asked.

    The rows of a batch share one stream of random numbers: what a sample is depends on its neighbours, too.
    """

    def __init__(self, load: Callable[[], Model], identity: Mapping, batch: int = 32):
        self.identity, self.batch, self._load = dict(identity), batch, load

    def _start(self):
        model = self._load()
        self._tokenizer, self._config = model.tokenizer, model.config
        self._sampler, self._reader = Sampler(model.params, model.config), MediaReader(model.config)
        special = model.tokenizer.special
        self._ends = (special["<|im_end|>"], model.config.eos_id)
        self._think, self._thought = special.get("<think>"), special.get("</think>")

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Answerer`."""
        if not hasattr(self, "_sampler"):
            self._start()
        numbered = enumerate(requests)
        while part := list(itertools.islice(numbered, self.batch)):
            ready: dict[int, list[tuple[int, Request, Prompt]]] = {}  # by the tokens that there is room for
            for number, request in part:
                prompt = from_messages(request.messages, self._tokenizer, self._reader)
                room = min(request.settings.context, self._config.text.max_length) - len(prompt.tokens)
                if room < 1:
                    yield number, Answer("", 0, "overflow")
                else:
                    ready.setdefault(min(room, request.settings.max_tokens), []).append((number, request, prompt))
            for room, rows in ready.items():
                yield from self._generate(rows, room)

    def _generate(self, rows: list[tuple[int, Request, Prompt]], max_tokens: int) -> Iterator[tuple[int, Answer]]:
        settings = rows[0][1].settings
        seed = int(digest_of([request.seed for _, request, _ in rows])[:8], 16) >> 1
        how = SampleConfig(max_tokens, settings.temperature, settings.top_p, seed, self._ends)
        prompts = [prompt for _, _, prompt in rows]
        drawn: list[list[int]] = [[] for _ in rows]
        for step in self._sampler.generate([p.tokens for p in prompts], [p.clips for p in prompts], how):
            for row, token in zip(drawn, step, strict=True):
                if token:
                    row.append(token[0])
        for (number, request, _), tokens in zip(rows, drawn, strict=True):
            ended = tokens[-1] in self._ends
            cut = "length" if max_tokens == request.settings.max_tokens else "overflow"
            yield number, Answer(self._text(tokens), len(tokens), "stop" if ended else cut)

    def _text(self, tokens: list[int]) -> str:
        """What was said after the reasoning; nothing when it did not come to an end."""
        if self._thought in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(self._thought) :]
        elif self._think in tokens:
            tokens = []
        return self._tokenizer.decode(tokens, skip_special=True)


def open_checkpoint(directory: str | pathlib.Path, batch: int = 32) -> Checkpoint:
    """A run of ours, a public checkpoint or "base"; its weights are read when there is something to answer."""
    return Checkpoint(functools.partial(load_model, directory), identity_of(directory), batch)


def identity_of(directory: str | pathlib.Path) -> dict:
    """What tells a checkpoint from others, wherever it lies: the run's step, and a fingerprint of its files."""
    folder = BASE if str(directory) == "base" else pathlib.Path(directory)
    step = max(complete_steps(folder / "checkpoints"), default=None)
    if step is None:
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        if not any(path.is_file() for path in files):
            raise CheckpointError(f"{folder} holds no checkpoint (experiment.json with checkpoints/, or config.json)")
        return {"weights": fingerprint(folder, files)}
    weights = folder / "checkpoints" / str(step)
    files = [*sorted(path for path in weights.rglob("*") if path.is_file()), folder / "experiment.json"]
    return {"step": step, "weights": fingerprint(folder, files)}


def fingerprint(root: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """A hash of names and sizes, and of bytes from the middle and the end of each file: quick, whatever their size."""
    whole = hashlib.sha256()
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        whole.update(f"{path.relative_to(root)} {size}\n".encode())
        with open(path, "rb") as file:
            for start in (max(0, size // 2 - SPOT // 2), max(0, size - SPOT)):
                file.seek(start)
                whole.update(file.read(SPOT))
    return whole.hexdigest()[:16]
