"""What is committed is there, whole, once."""

import numpy as np
import pytest

from groups import trace
from k25_jax.agents.trace import TraceError, to_json
from k25_jax.rl.ledger import Ledger, LedgerError


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "rl")


def test_a_group_comes_back_as_it_was_committed_and_only_then(ledger):
    assert ledger.group("000000-000") is None
    traces = [trace(1.0, seed=1), trace(None, seed=2)]
    ledger.commit_group("000000-000", traces)
    assert [to_json(t) for t in ledger.group("000000-000")] == [to_json(t) for t in traces]
    with pytest.raises(LedgerError, match="000000-000.*committed twice"):
        ledger.commit_group("000000-000", traces)


def test_a_batch_is_of_committed_groups_as_they_were(ledger):
    assert ledger.batch(0) is None
    ledger.commit_group("a", [trace(1.0)])
    with pytest.raises(LedgerError, match="b.jsonl: batch 0 needs it"):
        ledger.commit_batch(0, ["a", "b"], {})
    ledger.commit_group("b", [trace(0.0)])
    record = ledger.commit_batch(0, ["a", "b"], {"seconds": 0.25}, np.eye(3))
    assert ledger.batch(0) == record and list(record["groups"]) == ["a", "b"] and record["seconds"] == 0.25
    np.testing.assert_array_equal(ledger.logprobs(0), np.eye(3))
    assert ledger.batch(1) is None and ledger.logprobs(1) is None
    with pytest.raises(LedgerError, match="committed twice"):
        ledger.commit_batch(0, ["a"], {})


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_group_that_is_not_as_its_batch_had_it_is_named(ledger, harm):
    ledger.commit_group("a", [trace(1.0)])
    ledger.commit_batch(3, ["a"], {})
    file = ledger.folder / "groups" / "a.jsonl"
    file.unlink() if harm == "gone" else file.write_text(file.read_text().replace("answer", "reward"))
    with pytest.raises(LedgerError, match="a.jsonl: missing, or not what batch 3 was committed with"):
        ledger.batch(3)


def test_another_configuration_does_not_go_on_here(ledger):
    ledger.identify({"rl.groups": 4, "rl.problems": [{"path": "puzzles:train"}]})
    ledger.identify({"rl.groups": 4, "rl.problems": [{"path": "puzzles:train"}]})
    with pytest.raises(LedgerError, match="rl.groups=4, now it is 8"):
        ledger.identify({"rl.groups": 8, "rl.problems": [{"path": "puzzles:train"}]})


def test_what_was_torn_is_named(ledger):
    ledger.commit_start({"model": "abc", "problems": {}})
    assert ledger.start() == {"model": "abc", "problems": {}}
    with pytest.raises(LedgerError, match="committed twice"):
        ledger.commit_start({})
    (ledger.folder / "start.json").write_text('{"model": "a')
    with pytest.raises(LedgerError, match="start.json: is not as it was written"):
        ledger.start()
    (ledger.folder / "groups").mkdir()
    (ledger.folder / "groups" / "x.jsonl").write_text("{")
    with pytest.raises(TraceError, match="x.jsonl"):
        ledger.group("x")
