"""One trace as one HTML page: turns, calls, observations, pictures, and every token that was drawn, in colour (K2.5 §3.5).

The page needs no network and no script: what the colours say is chosen by radio buttons that its style reads. Everything that
a model, a tool or a file says is shown as text, its control characters and turns of direction as what they are called.
"""

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from k25_jax.agents.trace import Segment, Trace, TraceError, load
from k25_jax.agents.transcript import Turn, check_vocabulary, experiment_of, tokenizer_of, turns
from k25_jax.report.html import KeyFigures, Table, escape, page, picture, render, replace
from k25_jax.rl.advantages import composed
from k25_jax.runtime.paths import AnyPath, to_path
from k25_jax.text.tokenizer import StreamDecoder, Tokenizer
from k25_jax.text.tool_calls import BadCall, Call, parse
from k25_jax.vision.image import ImageError, unpatchify
from k25_jax.vision.patchpack import Clip

LINE = "\n"
SHADES = 10  # steps of a colour
FAINTEST = 5.0  # nats of surprise that have the strongest shade
COLOURS = {
    "logprob": "log-probability",
    "advantage": "advantage",
    "version": "version of the weights",
    "none": "nothing",
}
HIDDEN = frozenset("Cc Cf Co Cs Cn Zl Zp".split())  # categories of characters that show nothing, or turn what is shown
UNPRINTED = {**{chr(code): chr(0x2400 + code) for code in range(32)}, "\x7f": "\u2421", "\n": "\n", "\t": "\t"}


def write_trace_page(source: str, output: str | AnyPath, vocabulary: str | None = None) -> AnyPath:
    """Write the page of FILE[:ID or index] (the first trace where neither is given); raises TraceError."""
    file, key = locate(source)
    traces = load(file.parent, file.name.removesuffix(".jsonl"))
    trace = choose(traces, key, file)
    tokenizer = tokenizer_of(file, vocabulary)
    check_vocabulary(trace.segments, tokenizer, file)
    group = [one for one in traces if one.valid and (one.task, one.group) == (trace.task, trace.group)]
    experiment = experiment_of(file)
    weights = experiment.rl.rewards if experiment and experiment.stage == "rl" else evenly(group)
    return replace(output, trace_page(trace, tokenizer, group, weights).encode())


def locate(source: str) -> tuple[AnyPath, str]:
    """The file and what follows it: names of traces may have colons, too; raises TraceError."""
    parts = source.split(":")
    for count in range(len(parts), 0, -1):
        if (name := ":".join(parts[:count])) and (file := to_path(name, "--trace")).is_file():
            return file, ":".join(parts[count:])
    raise TraceError(f"--trace={source}: there is no such file; give FILE.jsonl, FILE.jsonl:ID or FILE.jsonl:INDEX")


def choose(traces: Sequence[Trace], key: str, file: AnyPath) -> Trace:
    """The trace with this id, else at this index, which may count from the end; raises TraceError."""
    for trace in traces:
        if trace.id == key:
            return trace
    try:
        return traces[int(key or 0)]
    except (ValueError, IndexError):
        shown = ", ".join(trace.id for trace in traces[:5]) or "none"
        raise TraceError(f"{file}: no trace {key!r}; of its {len(traces)} the first are {shown}") from None


def evenly(traces: Sequence[Trace]) -> tuple[tuple[str, float], ...]:
    """The mean of the rewards, in the place of what a run composes of them."""
    names = sorted({name for trace in traces for name in trace.rewards})
    return tuple((name, 1 / len(names)) for name in names)


def advantage(trace: Trace, group: Sequence[Trace], weights: Sequence[tuple[str, float]]) -> float | None:
    """Its reward less the mean of its group's, before Toggle; None where it has none, or is alone."""
    scored = [composed(one.rewards, weights) for one in group if one.rewards]
    if not trace.rewards or not trace.valid or len(scored) < 2:
        return None
    return composed(trace.rewards, weights) - sum(scored) / len(scored)


