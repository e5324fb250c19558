"""The turns of a segment, found in its tokens by the marks that the chat template wrote (K2.5 §3.5, §4.4).

A turn goes on to its <|im_end|>, whatever other marks a model writes in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from k25_jax.agents.trace import Segment, TraceError
from k25_jax.checkpoint.folders import read_experiment
from k25_jax.config import Experiment
from k25_jax.runtime.paths import AnyPath
from k25_jax.text.chat import THINK
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer

KINDS = ("system", "user", "assistant")
MIDDLE, END = "<|im_middle|>", "<|im_end|>"


@dataclass(frozen=True)
class Turn:
    """Tokens [start, end) of a segment, of which those from `body` on are what is said, with its end if it has one.

    `kind` is one of KINDS, or "" for tokens that stand outside of any turn; `name` is who speaks.
    """

    kind: str
    name: str
    start: int
    body: int
    end: int
    mode: str = ""  # of an assistant's turn: how it was opened, one of text.chat.MODES


def turns(segment: Segment, tokenizer: Tokenizer) -> list[Turn]:
    """All turns, in order; every token is in one of them."""
    kinds = {tokenizer.special[f"<|im_{kind}|>"]: kind for kind in KINDS}
    tokens, found, at = segment.tokens.tolist(), [], 0
    while at < len(tokens):
        if tokens[at] in kinds:
            end = min(_first(tokens, tokenizer.special[END], at) + 1, len(tokens))
            found.append(_turn(kinds[tokens[at]], segment, tokens, at, end, tokenizer))
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] in kinds), len(tokens))
            found.append(Turn("", "", at, at, end))
        at = end
    return found


def _turn(kind: str, segment: Segment, tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> Turn:
    middle = _first(tokens, tokenizer.special[MIDDLE], start)
    middle, mode = min(middle, end), ""
    body, name = min(middle + 1, end), tokenizer.decode(tokens[start + 1 : middle])
    if kind == "assistant":
        modes = ["thinking", "instant"]
        mode = "plain"
        for opening in THINK:
            if body < end and tokens[body] == tokenizer.special.get(opening) and not segment.sampled[body]:
                body, mode = body + 1, modes.pop(0)
            else:
                break
    return Turn(kind, name, start, body, end, mode)


def _first(tokens: Sequence[int], wanted: int, start: int) -> int:
    """Where a token is next; the length where it is not."""
    try:
        return tokens.index(wanted, start)
    except ValueError:
        return len(tokens)


def sampled_turns(segment: Segment, tokenizer: Tokenizer) -> list[list[int]]:
    """What the model said in each of its turns, as `scoring.form` takes it."""
    spans = [(turn.body, turn.end) for turn in turns(segment, tokenizer) if turn.kind == "assistant"]
    said = [segment.tokens[a:b][segment.sampled[a:b]].tolist() for a, b in spans]
    return [tokens for tokens in said if tokens]


def transcript(segment: Segment, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(kind of the turn, what is said in it without marks) of each turn; a picture is [image], a video [video]."""
    begin, content, end = (tokenizer.special[f"<|media_{name}|>"] for name in ("begin", "content", "end"))
    said = []
    for turn in turns(segment, tokenizer):
        tokens, texts, at = segment.tokens[turn.body : turn.end].tolist(), [], 0
        while at < len(tokens):
            stop = _first(tokens, begin, at)
            texts.append(tokenizer.decode(tokens[at:stop], skip_special=True))
            if stop < len(tokens):
                texts.append(f"[{tokenizer.decode(tokens[stop + 1 : _first(tokens, content, stop)])}]")
            at = _first(tokens, end, stop) + 1
        said.append((turn.kind, "".join(texts)))
    return said


def experiment_of(file: AnyPath) -> Experiment | None:
    """The configuration of the run that a file lies in, if it lies in one."""
    run = next((folder for folder in file.parents if (folder / "experiment.json").is_file()), None)
    return read_experiment(run) if run is not None else None


def tokenizer_of(file: AnyPath, given: str | None = None) -> Tokenizer:
    """The vocabulary of traces: the folder that was given ("": bytes), else that of the run they lie in, else bytes."""
    if given is None and (experiment := experiment_of(file)) is not None:
        given = experiment.data.tokenizer
    return load_tokenizer(given or "")


def check_vocabulary(segments: Sequence[Segment], tokenizer: Tokenizer, where: str | PurePath) -> None:
    """Raise TraceError where tokens are not of this vocabulary."""
    largest = max((int(segment.tokens.max(initial=0)) for segment in segments), default=0)
    if largest >= tokenizer.vocab_size:
        raise TraceError(
            f"{where}: token {largest} is not in {tokenizer.special.source} of {tokenizer.vocab_size}: give the model's "
            "own with --tokenizer=FOLDER"
        )
