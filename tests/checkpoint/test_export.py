"""Exports of runs: byte for byte what one process writes from memory, a tensor at a time, in parts, by several, resumed."""

import json
import math
import shutil
import subprocess
import sys
import types
import weakref

import jax
import numpy as np
import pytest
import tensorstore as ts

import runs
from k25_jax.checkpoint import export as exporting
from k25_jax.checkpoint.convert import convert
from k25_jax.checkpoint.export import PLAN
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.checkpoint.layout import bind, read_apart
from k25_jax.checkpoint.store import CheckpointError, Store, restore_params
from k25_jax.checkpoint.tensors import RunTensors
from k25_jax.config import load_experiment
from k25_jax.models.k25 import abstract_params
from k25_jax.train.run import save_run
from k25_jax.train.state import init_state

FILE_BYTES = 10_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`folder` of a run with one checkpoint; `whole`, the files that its restored weights make."""
    folder = tmp_path_factory.mktemp("export")
    experiment = load_experiment(str(runs.write_experiment(folder)))
    save_run(experiment, folder / "run")
    store = Store(folder / "run" / "checkpoints", apart=read_apart(experiment.model))
    store.save(4, init_state(experiment), {}, wait=True)
    store.close()
    params = restore_params(folder / "run" / "checkpoints", abstract_params(experiment.model))
    save_params(params, experiment.model, folder / "whole", shard_bytes=FILE_BYTES)
    return types.SimpleNamespace(folder=folder / "run", model=experiment.model, whole=folder / "whole")


def contents(folder, pattern: str = "model*") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(pattern)}


def assert_whole(run, folder):
    assert contents(folder) == contents(run.whole) and len(contents(folder)) == 10
    assert not [file for file in folder.iterdir() if file.suffix in (".sums", ".tmp") or file.name == PLAN]
    assert [item.name for item in folder.parent.glob(".*")] == []


def test_it_is_what_the_whole_weights_make(run, tmp_path):
    done = []
    convert(str(run.folder), str(tmp_path / "out"), progress=lambda *seen: done.append(seen), shard_bytes=FILE_BYTES)
    assert_whole(run, tmp_path / "out")
    assert [number for _, number, _ in done] == list(range(1, 10)) and {total for *_, total in done} == {9}


@pytest.mark.parametrize("encoding", ["int4", "fp8"])
def test_quantised_too(run, tmp_path, encoding):
    model = run.model
    params = restore_params(run.folder / "checkpoints", abstract_params(model))
    try:
        save_params(params, model, tmp_path / "whole", quantise=encoding)
    except CheckpointError as error:  # too narrow for blocks of so many
        with pytest.raises(CheckpointError, match=str(error)[:30]):
            convert(str(run.folder), str(tmp_path / "out"), quantise=encoding)
        return
    convert(str(run.folder), str(tmp_path / "out"), quantise=encoding)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_one_tensor_is_held_at_a_time(run, tmp_path, monkeypatch):
    """What is read at once is one expert of one layer, never twice, and forgotten; what is stored together is no more."""
    reads, held = [], []
    part, read = RunTensors.part, RunTensors.read

    def counted(tensors, path, place):
        array = part(tensors, path, place)
        reads.append((path, place, array.size))
        held.append(weakref.ref(array))
        return array

    def forgotten(tensors, bound, place):
        assert not [array for array in held if array() is not None]
        return read(tensors, bound, place)

    monkeypatch.setattr(RunTensors, "part", counted)
    monkeypatch.setattr(RunTensors, "read", forgotten)
    convert(str(run.folder), str(tmp_path / "out"), shard_bytes=FILE_BYTES)
    expected = {
        (path, place): math.prod(shape[len(bound.stack) :])
        for bound in bind(run.model)
        for path, shape in bound.leaves.items()
        for place in np.ndindex(bound.stack)
    }
    assert {(path, place): size for path, place, size in reads} == expected and len(reads) == len(expected)
    spec = {
        "driver": "ocdbt",
        "base": f"file://{run.folder}/checkpoints/4/state/",
        "path": "params.moe.moe.experts.gate/",
    }
    stored = ts.open({"driver": "zarr", "kvstore": spec}, read=True).result()
    assert stored.chunk_layout.read_chunk.shape == (1, 1, *stored.shape[2:])


def test_what_was_written_before_a_kill_is_kept(run, tmp_path, monkeypatch):
    write, written = exporting._write_file, []

    def killed(path, shard, tensors):
        if len(written) == 4:
            path.with_name(f"{path.name}.tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, shard, tensors)

    monkeypatch.setattr(exporting, "_write_file", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(str(run.folder), str(out), shard_bytes=FILE_BYTES)
    assert not out.exists() and len(written) == 4
    monkeypatch.setattr(exporting, "_write_file", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    convert(str(run.folder), str(out), shard_bytes=FILE_BYTES)
    assert len(written) == len(set(written)) == 9
    assert_whole(run, out)


def test_what_is_unfinished_and_of_another_export_is_written_anew(run, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / PLAN).write_text(json.dumps({"source": "another"}))
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"of another model")
    convert(str(run.folder), str(tmp_path / "out"), shard_bytes=FILE_BYTES)
    assert_whole(run, tmp_path / "out")


def test_bytes_that_rotted_are_noticed(run, tmp_path):
    """The sums in the checkpoint are compared with those of what was read, over all files."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    file = folder / "checkpoints" / "4" / "data" / "metadata"
    values = json.loads(file.read_text())
    values["sums"]["params/embed"] += 1
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"checkpoint is damaged \(1 arrays, as params/embed\)"):
        convert(str(folder), str(tmp_path / "out"), shard_bytes=FILE_BYTES)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


def test_arrays_that_are_not_there_are_named(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "checkpoints" / "4" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="its arrays cannot be opened"):
        convert(str(folder), str(tmp_path / "out"))


def test_two_processes_share_out_the_files(run, tmp_path):
    """And go on where one was killed: what lies there is kept."""
    command = [
        sys.executable,
        "-m",
        "k25_jax.cli",
        "convert",
        f"--checkpoint={run.folder}",
        f"--output={tmp_path / 'out'}",
    ]
    command = [sys.executable, "launch/local.py", "--processes=2", "--", *command, f"--file_gb={FILE_BYTES / 1e9}"]
    done = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    assert_whole(run, tmp_path / "out")


def test_each_process_writes_its_own_files(run, tmp_path, monkeypatch):
    """The second of three: the files 2, 5 and 8, and no index."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(exporting.processes, "met", lambda what: None)
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / PLAN).write_text("{}")
    experiment = load_experiment(str(run.folder.parent / "minute.py"))
    tensors = RunTensors(run.folder / "checkpoints" / "4")
    form = exporting.Form(shard_bytes=FILE_BYTES)
    exporting.export(tensors, experiment.model, tmp_path / "out", form, source="a run")
    assert sorted(contents(partial)) == sorted(
        f"model-0000{i}-of-00009.safetensors{end}" for i in (2, 5, 8) for end in ("", ".sums")
    )