# ------------------------------------------------------------------------------------------------------------- the page
def trace_page(
    trace: Trace, tokenizer: Tokenizer, group: Sequence[Trace] = (), weights: Sequence[tuple[str, float]] = ()
) -> str:
    """The page; `group` are the valid traces of its problem, itself among them, `weights` those of rewards by name."""
    known = advantage(trace, group, weights)
    buttons = "".join(
        f'<input type="radio" name="colour" id="by-{name}"{" checked" if name == "logprob" else ""}>'
        f'<label for="by-{name}">{words}</label>'
        for name, words in COLOURS.items()
        if name != "advantage" or known is not None
    )
    body = [
        _head(trace, known, len(group)),
        "<h2>What was said</h2>",
        f'<span class="by">Colour of tokens:</span>{buttons}',
    ]
    body.append(_legend(known))
    tops = [number for number, segment in enumerate(trace.segments) if segment.parent is None]
    segments = "".join(_segment(trace, number, tokenizer, known) for number in tops)
    body.append(f'<div class="trace">{segments}</div>')
    return page(f"Trace {visible(trace.id)}", "\n".join(body), _STYLE)


def _head(trace: Trace, known: float | None, samples: int) -> str:
    """Key figures, rewards, and what failed."""
    said = [segment.sampled for segment in trace.segments]
    figures = {
        "ending": trace.ending,
        "task": visible(trace.task),
        "sampled tokens": f"{sum(int(s.sum()) for s in said):,d}",
    }
    figures |= {f"reward: {visible(name)}": f"{value:.3g}" for name, value in trace.rewards.items()}
    if known is not None:
        figures |= {f"advantage in its group of {samples}": f"{known:+.3f}"}
    figures |= {"versions of the weights": _versions(trace.segments), "seed": str(trace.seed)}
    parts = [render(KeyFigures("", figures))]
    if trace.problem:
        parts.append(f'<p class="problem">{escape(visible(trace.problem))}</p>')
    if len(trace.segments) > 1:
        parts += ["<h2>Segments</h2>", render(_table(trace))]
    return "\n".join(parts)


def _table(trace: Trace) -> Table:
    columns = (
        "segment",
        "agent",
        "started by",
        "in its turn",
        "tokens",
        "sampled",
        "mean log-prob",
        "trained on",
        "reason",
    )
    rows = []
    for number, segment in enumerate(trace.segments):
        mean = float(segment.logprobs[segment.sampled].mean()) if segment.length else math.nan
        start = ("-", "-") if segment.parent is None else (str(segment.parent), str(segment.stage))
        end = ("yes" if segment.trainable else "no", visible(segment.reason))
        rows.append((number, visible(segment.agent), *start, len(segment.tokens), segment.length, mean, *end))
    return Table("Segments", columns, rows)


def _versions(segments: Iterable[Segment]) -> str:
    drawn = [segment.versions[segment.sampled] for segment in segments]
    found = np.unique(np.concatenate([*drawn, np.zeros(0, np.int32)]))
    return "-" if not len(found) else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _legend(known: float | None) -> str:
    """What the colours mean, one line for each."""
    shades = "".join(f'<span class="t l{shade}">&nbsp;</span>' for shade in range(SHADES))
    lines = [f'<p class="legend logprob">0 {shades} −{FAINTEST:g} nats or less, of the token that was drawn</p>']
    if known is not None:
        words = "the same for all tokens that are trained on: the reward less the mean of the group"
        lines.append(f'<p class="legend advantage">{known:+.3f}, {words}</p>')
    lines.append('<p class="legend version">shaded and not, in turn, wherever the weights changed</p>')
    return f'<div class="legends">{"".join(lines)}</div>'


