"""Any type in any field of any record is read or refused, and never breaks our own code."""

import copy
import random

import numpy as np
import pytest
from given import PNG, prepared
from test_a_built_is_given import ELSEWHERE, FULL

from k25_jax.data.build import contained
from k25_jax.data.records import Record, RecordError

WRONG = (
    *(None, True, False, 0, -1, 2.5, float("nan"), 10**400, "", " ", "x", "[1]", "{}", "\ud800", "cat.png", b"", PNG),
    *(
        [],
        {},
        [None],
        [[]],
        [{}],
        ["x"],
        [5],
        {"a": 1},
        {"url": 5},
        {"bytes": None, "path": 5},
        {"text": None},
        [("a", 1)],
    ),
    *((), (1, 2), np.float32(1), "data:image/png;base64,", {"name": []}, [{"type": []}], {"function": {}}),
)
NAMES = (
    *(
        "text",
        "caption",
        "ocr",
        "boxes",
        "elements",
        "parts",
        "messages",
        "conversations",
        "tools",
        "mode",
        "weight",
        "system",
    ),
    *(
        "image",
        "images",
        "image_base64",
        "image_url",
        "video",
        "videos",
        "file_name",
        "media",
        "mask",
        "from",
        "png",
        "id",
    ),
    *(
        "role",
        "content",
        "name",
        "reasoning",
        "thinking",
        "reasoning_content",
        "tool_calls",
        "tool_call_id",
        "train",
        "loss",
    ),
    *("type", "value", "url", "path", "source", "label", "box", "function", "arguments", "parameters", "functions"),
)
RECORDS = [*FULL.values(), *ELSEWHERE]


def places(value, path=()):
    """The place of every field and item."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*path, key)
        yield from places(one, (*path, key))


def changed(record: dict, path, value) -> dict:
    out = at = copy.deepcopy(record)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


def outcome(data) -> str:
    """good or the reason; what was built of it ends the same."""
    results = []
    for change in (lambda record: record, contained):
        try:
            prepared(change(Record("r", data, {"cat.png": PNG, "dog.png": PNG})))
            results.append("good")
        except RecordError as problem:
            assert str(problem)
            results.append(problem.reason)
    assert results[0] == results[1] or "good" not in results, (data, results)
    return results[0]


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_every_type_in_every_field(number):
    record, found = RECORDS[number], set()
    for path in places(record):
        for value in WRONG:
            found.add(outcome(changed(record, path, value)))
    assert "form" in found and "unknown" not in found


def test_fields_that_do_not_belong_there():
    rng, found = random.Random(0), set()
    for _ in range(2000):
        record = rng.choice(RECORDS)
        where = [path for path in [(), *places(record)] if isinstance(at(record, path), dict)]
        data = changed(record, (*rng.choice(where), rng.choice(NAMES)), rng.choice(WRONG))
        found.add(outcome(data))
    assert {"good", "form"} <= found


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_pixels_that_are_none():
    for pixels in (
        np.zeros(3),
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.array(None),
    ):
        for record in (
            {"image": pixels, "text": "x"},
            FULL["grounding"] | {"image": pixels},
            {"video": pixels, "text": "x"},
        ):
            assert outcome(record) in ("image", "video")


def test_absurd_depth():
    for depth in (500, 5000):
        deep = []
        for _ in range(depth):
            deep = [{"a": deep}]
        for record in (
            {"text": "x", "meta": deep},
            {"messages": deep},
            {"text": deep},
            {"parts": [{"text": "x", "y": deep}]},
        ):
            assert outcome(record) in ("form", "good")
