"""Which source gives the next document: shares of tokens by schedule, epochs and budgets (K2.5 §3.3).

A share counts all tokens of a document, media and text, and those that batches hand out, not those that were read. The
account starts anew whenever a target changes, so that nothing is caught up for the time before. A source that has given
all of its epochs leaves its share to the others of its modality, and a modality that has nothing left to the other one.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.config import DataConfig, Schedule
from k25_jax.data.records import DataError, Source

MODALITIES = ("text", "vision")
LOOKED_AT = 32  # records of a source, for its modality
MEDIA = ("image", "video")  # what the fields of media begin with


def value_at(schedule: Schedule, progress: float) -> float:
    """The value of the last step that has begun; progress is batches handed out / train.steps."""
    if not isinstance(schedule, tuple):
        return schedule
    return [value for begin, value in schedule if begin <= progress][-1]


def modality_of(source: Source, declared: str) -> str:
    """What `declared` says, or else the task; for "auto" vision when one of some evenly spaced records has media."""
    if declared != "auto":
        return declared
    if source.modality:
        return source.modality
    looked_at = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int).tolist()
    return "vision" if any(_has_media(source[index].data) for index in looked_at) else "text"


def _has_media(value) -> bool:
    if isinstance(value, Mapping):
        named = (str(key).startswith(MEDIA) and inner is not None for key, inner in value.items())
        return any(named) or any(map(_has_media, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_media, value))


def check_mixture(data: DataConfig, modalities: Sequence[str]):
    """Raise DataError where a share or a budget is of a modality that has no source."""
    share = data.vision_share
    values = [value for _, value in share] if isinstance(share, tuple) else [] if share is None else [share]
    wanted = {
        "vision": data.vision_tokens > 0 or any(values),
        "text": data.text_tokens > 0 or min(values, default=1) < 1,
    }
    for modality in MODALITIES:
        if wanted[modality] and modality not in modalities:
            raise DataError(
                f"data.vision_share={share}, data.text_tokens={data.text_tokens}, data.vision_tokens="
                f"{data.vision_tokens}, but data.sources has no source of {modality}; add one, or set its modality"
            )


class Mixture:
    """The account of one lane: what each source should give of the tokens, and what it gave."""

    def __init__(self, data: DataConfig, modalities: Sequence[str], steps: int, lane: int = 0):
        """`data` is that of the whole run; `lane` takes its part of the budgets."""
        self._data, self._steps, self.modalities = data, steps, list(modalities)
        budgets = (data.text_tokens, data.vision_tokens)
        self._budgets = {
            modality: total // data.lanes + (lane < total % data.lanes) if total else None
            for modality, total in zip(MODALITIES, budgets, strict=True)
        }
        self.gone = [False] * len(modalities)  # sources that give no more
        self.spent = {modality: budget == 0 for modality, budget in self._budgets.items()}
        self.handed = [0] * len(modalities)  # tokens of each source since its target changed
        self.total = [0] * len(modalities)  # tokens of each source in all
        self.waiting = [0] * len(modalities)  # tokens that were read and wait
        self.targets: list[float] = []

    def begin(self, batch: int):
        """The targets for batch number `batch`, from 0; where they change the account starts anew."""
        targets = self._targets_at(batch / self._steps)
        if targets != self.targets:
            self.targets, self.handed = targets, [0] * len(targets)

    def _targets_at(self, progress: float) -> list[float]:
        weights = [value_at(source.weight, progress) for source in self._data.sources]
        share = self._data.vision_share
        if share is None:
            vision = sum(weights[i] for i, modality in enumerate(self.modalities) if modality == "vision")
            share = vision / sum(weights) if sum(weights) else 0.0
        share = value_at(share, progress)
        shares = {"text": 1.0 - share, "vision": share}
        open_weights = [
            0.0 if self.gone[i] or self.spent[modality] else weights[i] for i, modality in enumerate(self.modalities)
        ]
        sums = {
            modality: sum(w for w, own in zip(open_weights, self.modalities, strict=True) if own == modality)
            for modality in MODALITIES
        }
        due = {modality: shares[modality] if sums[modality] else 0.0 for modality in MODALITIES}
        whole = sum(due.values()) or 1.0
        return [
            due[modality] / whole * weight / sums[modality] if weight else 0.0
            for weight, modality in zip(open_weights, self.modalities, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------ questions
    def due(self, modality: str) -> float:
        """The target of a modality; 0 when it has nothing to give."""
        return sum(t for t, own in zip(self.targets, self.modalities, strict=True) if own == modality)

    def next_source(self, modality: str) -> int | None:
        """The source of this modality that lacks most, counting what waits; None when none has anything to give."""
        share = self.due(modality)
        if not share:
            return None
        own = [i for i, other in enumerate(self.modalities) if other == modality and self.targets[i]]
        given = {i: self.handed[i] + self.waiting[i] for i in own}
        return max(own, key=lambda i: (self.targets[i] / share * sum(given.values()) - given[i], -i))

    def goal(self, modality: str, tokens: int) -> float:
        """What this modality lacks once `tokens` more are handed out."""
        given = sum(h for h, own in zip(self.handed, self.modalities, strict=True) if own == modality)
        return self.due(modality) * (sum(self.handed) + tokens) - given

    def left(self, modality: str) -> float:
        """Tokens of the budget that were not handed out yet."""
        budget = self._budgets[modality]
        return np.inf if budget is None else budget - self.tokens(modality)

    def tokens(self, modality: str) -> int:
        """Tokens of this modality that were handed out in all."""
        return sum(t for t, own in zip(self.total, self.modalities, strict=True) if own == modality)

    # --------------------------------------------------------------------------------------------------------- entries
    def hand_out(self, source: int, tokens: int):
        """Note that a batch holds so many tokens of a source."""
        self.handed[source] += tokens
        self.total[source] += tokens

    def get_state(self) -> dict:
        """JSON; what waits is not in it."""
        return {
            "handed": list(self.handed),
            "total": list(self.total),
            "targets": list(self.targets),
            "gone": list(self.gone),
            "spent": dict(self.spent),
        }

    def set_state(self, state: dict):
        """Go on from `state`, with nothing waiting."""
        self.handed, self.total, self.targets = list(state["handed"]), list(state["total"]), list(state["targets"])
        self.gone, self.spent = list(state["gone"]), dict(state["spent"])
        self.waiting = [0] * len(self.modalities)


def realised(lanes: Sequence[dict], data: DataConfig) -> dict[str, float]:
    """Of the states of all lanes: shares of tokens since the last change of a target, epochs, tokens in all."""
    modalities = np.asarray(lanes[0]["identity"]["modalities"])
    accounts = [lane["mixture"] for lane in lanes]
    handed, total = (np.sum([account[name] for account in accounts], axis=0) for name in ("handed", "total"))
    shares = handed / max(handed.sum(), 1)
    targets = np.mean([account["targets"] or [0.0] * len(modalities) for account in accounts], axis=0)
    epochs = np.sum([lane["streams"] for lane in lanes], axis=0) / lanes[0]["identity"]["records"]
    vision = modalities == "vision"
    out = {"mixture/vision": float(shares[vision].sum()), "mixture/vision_target": float(targets[vision].sum())}
    out |= {"text_tokens": int(total[~vision].sum()), "vision_tokens": int(total[vision].sum())}
    for number, source in enumerate(data.sources):
        path = "/".join(source.path.split("/")[-2:])
        name = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', path).strip('_')}"
        out |= {f"mixture/{name}": float(shares[number]), f"epochs/{name}": float(epochs[number])}
    return out