# -------------------------------------------------------------------------------------------------------- its segments
def _segment(trace: Trace, number: int, tokenizer: Tokenizer, known: float | None) -> str:
    """One agent's context, with those that it started behind the turn in which it did."""
    segment, below = trace.segments[number], {}
    for child, other in enumerate(trace.segments):
        if other.parent == number:
            below.setdefault(other.stage, []).append(child)
    view, parts, spoken = _View(trace, segment, tokenizer), [], -1
    for turn in turns(segment, tokenizer):
        parts.append(view.turn(turn))
        if turn.kind == "assistant":
            spoken += 1
            parts += [_segment(trace, child, tokenizer, known) for child in below.pop(spoken, ())]
    parts += [_segment(trace, child, tokenizer, known) for children in below.values() for child in children]
    shade = 0 if known is None or not segment.trainable else math.ceil(min(1.0, abs(known)) * (SHADES - 1))
    sign = "" if not shade else " up" if known > 0 else " down"
    words = f"{segment.agent}: {segment.length} of {len(segment.tokens)} tokens sampled"
    words += f", version {_versions([segment])}" + ("" if segment.trainable else ", not trained on")
    words += f", ended by {segment.reason}" if segment.reason else ""
    head = f"<summary>{escape(visible(words))}</summary>"
    return f'<details open class="segment{sign} a{shade}">{head}{"".join(parts)}</details>'


class _View:
    """Shows the turns of a segment, in order."""

    def __init__(self, trace: Trace, segment: Segment, tokenizer: Tokenizer):
        self._segment, self._tokenizer = segment, tokenizer
        self._clips = iter([trace.clips[key] for key in segment.clips])
        self._names = {id_: name for name, id_ in tokenizer.special.items()}
        at = np.flatnonzero(segment.sampled)
        self._changes = np.zeros(len(segment.tokens), int)  # how often the weights had changed when a token was drawn
        self._changes[at[1:]] = np.cumsum(np.diff(segment.versions[at]) != 0)

    def turn(self, turn: Turn) -> str:
        """Who speaks, what is said token by token, and its calls once more in lines that can be read."""
        sampled = self._segment.sampled[turn.body : turn.end]
        who, calls = visible(turn.name or "outside of any turn"), ""
        if sampled.any():
            logprobs = self._segment.logprobs[turn.body : turn.end][sampled]
            who += f" · {int(sampled.sum())} tokens, log-prob {float(logprobs.sum()):.2f}"
        if turn.kind == "assistant":
            tokens = self._segment.tokens[turn.body : turn.end].tolist()
            calls = "".join(map(_call, parse(tokens, self._tokenizer, turn.mode).calls))
        said = f'<div class="said">{"".join(self._tokens(turn))}</div>'
        return f'<div class="turn {turn.kind or "outside"}"><h3>{escape(who)}</h3>{said}{calls}</div>'

    def _tokens(self, turn: Turn) -> Iterator[str]:
        """Given tokens as text; drawn ones each in a span, or several where only together they are a character."""
        tokens, sampled = self._segment.tokens.tolist(), self._segment.sampled
        begin, end = (self._tokenizer.special[f"<|media_{name}|>"] for name in ("begin", "end"))
        decoder, held, shown_to = StreamDecoder(self._tokenizer), [], turn.body
        for at in range(turn.body, turn.end):
            if at < shown_to:
                continue
            is_mark = tokens[at] in self._names
            if held and (is_mark or sampled[at] != sampled[held[0]]):
                yield self._span(decoder.flush(), held)
                decoder, held = StreamDecoder(self._tokenizer), []
            if tokens[at] == begin and not sampled[at] and (clip := next(self._clips, None)) is not None:
                yield _pictures(clip)
                shown_to = (tokens.index(end, at) if end in tokens[at : turn.end] else turn.end - 1) + 1
            elif is_mark:
                yield self._span(self._names[tokens[at]], [at], " mark")
            else:
                held.append(at)
                if text := decoder.push(tokens[at]):
                    yield self._span(text, held)
                    held = []
        if held:
            yield self._span(decoder.flush(), held)

    def _span(self, text: str, places: Sequence[int], more: str = "") -> str:
        """The text of these tokens: their least likely one gives the shade."""
        segment, shown = self._segment, escape(visible(text))
        if not segment.sampled[places[0]]:
            return f'<span class="{more.strip()}">{shown}</span>' if more else shown
        least = max(-FAINTEST, float(segment.logprobs[list(places)].min()))
        shade = max(0, round(-least / FAINTEST * (SHADES - 1)))
        odd = " odd" if self._changes[places[-1]] % 2 else ""
        ids, logprobs = ([str(array[at]) for at in places[:8]] for array in (segment.tokens, segment.logprobs.round(3)))
        words = f"token {' '.join(ids)}: {' '.join(logprobs)}, version {segment.versions[places[-1]]}"
        return f'<span class="t l{shade}{odd}{more}" title="{words}">{shown.replace(LINE, "↵" + LINE)}</span>'


