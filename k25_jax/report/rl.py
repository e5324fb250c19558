"""What the report of a run has more where its stage is rl: curves, beginning and end, samples before and after (K2.5 §3.5).

The samples after are of the last committed batch of the run's ledger (rl/ledger.py), those before of the same problems, by
the start model or in an earlier batch: always the first valid trace of a group, so that nobody has chosen them.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from k25_jax.agents.trace import Trace
from k25_jax.agents.transcript import transcript
from k25_jax.config import Experiment
from k25_jax.report import html
from k25_jax.report.trace import visible
from k25_jax.rl.advantages import composed
from k25_jax.rl.ledger import Ledger
from k25_jax.runtime.paths import AnyPath
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer
from k25_jax.vision.image import ImageError, unpatchify

FOLDER = "rl"  # of the ledger, in that of the run
SHOWN = 8  # problems whose samples are shown
MOST = 300  # characters of a question or an answer on its card
SHARE = 10  # the beginning and the end are a tenth of the updates each
CURVES = (  # as report.run.CURVES
    (("reward", "reward/"), "Reward", "mean of the valid samples"),
    (("pass_rate", "pass_rate/"), "Pass rate", "share of correct answers"),
    (("length", "length/"), "Length", "sampled tokens of an answer"),
    (("entropy",), "Entropy", "nats per token"),
    (("clipped_low", "clipped_high"), "Tokens outside the bounds of the ratio", "share of sampled tokens"),
    (("mismatch", "engine_mismatch"), "Log-ratio of the learner to the sampler", "mean size (nats per token)"),
    (("skipped_updates", "dropped_groups"), "Updates skipped and groups dropped so far", "number"),
    (("cut", "infrastructure"), "Episodes that were cut, or failed through no fault of the model's", "share"),
    (("sampling_seconds", "learning_seconds", "waiting_seconds"), "Where the time goes", "seconds"),
)
CHANGES = ("reward", "pass_rate", "length", "entropy", "cut")  # in the table, with those by task below them


def rl_sections(directory: AnyPath, experiment: Experiment, metrics: Sequence[Mapping]) -> list[html.Section]:
    """What is there of the beginning and the end of a run."""
    table = changes(metrics)
    return [*([table] if table.rows else []), *sample_sections(directory, experiment)]


def changes(metrics: Sequence[Mapping]) -> html.Table:
    """The means of the first and the last updates."""
    names = dict.fromkeys(name for row in metrics for name in row if name.split("/")[0] in CHANGES)
    rows = []
    for name in sorted(names, key=lambda name: (CHANGES.index(name.split("/")[0]), name)):
        values = [float(row[name]) for row in metrics if name in row and np.isfinite(row[name])]
        if values:
            some = max(1, len(values) // SHARE)
            first, last = float(np.mean(values[:some])), float(np.mean(values[-some:]))
            rows.append((name, first, last, last - first, len(values)))
    caption = "Means over the first and the last tenth of the logged updates, each on the problems that it had."
    return html.Table("Beginning and end", ("metric", "beginning", "end", "change", "updates"), rows, caption)


def sample_sections(directory: AnyPath, experiment: Experiment) -> list[html.Section]:
    """Samples of the last committed batch, and the earliest of the same problems; none where nothing is committed."""
    ledger = Ledger(directory / FOLDER)
    numbers = committed(ledger)
    if not numbers:
        return []
    after = _firsts(ledger, ledger.batch(numbers[-1])["groups"])
    before = earliest(ledger, after)
    shared = [group for group in after if group in before]
    words = "The same problems." if shared else "The run has no earlier sample of the same problems: these are others."
    if not shared:
        before = _firsts(ledger, ledger.batch(numbers[0])["groups"]) if len(numbers) > 1 else {}
    tokenizer, weights = load_tokenizer(experiment.data.tokenizer), experiment.rl.rewards
    sections = []
    for title, traces in (("before", before), ("after", after)):
        if not traces:
            continue
        shown = [traces[group] for group in shared or traces][:SHOWN]
        versions = sorted({int(s.versions.max()) for one in shown for s in one.segments if s.length})
        caption = f"The first sample of each problem, after {' or '.join(map(str, versions)) or 'no'} updates. {words}"
        cards = [sample_of(trace, tokenizer, weights) for trace in shown]
        sections.append(html.Samples(f"Samples {title}", cards, caption))
    return sections


def committed(ledger: Ledger) -> list[int]:
    """The numbers of the batches that are there."""
    folder = ledger.folder / "batches"
    return sorted(int(file.stem) for file in folder.glob("*.json")) if folder.is_dir() else []


def earliest(ledger: Ledger, wanted: Mapping[str, Trace]) -> dict[str, Trace]:
    """The first valid sample of each of these problems: of the start model, else of a batch before the last one."""
    groups = sorted(file.stem for file in (ledger.folder / "groups").glob("start-*.jsonl"))
    found = _firsts(ledger, groups)
    for number in committed(ledger)[:-1]:
        if wanted.keys() <= found.keys():
            break
        found = _firsts(ledger, ledger.batch(number)["groups"]) | found
    return {group: trace for group, trace in found.items() if group in wanted}


def _firsts(ledger: Ledger, names: Iterable[str]) -> dict[str, Trace]:
    """The first valid trace of each problem of these groups."""
    found: dict[str, Trace] = {}
    for trace in (trace for name in names for trace in ledger.group(name) or () if trace.valid):
        found.setdefault(trace.group, trace)
    return found


def sample_of(trace: Trace, tokenizer: Tokenizer, weights: Sequence[tuple[str, float]]) -> html.Sample:
    """A card: what was asked, the last thing that was said, its reward, the first picture."""
    said = transcript(trace.segments[0], tokenizer) if trace.segments else []
    asked = "\n".join(text for kind, text in said if kind == "user")
    spoken = [text for kind, text in said if kind == "assistant"]
    answer = f"{_short(spoken[-1] if spoken else '')}\n{trace.length} tokens, {trace.ending}"
    image = None
    for key in trace.segments[0].clips[:1] if trace.segments else ():
        try:
            image = unpatchify(trace.clips[key])[0]
        except ImageError:  # patches that are no pixels
            image = None
    return html.Sample(_short(asked), answer, "", composed(trace.rewards, weights), image)


def _short(text: str) -> str:
    """As much as a card takes, with nothing hidden in it."""
    text = visible(text.strip())
    return text if len(text) <= MOST else text[: MOST - 1] + "…"
