"""Pages and rows of features against a bookkeeping in plain sets; keys tell prompts and images apart."""

import numpy as np
import pytest

from k25_jax.sampling.encoder_cache import EncoderCache
from k25_jax.sampling.paged_cache import PagedCache, clip_digest, page_keys
from k25_jax.vision.patchpack import Clip


def clip(seed, grid=(1, 2, 4)):
    return Clip(np.random.default_rng(seed).integers(0, 256, (np.prod(grid), 12)).astype(np.uint8), grid)


def test_pages_are_never_given_twice_and_never_lost():
    rng = np.random.default_rng(0)
    pages, users, contents = PagedCache(9), {}, {}  # users: {name: its pages}; contents: {page: key}
    for step in range(3000):
        used = {page for mine in users.values() for page in mine}
        assert pages.available == 9 - len(used)
        action = rng.integers(4)
        if action == 0 and pages.available:
            taken = pages.take(int(rng.integers(1, pages.available + 1)))
            assert not used & set(taken) and len(set(taken)) == len(taken)
            contents = {page: key for page, key in contents.items() if page not in taken}
            users[step] = taken
            for page in taken:
                if rng.random() < 0.6:
                    key = bytes([rng.integers(5)])
                    pages.keep(page, key)
                    if key not in contents.values():
                        contents[page] = key
        elif action == 1 and users:
            pages.release(users.pop(rng.choice(list(users))))
        elif action == 2:
            keys = [bytes([k]) for k in rng.permutation(5)]
            found = pages.match(keys)
            assert [contents[page] for page in found] == keys[: len(found)]
            assert len(found) == 5 or keys[len(found)] not in contents.values()
            pages.hold(found)
            users[step] = found
        elif action == 3 and rng.random() < 0.02:
            pages.forget()
            contents = {}
            assert pages.match([bytes([k]) for k in range(5)]) == [] and pages.idle == 0


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning():
    pages, keys = PagedCache(4), page_keys(list(range(12)), 4)
    mine = pages.take(3)
    for page, key in zip(mine, keys, strict=True):
        pages.keep(page, key)
    pages.release(mine)
    pages.take(2)
    assert pages.match(keys) == mine[:2]


def test_keys_stand_for_all_that_came_before():
    tokens = list(range(20))
    keys = page_keys(tokens, 4)
    assert len(keys) == 5 and len(set(keys)) == 5
    assert page_keys(tokens + [1, 2, 3], 4) == keys == page_keys(tokens, 4, known=keys[:2])
    for place in range(20):
        other = page_keys([*tokens[:place], 99, *tokens[place + 1 :]], 4)
        assert other[: place // 4] == keys[: place // 4] and not set(other[place // 4 :]) & set(keys)


def test_keys_tell_images_apart_by_what_they_show_and_where_they_stand():
    tokens = [1, 9, 9, 9, 9, 2, 3, 4, 5, 6, 7, 8]
    one, two = clip_digest(clip(0)), clip_digest(clip(1))
    keys = {name: page_keys(tokens, 4, images) for name, images in {
        "one": [(1, 5, one)], "two": [(1, 5, two)], "none": [], "split": [(1, 3, one), (3, 5, one)],
    }.items()}  # fmt: skip
    assert len({k[0] for k in keys.values()}) == len({k[2] for k in keys.values()}) == 4
    late = page_keys(tokens, 4, [(1, 2, one), (2, 5, one)]), page_keys(tokens, 4, [(1, 2, one), (2, 5, two)])
    assert late[0][0] != late[1][0]
    assert clip_digest(clip(0)) == one != clip_digest(clip(0, (2, 2, 2)))
    assert clip_digest(Clip(clip(0).patches.astype(np.float32), (1, 2, 4))) != one


def test_features_are_shared_kept_and_given_up():
    rows, clips = EncoderCache(5), {name: clip(i) for i, name in enumerate((b"a", b"b", b"c"))}  # of 2 tokens each
    wanted = lambda names: [(name, clips[name]) for name in names]  # noqa: E731
    (first, again), fresh = rows.claim(wanted([b"a", b"a"]))
    assert first is again and [e for e, _ in fresh] == [first] and len(set(first.rows_M)) == 2
    (second,), fresh = rows.claim(wanted([b"b"]))
    assert not set(first.rows_M) & set(second.rows_M)
    assert rows.claim(wanted([b"c"])) is None
    rows.release([first])
    assert rows.claim(wanted([b"c"])) is None  # still one user
    rows.release([first])
    (same,), fresh = rows.claim(wanted([b"a"]))
    assert same is first and not fresh
    rows.release([same])
    (third,), fresh = rows.claim(wanted([b"c"]))
    assert len(fresh) == 1 and not set(third.rows_M) & set(second.rows_M)
    rows.forget()
    rows.release([second, third])
    given, fresh = rows.claim(wanted([b"b", b"c"]))
    assert len(fresh) == 2 and len({row for e in given for row in e.rows_M}) == 4


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_features_are_never_given_twice_and_never_lost(seed):
    rng = np.random.default_rng(seed)
    rows, users = EncoderCache(11), []
    clips = {bytes([i]): clip(i, (1, 2, 2 * (1 + i % 3))) for i in range(8)}
    for _ in range(1500):
        if rng.random() < 0.5:
            names = [bytes([n]) for n in rng.integers(0, 8, rng.integers(1, 4))]
            claimed = rows.claim([(name, clips[name]) for name in names])
            held = {row for given in users for e in given for row in e.rows_M}
            if claimed is None:
                assert len(held) + sum(clips[n].tokens for n in set(names)) > 11 or users
                continue
            users.append(claimed[0])
            for encoded, one in claimed[1]:
                assert len(encoded.rows_M) == one.tokens and not held & set(encoded.rows_M.tolist())
                held |= set(encoded.rows_M.tolist())
        elif users:
            rows.release(users.pop(rng.integers(len(users))))
        if rng.random() < 0.02:
            rows.forget()
    while users:
        rows.release(users.pop())
    rows.forget()
    assert sorted(rows._free) == list(range(11))