def _call(call: Call | BadCall) -> str:
    if isinstance(call, BadCall):
        return f'<div class="call problem">✗ {escape(visible(call.error))}</div>'
    parts = [f"<b>{escape(visible(call.id))}</b>"]
    for name, value in call.arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"<i>{escape(visible(name))}</i><pre>{escape(visible(text))}</pre>")
    return f'<div class="call">{"".join(parts)}</div>'


def _pictures(clip: Clip) -> str:
    """The frames of a clip, or why there are none."""
    try:
        frames = unpatchify(clip)
    except ImageError as problem:
        return f'<span class="mark">{escape(visible(str(problem)))}</span>'
    return f'<span class="clip">{"".join(picture(frame, visible(clip.source) or "picture") for frame in frames)}</span>'


def visible(text: str) -> str:
    """Text in which nothing is hidden and nothing turns the direction of what follows; line ends and tabs stay."""
    return "".join(
        UNPRINTED[one] if one in UNPRINTED else f"⟨U+{ord(one):04X}⟩" if unicodedata.category(one) in HIDDEN else one
        for one in text
    )


def _rules() -> str:
    """The shades of each choice."""
    rules: list[str] = []
    for shade in range(1, SHADES):
        strength = f"{0.75 * shade / (SHADES - 1):.3f}"
        places = f"#by-logprob:checked ~ .trace .l{shade}, .legend .l{shade}"
        rules.append(f"{places} {{ background: rgb(213 94 0 / {strength}); }}")
        for sign, colour in (("up", "0 114 178"), ("down", "213 94 0")):
            within = f"#by-advantage:checked ~ .trace .{sign}.a{shade} > .turn > .said .t"
            rules.append(f"{within} {{ background: rgb({colour} / {strength}); }}")
    rules += [f"#by-{name}:checked + label {{ font-weight: 650; }}" for name in COLOURS]
    rules += [f"#by-{name}:checked ~ .legends .{name} {{ display: block; }}" for name in COLOURS]
    return "\n".join(rules)


_STYLE = """
main { max-width: 76rem; }
h1 { overflow-wrap: anywhere; }
h3 { font-size: .85rem; margin: 0 0 .3rem; color: var(--muted); font-weight: 600; overflow-wrap: anywhere; }
.by { margin-right: .6rem; }
label { margin: 0 1.2rem 0 .3rem; cursor: pointer; }
.legends { min-height: 2.2rem; margin: .4rem 0 .8rem; color: var(--muted); font-size: .9rem; }
.legend { display: none; margin: 0; }
.legend .t { display: inline-block; width: 1.1rem; }
.segment { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; margin: .6rem 0; }
.segment .segment { margin-left: 1.5rem; }
.segment > summary { font-weight: 650; overflow-wrap: anywhere; }
.turn { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .9rem 0; }
.turn.assistant { border-color: var(--right); }
.said, .call pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; max-height: 40rem; tab-size: 4;
  font: .85rem/1.6 ui-monospace, monospace; unicode-bidi: isolate; }
.mark { color: var(--muted); border: 1px dotted var(--line); border-radius: .2rem; font-size: .75rem; }
.t.mark { color: var(--ink); }
.clip { display: inline-flex; flex-wrap: wrap; gap: .4rem; margin: .2rem .4rem .2rem 0; vertical-align: middle; }
.clip img { max-width: 100%; min-width: 5rem; max-height: 20rem; border: 1px solid var(--line); }
.clip img.pixels { image-rendering: pixelated; }
.call { margin: .4rem 0 0; font-size: .85rem; overflow-wrap: anywhere; }
.call i { color: var(--muted); margin-left: .6rem; }
.call pre { margin: .2rem 0; }
.problem { color: var(--wrong); }
#by-version:checked ~ .trace .odd { background: rgb(0 158 115 / .35); }
""" + _rules()
