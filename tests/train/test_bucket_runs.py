"""Runs that live in a bucket: checkpoints and metrics by themselves, and `k25 train` in two processes, killed and resumed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import buckets
import runs
from k25_jax.checkpoint.folders import CheckpointError, complete_steps
from k25_jax.checkpoint.store import Store, restore_params
from k25_jax.evals.protocol import Result
from k25_jax.evals.results import ResultFile
from k25_jax.report.metrics import MetricsWriter, read_metrics
from k25_jax.runtime import mirror
from k25_jax.runtime.paths import names, to_path, write

STATE = {"params": {"w": jnp.arange(64.0).reshape(8, 8)}}
STEPS, EVERY = 24, 4


# ------------------------------------------------------------------------------------------------------------ its parts
def test_checkpoints_in_a_bucket_are_whole_or_not_there(bucket):
    folder = to_path(f"{bucket}/checkpoints")
    assert complete_steps(folder) == []
    store = Store(folder, keep=2)
    for step in (1, 2, 3):
        store.save(step, {"params": {"w": STATE["params"]["w"] + step}}, {"place": step}, wait=True)
    assert store.steps() == complete_steps(folder) == [2, 3]
    store.close()
    write(folder / "4" / "state" / "manifest.ocdbt", b"of a process that was killed")
    assert complete_steps(folder) == [2, 3]
    again = Store(folder)
    state, data = again.restore(STATE)
    again.close()
    assert data == {"place": 3} and (np.asarray(state["params"]["w"]) == np.asarray(STATE["params"]["w"]) + 3).all()
    assert (restore_params(folder, STATE["params"])["w"] == state["params"]["w"]).all()
    with pytest.raises(CheckpointError, match="gs://k25-tests/none: no such folder"):
        restore_params(f"{bucket}/none", STATE["params"])


def test_metrics_in_a_bucket_go_on_where_they_were_published(bucket):
    folder = to_path(f"{bucket}/metrics")
    writer = MetricsWriter(folder)
    writer.write(1, {"loss": 1.0})
    writer.publish()
    writer.write(2, {"loss": 0.5})  # of a process that was killed before it published this
    time.sleep(1.1)  # event files are named by the second
    with MetricsWriter(folder) as again:
        assert again.last_step == 1
        again.truncate_after(1)
        again.write(2, {"loss": 0.25})
    assert [row["loss"] for row in read_metrics(folder)] == [1.0, 0.25]
    assert sum("tfevents" in name for name in names(folder)) >= 1


def test_results_of_an_evaluation_in_a_bucket(bucket, monkeypatch):
    path = to_path(f"{bucket}/evals/words.jsonl")
    fields = dict(index=0, sample=0, text="a", finish="stop")
    result = Result(**{name: fields.get(name) for name in Result.__dataclass_fields__})
    with ResultFile(path, {"who": "me"}) as file:
        file.add(result)
    with ResultFile(path, {"who": "me"}) as file:
        assert file.finished == {(0, 0): result}
    monkeypatch.setattr(mirror, "EVERY", 0.0)
    with pytest.raises(ValueError, match="evals/words.jsonl holds results of something else"):
        ResultFile(path, {"who": "another"}).__enter__()


@pytest.mark.parametrize(
    "words, said",
    [
        (("train", "--config=pretrain/demo", "--workdir=gs:/bucket/run"), "--workdir=gs:/bucket/run: a path in a bucket"),
        (("train", "--config=gs://bucket/x.py"), "--config=gs://bucket/x.py: cannot be in a bucket; an experiment file"),
        (("train", "--config=pretrain/demo", "--workdir=gs://k25-nowhere/run"), "gs://k25-nowhere cannot be written"),
        (("report", "--workdir=gs://k25-tests/none"), "no metrics at gs://k25-tests/none/metrics.jsonl"),
        (("report", "--workdir=gs://k25-nowhere/run"), "gs://k25-nowhere cannot be read"),
        (("generate", "--checkpoint=gs://k25-tests/none", "--prompt=x"), "gs://k25-tests/none is neither a run"),
        (("sweep", "--config=base/base", "--workdir=gs://k25-tests/s"), "--workdir=gs://k25-tests/s: cannot be in a"),
        (("data", "build", "x.jsonl", "--output=gs://k25-tests/d"), "there is nothing at x.jsonl"),
        (("data", "build", "words:test", "--output=gs://k25-tests/d"), "gcloud storage cp -r FOLDER gs://BUCKET"),
        (("convert", "--checkpoint=base", "--output=gs://k25-nowhere/p"), "gs://k25-nowhere cannot be written"),
        (("eval", "--checkpoint=gs:/bucket/run"), "--checkpoint=gs:/bucket/run: a path in a bucket is written"),
        (("data", "check", "s3://bucket/x.jsonl"), "data.sources=s3://bucket/x.jsonl: is an address"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_begins(bucket, k25, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = k25(*words)
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # above all no folder gs:


# -------------------------------------------------------------------------------------------------------- two processes
def start(file: pathlib.Path, run: str, *more: str) -> subprocess.Popen:
    """`k25 train` in two processes."""
    train = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={file}", f"--workdir={run}", *more]
    train += [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "data.packs=2", "data.lanes=2"]
    command = [sys.executable, "launch/local.py", "--processes=2", "--", *train]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=runs.environment(), cwd=runs.ROOT)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for it."""
    out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that the launcher has started, in their order."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return sorted(map(int, file.read().split()))


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_are_killed_and_resume_exactly(bucket, tmp_path):
    """Data in the bucket too; then a report, an answer, an evaluation, and a run that starts from its weights."""
    file = runs.write_experiment(tmp_path)
    data = buckets.copied(tmp_path / "data", f"{bucket}/data")
    source = f"data.sources[0].path={data}/records.jsonl"
    whole, killed = f"{bucket}/whole", f"{bucket}/killed"
    undisturbed, process = start(file, whole, source), start(file, killed, source)
    assert runs.wait_for(process, lambda: complete_steps(f"{killed}/checkpoints"), seconds=900), finish(process)
    os.kill(children(process)[1], signal.SIGKILL)
    assert finish(process).returncode == 128 + signal.SIGKILL
    newest = max(complete_steps(f"{killed}/checkpoints"))
    assert newest < STEPS
    for done in (finish(start(file, killed, source)), finish(undisturbed)):
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        [{k: v for k, v in row.items() if k not in runs.TIMINGS} for row in read_metrics(run)]
        for run in (killed, whole)
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    sums = [
        json.loads((to_path(run) / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())
        for run in (killed, whole)
    ]
    assert sums[0] == sums[1]  # of the bits of all parameters and of the optimizer, and the state of the data
    assert json.loads((to_path(killed) / "run.json").read_text())["processes"] == 2

    assert runs.k25("report", f"--workdir={killed}").returncode == 0
    assert "<html" in (to_path(killed) / "report.html").read_text()
    answer = runs.k25(
        "generate", f"--checkpoint={killed}", "--prompt=a line", "--max_tokens=4", "--temperature=0", "--json"
    )
    assert answer.returncode == 0 and len(json.loads(answer.stdout)["tokens"]) <= 4, answer.stderr
    asked = runs.k25(
        "eval", f"--checkpoint={killed}", "--task=words:test", "--questions=2", f"--workdir={bucket}/scores"
    )
    assert asked.returncode == 0 and "evals.json" in names(to_path(f"{bucket}/scores")), asked.stderr
    more = runs.k25(
        "train", f"--config={file}", f"--workdir={bucket}/next", source, f"train.init_from={killed}", "train.steps=2"
    )
    assert more.returncode == 0, more.stderr
    assert not pathlib.Path(runs.ROOT, "gs:").exists()
