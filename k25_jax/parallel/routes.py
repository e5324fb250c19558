"""Where every item goes on its way from the device that has it to the one that needs it: two hops of fixed size (K2.5 §3.8).

Between two devices there may be nothing, or all that one of them has. Were items sent straight there, every pair would
need room for the most that any pair exchanges. So each device first spreads its items evenly over all devices, which keep
them; from there the receivers collect them, part by part of an accumulated batch. How many an item's sender, the device
between and its receiver exchange is fixed by shapes alone, so that one program serves all batches of a run.

The host plans by which device each item goes. Those of a sender follow each other round the ring of devices, so that it
sends each as many. What a receiver gets from each is then almost even; where it would be more than there is room for, an
item changes its way with another one. Some such change always leads to a plan: it is König's theorem on the colours of the
edges of a bipartite graph, here senders and receivers, with devices between as colours.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROUND = 4096  # items that a device sends in a round, about
SPARE = 3.0  # standard deviations of what a receiver gets by each device, were it by chance: hardly one gets more


class RouteError(ValueError):
    """Items for which there is no room; the message says how much is needed."""


@dataclass(frozen=True)
class Form:
    """How much devices exchange: in the first hop, `spreads` rounds of `spread` items from each to each; then in each of
    `parts`, `rounds` of `width`."""

    devices: int
    parts: int
    spreads: int
    spread: int
    rounds: int
    width: int

    @property
    def kept(self) -> int:
        """Items that a device has room for between the hops."""
        return self.spreads * self.devices * self.spread

    def kept_at(self, sender, number):
        """Where a device keeps the item of this number among those that it has from this sender."""
        return (number // self.spread * self.devices + sender) * self.spread + number % self.spread


def form_of(devices: int, sent: int, received: int, parts: int = 1, rounds: int = 0) -> Form:
    """The form for devices that have at most `sent` items, and get at most `received` in a part; or for so many rounds."""
    most = math.ceil(ROUND / devices)
    each = max(1, math.ceil(sent / devices))
    spreads = math.ceil(each / most)
    share = received / devices
    needed = 1 + math.ceil(share + SPARE * math.sqrt(share))
    width = min(most, needed)
    return Form(devices, parts, spreads, math.ceil(each / spreads), rounds or math.ceil(needed / width), width)


@dataclass(frozen=True)
class Runs:
    """Items of one sender that follow each other there, `step` apart, and land side by side; an array entry a run."""

    sender: np.ndarray
    part: np.ndarray
    receiver: np.ndarray
    size: np.ndarray
    first: np.ndarray  # number of the first item at the sender
    landing: np.ndarray  # where it lands at the receiver
    step: int = 1


class Tables(NamedTuple):
    """What devices exchange, as places of items, int32. A place that is not needed has a number that is too large.

    X are the devices whose tables they are, A parts, J rounds, Z the devices that they send to or get from, U items of a
    round. `spread`: items that each sends to each. `pick`: of what each keeps, what it sends to each. `land`: where lies what
    comes from each. A part of a batch, in which it is the language model's turn, has its own `pick` and `land` alone.
    """

    spread_XJZU: np.ndarray | None
    pick_AXJZU: np.ndarray
    land_AXJZU: np.ndarray


def tables(runs: Runs, form: Form, here, sent: int, room: int) -> Tables:
    """The tables of the devices `here`; each has `sent` items and, in a part, `room` places. Raises RouteError."""
    plan = _plan(runs, form)
    crowds = _Crowds(plan)
    crowds.relieve()
    first = len(here), form.spreads, form.devices, form.spread
    second = form.parts, len(here), form.rounds, form.devices, form.width
    out = Tables(_blank(first, sent), _blank(second, form.kept), _blank(second, room))
    for number, device in enumerate(here):
        _fill_spread(out.spread_XJZU[number], crowds, device)
        _fill_pick(out.pick_AXJZU[:, number], crowds, device)
        for part in range(form.parts):
            _fill_land(out.land_AXJZU[part, number], crowds, part * form.devices + device)
    return out


def _blank(shape, room: int) -> np.ndarray:
    """Numbers that are too large, none twice in a round."""
    devices, width = shape[-2:]
    nowhere = room + np.arange(devices * width, dtype=np.int32).reshape(devices, width)
    return np.broadcast_to(nowhere, shape).copy()


# ------------------------------------------------------------------------------------------------------------- the plan
SENDER, GROUP = 0, 1  # the two ends of an item; a group is what one receiver gets in one part


@dataclass(frozen=True)
class _Plan:
    """Runs of at most as many items as there are devices, in the order of group, sender and item.

    Item k of a run goes by the device (begin + k) % devices: as number (start + k) // devices of those of its sender there,
    and of those of its group there in the order of the runs.
    """

    form: Form
    step: int
    sender: np.ndarray
    group: np.ndarray
    size: np.ndarray
    first: np.ndarray
    landing: np.ndarray
    start: np.ndarray  # number of the first item among all of its sender
    begin: np.ndarray
    by_sender: np.ndarray  # runs in the order of sender and start

    def runs_of(self, side: int, end: int) -> np.ndarray:
        """The runs of this sender or group, in their order."""
        if side == GROUP:
            return np.arange(*np.searchsorted(self.group, [end, end + 1]))
        return self.by_sender[slice(*np.searchsorted(self.sender[self.by_sender], [end, end + 1]))]

    def passing(self, runs: np.ndarray, place: int):
        """(run, item of it) of those of `runs` that go by this device, in their order."""
        items = (place - self.begin[runs]) % self.form.devices
        passes = items < self.size[runs]
        return runs[passes], items[passes]

    def items_of(self, runs: np.ndarray):
        """(run, item of it, device between) of all items of `runs`, in their order."""
        run = np.repeat(runs, self.size[runs])
        item = np.arange(len(run)) - np.repeat(np.cumsum(self.size[runs]) - self.size[runs], self.size[runs])
        return run, item, (self.begin[run] + item) % self.form.devices


def _plan(runs: Runs, form: Form) -> _Plan:
    group = runs.part * form.devices + runs.receiver
    _check(runs.sender, runs.size, form.kept, "has")
    _check(group, runs.size, form.devices * form.rounds * form.width, "gets", form)
    pieces = -(-runs.size // form.devices)
    which = np.repeat(np.arange(len(pieces)), pieces)
    done = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * form.devices
    sender, group, landing = runs.sender[which], group[which], runs.landing[which] + done
    size, first = np.minimum(runs.size[which] - done, form.devices), runs.first[which] + done * runs.step

    order = np.lexsort((first, group, sender))
    ends = np.cumsum(size[order])
    starts = ends - size[order]
    start = np.empty_like(starts)
    start[order] = starts - starts[np.searchsorted(sender[order], sender[order])]
    begin = (start + sender * 2654435761) % form.devices  # senders begin far from each other
    order = np.lexsort((start, sender, group))
    arrays = [a[order] for a in (sender, group, size, first, landing, start, begin)]
    return _Plan(form, runs.step, *arrays, by_sender=np.lexsort((arrays[5], arrays[0])))


def _check(ends, sizes, room: int, verb: str, form: Form | None = None):
    most = int(np.bincount(ends, sizes).max()) if len(ends) else 0
    if most > room:
        needed = form and math.ceil(most / form.devices / form.width)
        rounds = f", for which {form.rounds} rounds are too few: {needed}" if form else ""
        raise RouteError(f"a device {verb} {most} items, there is room for {room}{rounds}")


class _Crowds:
    """Those devices between where a sender or a group does not have just what the plan says, as lists of (run, item)."""

    def __init__(self, plan: _Plan):
        form = plan.form
        self.plan, self.room = plan, (form.spreads * form.spread, form.rounds * form.width)
        self.lists: tuple[dict, dict] = {}, {}  # of senders and of groups, by (end, device between)
        self._loads: dict[tuple[int, int], np.ndarray] = {}

    def relieve(self) -> None:
        """Let items go another way where a group has more of them than there is room for."""
        runs = np.bincount(self.plan.group) if len(self.plan.group) else np.zeros(0, int)
        for group in np.flatnonzero(runs > self.room[GROUP]).tolist():  # a run goes by a device at most once
            load = self._load(GROUP, group)
            for place in np.flatnonzero(load > self.room[GROUP]).tolist():
                while load[place] > self.room[GROUP]:
                    self._move(self._at(GROUP, group, place)[-1], place)

    def _move(self, item, place: int) -> None:
        """Move an item from a device where its group is crowded to another one.

        If its sender is crowded there, one of its other items goes to where the first has left; and if there that one's
        group is, another one of this group comes back, and so on. No item moves twice, so that it ends.
        """
        mine, theirs = (self._load(side, self._end(side, item)) for side in (GROUP, SENDER))
        allowed = mine < self.room[GROUP]
        free = allowed & (theirs < self.room[SENDER])
        places = np.flatnonzero(free if free.any() else allowed)
        to, side, moved = int(places[mine[places].argmin()]), SENDER, set()
        while True:
            self._shift(item, place, to)
            moved.add(item)
            end = self._end(side, item)
            load = self._load(side, end)
            if load[to] <= self.room[side] or load[place] >= self.room[side]:  # or it was crowded where it came from
                return
            item = next(other for other in self._at(side, end, to) if other not in moved)
            place, to, side = to, place, 1 - side

    def _end(self, side: int, item) -> int:
        return int((self.plan.sender, self.plan.group)[side][item[0]])

    def _shift(self, item, place: int, to: int) -> None:
        for side in (SENDER, GROUP):
            end = self._end(side, item)
            self._at(side, end, place).remove(item)
            self._at(side, end, to).append(item)
            load = self._load(side, end)
            load[place] -= 1
            load[to] += 1

    def _at(self, side: int, end: int, place: int) -> list:
        if (end, place) not in self.lists[side]:
            run, item = self.plan.passing(self.plan.runs_of(side, end), place)
            self.lists[side][end, place] = list(zip(run.tolist(), item.tolist(), strict=True))
        return self.lists[side][end, place]

    def _load(self, side: int, end: int) -> np.ndarray:
        """How many items of a sender or group go by each device."""
        if (side, end) not in self._loads:
            devices, runs = self.plan.form.devices, self.plan.runs_of(side, end)
            begin, size = self.plan.begin[runs], self.plan.size[runs]
            edges = np.bincount(begin, minlength=2 * devices + 1) - np.bincount(begin + size, minlength=2 * devices + 1)
            self._loads[side, end] = np.cumsum(edges)[:-1].reshape(2, devices).sum(axis=0)
        return self._loads[side, end]


# ----------------------------------------------------------------------------------------------------------- the tables
def _fill_spread(out_JZU, crowds: _Crowds, device: int) -> None:
    plan, form = crowds.plan, crowds.plan.form
    run, item, place = plan.items_of(plan.runs_of(SENDER, device))
    number = (plan.start[run] + item) // form.devices
    run, item, place, number = _corrected(run, item, place, number, crowds.lists[SENDER], device)
    out_JZU[number // form.spread, place, number % form.spread] = plan.first[run] + item * plan.step


def _fill_land(out_JZU, crowds: _Crowds, group: int) -> None:
    plan, form = crowds.plan, crowds.plan.form
    run, item, place = plan.items_of(plan.runs_of(GROUP, group))
    order = np.argsort(place, kind="stable")
    rank = np.empty_like(place)
    rank[order] = np.arange(len(place)) - np.searchsorted(place[order], place[order])
    run, item, place, rank = _corrected(run, item, place, rank, crowds.lists[GROUP], group)
    out_JZU[rank // form.width, place, rank % form.width] = plan.landing[run] + item


def _corrected(run, item, place, number, lists: dict, end: int):
    """The arrays for one sender or group, with those of the devices that it has a list for as that says."""
    listed = [(key[1], found) for key, found in lists.items() if key[0] == end]
    kept = ~np.isin(place, [at for at, _ in listed])
    more = [(*found, at, rank) for at, every in listed for rank, found in enumerate(every)]
    more = np.asarray(more, np.int64).reshape(-1, 4).T
    return (np.concatenate([a[kept], b]) for a, b in zip((run, item, place, number), more, strict=True))


def _fill_pick(out_AJZU, crowds: _Crowds, device: int) -> None:
    plan, form = crowds.plan, crowds.plan.form
    run, item = plan.passing(np.arange(len(plan.size)), device)
    rank = np.arange(len(run)) - np.searchsorted(plan.group[run], plan.group[run])
    lists = [{end: found for (end, at), found in of_all.items() if at == device} for of_all in crowds.lists]
    kept = ~np.isin(plan.group[run], list(lists[GROUP]))
    more = [(*found, rank) for every in lists[GROUP].values() for rank, found in enumerate(every)]
    more = np.asarray(more, np.int64).reshape(-1, 3).T
    run, item, rank = (np.concatenate([a[kept], b]) for a, b in zip((run, item, rank), more, strict=True))
    number = (plan.start[run] + item) // form.devices
    for i in np.flatnonzero(np.isin(plan.sender[run], list(lists[SENDER]))).tolist():
        number[i] = lists[SENDER][int(plan.sender[run[i]])].index((int(run[i]), int(item[i])))
    part, receiver = np.divmod(plan.group[run], form.devices)
    out_AJZU[part, rank // form.width, receiver, rank % form.width] = form.kept_at(plan.sender[run], number)
