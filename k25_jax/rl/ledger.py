"""What was sampled, on disk: each group is committed once, and consumed by the updates of its batch alone (K2.5 §3.5).

A group is committed when its file is there, a batch when its record is there, which names its groups by what they hold. Both
appear whole or not at all and are never written again. Who consumes what follows from the number of an update
(rl/source.py), which a checkpoint holds: a run that was killed takes the batches that it has from here, and samples what is
missing. In a bucket as on a disk.

    WORKDIR/rl/identity.json            what the run samples: another configuration does not go on here
               start.json               what the start model can do (rl/start.py)
               groups/NAME.jsonl        the traces of a group; clips/ beside them, each once
               batches/NUMBER.json      names and hashes of its groups, of which weights they are, what they took
               batches/NUMBER.npy       log-probabilities by the form that is trained, where those are wanted
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.agents import trace
from k25_jax.agents.trace import Trace
from k25_jax.runtime.paths import AnyPath, write


class LedgerError(ValueError):
    """A ledger that does not fit the run, or is damaged; the message names the file and the remedy."""


class Ledger:
    """The groups and batches of one run, under `folder`."""

    def __init__(self, folder: AnyPath):
        self.folder = folder

    def identify(self, identity: Mapping) -> None:
        """Note what is sampled here; raises LedgerError where it was something else before."""
        before = self._read("identity.json")
        if before is None:
            self._write("identity.json", identity)
        elif differing := [name for name, value in identity.items() if before.get(name) != value]:
            name = differing[0]
            raise LedgerError(
                f"{self.folder}: what lies here was sampled with {name}={before.get(name)}, now it is {identity[name]}; "
                "set it back, or choose another --workdir"
            )

    def group(self, name: str) -> list[Trace] | None:
        """The traces of a committed group; None where it is not committed. Raises TraceError."""
        return trace.load(self._groups, name) if self._group_file(name).exists() else None

    def commit_group(self, name: str, traces: Sequence[Trace]) -> None:
        """Commit a group; raises LedgerError where it is."""
        self._refuse_twice(self._group_file(name))
        trace.save(self._groups, name, traces)

    def batch(self, number: int) -> dict | None:
        """The record of a committed batch; None where it is not. Raises LedgerError where a group is not as it was."""
        record = self._read(self._batch_file(number))
        for name, expected in (record or {"groups": {}})["groups"].items():
            if self._hash(name) != expected:
                raise LedgerError(
                    f"{self._group_file(name)}: missing, or not what batch {number} was committed with; put it back, or "
                    "choose another --workdir"
                )
        return record

    def commit_batch(
        self, number: int, names: Sequence[str], record: Mapping, logprobs_BL: np.ndarray | None = None
    ) -> dict:
        """Commit a batch of committed groups, and return its record; raises LedgerError where it is committed.

        `logprobs_BL` are log-probabilities of its tokens, beside those that its traces have.
        """
        file = self._batch_file(number)
        self._refuse_twice(self.folder / file)
        whole = {"groups": {name: self._hash(name) for name in names}, **record}
        if missing := [name for name, found in whole["groups"].items() if found is None]:
            raise LedgerError(f"{self._group_file(missing[0])}: batch {number} needs it, and it is not committed")
        if logprobs_BL is not None:
            content = io.BytesIO()
            np.save(content, logprobs_BL)
            write(self._logprobs_file(number), content.getvalue())
        self._write(file, whole)
        return whole

    def logprobs(self, number: int) -> np.ndarray | None:
        """The log-probabilities that a batch was committed with, if it was."""
        file = self._logprobs_file(number)
        if not file.exists():
            return None
        try:
            return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        except ValueError as error:
            raise LedgerError(f"{file}: is not as it was written ({error}); choose another --workdir") from error

    def start(self) -> dict | None:
        """What was found out about the start model; None before."""
        return self._read("start.json")

    def commit_start(self, record: Mapping) -> None:
        """Note what the start model can do; raises LedgerError where it is noted."""
        self._refuse_twice(self.folder / "start.json")
        self._write("start.json", record)

    # --------------------------------------------------------------------------------------------------------------- files
    @property
    def _groups(self) -> AnyPath:
        return self.folder / "groups"

    def _group_file(self, name: str) -> AnyPath:
        return self._groups / f"{name}.jsonl"

    @staticmethod
    def _batch_file(number: int) -> str:
        return f"batches/{number:06d}.json"

    def _logprobs_file(self, number: int) -> AnyPath:
        return self.folder / f"batches/{number:06d}.npy"

    def _hash(self, name: str) -> str | None:
        file = self._group_file(name)
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None

    def _refuse_twice(self, file: AnyPath) -> None:
        if file.exists():
            raise LedgerError(f"{file} is committed, and nothing is committed twice; does another run write here?")

    def _read(self, name: str) -> dict | None:
        file = self.folder / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise LedgerError(f"{file}: is not as it was written ({error}); choose another --workdir") from error

    def _write(self, name: str, content: Mapping) -> None:
        write(self.folder / name, json.dumps(content, indent=1, allow_nan=False) + "\n")
