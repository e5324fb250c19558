"""The ways of items between devices, simulated in numpy: all arrive where they must, each once, whatever their numbers."""

import numpy as np
import pytest

from k25_jax.parallel import routes
from k25_jax.parallel.routes import Form, RouteError, Runs, Tables, form_of, tables


def carried(found: Tables, form: Form, sent: int, room: int):
    """[parts, devices, room]: which item, numbered over all senders, has come to each place; -1 where none has."""
    items = np.arange(form.devices * sent).reshape(form.devices, sent)
    with_nothing = lambda a: np.pad(a, ((0, 0), (0, form.devices * 4096)), constant_values=-1)  # noqa: E731
    take = lambda a, numbers: np.take_along_axis(with_nothing(a), numbers.reshape(form.devices, -1), 1)  # noqa: E731
    kept = []
    for j in range(form.spreads):
        out = take(items, found.spread_XJZU[:, j]).reshape(form.devices, form.devices, form.spread)
        kept.append(out.swapaxes(0, 1).reshape(form.devices, -1))
    kept = np.concatenate(kept, axis=1)
    assert kept.shape[1] == form.kept
    got = np.full((form.parts, form.devices, room), -1)
    for part, j in np.ndindex(form.parts, form.rounds):
        shape = form.devices, form.devices, form.width
        out = take(kept, found.pick_AXJZU[part, :, j]).reshape(shape).swapaxes(0, 1)
        for device in range(form.devices):
            land = found.land_AXJZU[part, device, j]
            assert len(np.unique(land)) == land.size  # as the scatter has been told
            here = land < room
            assert (got[part, device][land[here]] == -1).all() and (out[device][here] >= 0).all()
            assert (out[device][~here] == -1).all()  # nothing is sent that nobody takes
            got[part, device][land[here]] = out[device][here]
    return got


def arrived(runs: Runs, form: Form, sent: int, room: int):
    return carried(tables(runs, form, np.arange(form.devices), sent, room), form, sent, room)


def wanted(runs: Runs, form: Form, sent: int, room: int):
    out = np.full((form.parts, form.devices, room), -1)
    for sender, part, device, size, first, landing in zip(
        runs.sender, runs.part, runs.receiver, runs.size, runs.first, runs.landing, strict=True
    ):
        out[part, device, landing : landing + size] = sender * sent + first + np.arange(size) * runs.step
    return out


def random_runs(rng, devices, parts, sent, room, mean, few, step=1) -> Runs:
    """Runs of all senders at random places; `few`: the first receivers are filled to their last place."""
    cut = []
    for sender in range(devices):
        at = 0
        while at < sent:
            size = min(int(rng.geometric(1 / mean)), (sent - at + step - 1) // step)
            cut.append((sender, at, size))
            at += size * step
    rng.shuffle(cut)
    filled, out = np.zeros(parts * devices, int), []
    for sender, first, size in cut:
        free = np.flatnonzero(filled + size <= room)
        if len(free):
            group = free[0] if few else rng.choice(free)
            out.append((sender, *divmod(group, devices), size, first, filled[group]))
            filled[group] += size
    return Runs(*np.asarray(out, np.int64).reshape(-1, 6).T, step=step)


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("sent", [1, 5, 64, 300])
@pytest.mark.parametrize("few", [False, True])
def test_all_arrive(monkeypatch, devices, sent, few):
    monkeypatch.setattr(routes, "ROUND", 40)  # more than one round
    rng = np.random.default_rng(0)
    for parts, mean, step in ((1, 1, 1), (2, 3, 1), (3, 20, 1), (2, 4, 2)):
        room = max(sent // parts, 20) * (2 if few else 1)
        runs = random_runs(rng, devices, parts, sent, room, mean, few, step)
        form = form_of(devices, sent, room, parts)
        np.testing.assert_array_equal(arrived(runs, form, sent, room), wanted(runs, form, sent, room))


def test_none_at_all():
    runs, form = Runs(*np.zeros((6, 0), np.int64)), form_of(4, 10, 10, 2)
    assert (arrived(runs, form, 10, 10) == -1).all()


def test_one_sender_to_one_receiver_and_only_that():
    runs = Runs(*np.asarray([[3, 0, 1, 64, 0, 0]]).T)
    form = form_of(8, 64, 64)
    np.testing.assert_array_equal(arrived(runs, form, 64, 64), wanted(runs, form, 64, 64))


@pytest.mark.parametrize("seed", range(20))
def test_without_any_room_to_spare_a_plan_is_found(monkeypatch, seed):
    """Every device has as many items as it can send and gets as many as it can take, in runs of any size."""
    rng, devices, each = np.random.default_rng(seed), 5 + seed % 4, 3
    sent = devices * each
    ends = rng.permutation(np.repeat(np.arange(devices), sent))  # of each item its receiver
    landing = np.empty(len(ends), np.int64)
    for device in range(devices):
        landing[ends == device] = np.arange(sent)
    sender, first = np.divmod(np.arange(len(ends)), sent)
    runs = Runs(sender, np.zeros_like(sender), ends, np.ones_like(sender), first, landing)
    form, changes = Form(devices, 1, 1, each, 1, each), []
    move = routes._Crowds._shift
    monkeypatch.setattr(routes._Crowds, "_shift", lambda *args: (changes.append(args), move(*args)))
    np.testing.assert_array_equal(arrived(runs, form, sent, sent), wanted(runs, form, sent, sent))
    assert changes


def test_too_few_rounds_are_refused_with_the_number_that_suffices():
    runs = Runs(*np.asarray([[s, 0, 1, 8000, 0, 8000 * s] for s in range(2)]).T)
    assert form_of(2, 8000, 16000).width == 2048
    with pytest.raises(RouteError, match=r"gets 16000 items.*1 rounds are too few: 4"):
        tables(runs, form_of(2, 8000, 16000, rounds=1), [0], 8000, 16000)
    tables(runs, form_of(2, 8000, 16000, rounds=4), [0], 8000, 16000)


def test_the_form_holds_what_the_flagship_exchanges_in_a_step():
    """16384 rows of 4096 in 16 parts, 8192 packs of 4096 patches, on 256 chips: features of 7168 in bfloat16."""
    form = form_of(256, 8192 * 1024 // 256, 16384 * 4096 // 16 // 256, 16)
    bytes_each_way = (form.kept + form.parts * form.rounds * form.devices * form.width) * 7168 * 2
    assert form.kept == 32768 and 2 * bytes_each_way <= 20e9
