import json
import math
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from k25_jax.report.metrics import MetricsError, MetricsWriter, read_metrics


def _loss(step):
    return {"loss": 10.0 / (step + 1), "tokens": step * 128}


def _events(directory):
    """(step, tag, value) of every scalar in the directory's TensorBoard files, in order of file name."""
    found = []
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 12 + length + 4
    return found


def test_a_step_is_a_line_and_tensorboard_has_it_too(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, _loss(step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before the writer is closed
        assert json.loads(lines[2]) == {"step": 2, "loss": 10.0 / 3, "tokens": 256}
    assert read_metrics(tmp_path) == [{"step": s, **_loss(s)} for s in range(3)]
    assert [(s, t) for s, t, _ in _events(tmp_path)] == [(s, t) for s in range(3) for t in ("loss", "tokens")]
    np.testing.assert_allclose([v for _, t, v in _events(tmp_path) if t == "loss"], [10, 5, 10 / 3], rtol=1e-6)


def test_arrays_of_one_element_are_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": jnp.float32(0.5), "b": np.int64(3), "c": jnp.ones((1,)), "d": np.float16(0.25)})
    assert read_metrics(tmp_path) == [{"step": 0, "a": 0.5, "b": 3, "c": 1.0, "d": 0.25}]


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": math.nan, "b": jnp.inf, "c": np.float32(-np.inf)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 0, "a": "nan", "b": "inf", "c": "-inf"}\n'
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_a_resumed_run_leaves_the_same_file(tmp_path):
    with MetricsWriter(tmp_path / "whole") as writer:
        for step in range(10):
            writer.write(step, _loss(step))
    with MetricsWriter(tmp_path / "resumed") as writer:
        for step in range(8):
            writer.write(step, _loss(step) | {"loss": 99.0} if step > 4 else _loss(step))
    with MetricsWriter(tmp_path / "resumed") as writer:
        assert writer.last_step == 7
        writer.truncate_after(4)
        assert writer.last_step == 4
        for step in range(5, 10):
            writer.write(step, _loss(step))
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [p.name for p in (tmp_path / "resumed").iterdir() if p.suffix == ".tmp"] == []


def test_truncating_before_the_first_step_empties_the_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, _loss(5))
        writer.truncate_after(0)
        assert writer.last_step is None
        writer.write(1, _loss(1))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_repaired(tmp_path, cut):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, _loss(0))
        writer.write(1, _loss(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [0, 1] if cut == 1 else [0]  # one byte short: only the newline is missing
    assert [record["step"] for record in read_metrics(tmp_path)] == kept
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, _loss(2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [*kept, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_metrics(path)
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(MetricsError, match="line 1: no whole number under 'step'"):
        MetricsWriter(tmp_path)


def test_steps_do_not_go_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, _loss(3))
        with pytest.raises(MetricsError, match="step 2 comes after step 3; to resume, call truncate_after"):
            writer.write(2, _loss(2))


@pytest.mark.parametrize(
    "value, message", [(np.zeros(3), r"'bad' has shape \(3,\)"), ("high", "'bad' must be a number")]
)
def test_what_is_no_number_is_named_and_nothing_is_written(tmp_path, value, message):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(MetricsError, match=message):
            writer.write(0, {"good": 1.0, "bad": value})
        with pytest.raises(MetricsError, match="cannot be named 'step'"):
            writer.write(0, {"step": 1.0})
    assert read_metrics(tmp_path) == []


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(MetricsError, match="no metrics at .*nowhere"):
        read_metrics(tmp_path / "nowhere")


def test_a_full_disk_loses_no_line(tmp_path):
    """A limit on file size stands for the full disk: the kernel writes part of the line, then refuses."""
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, _loss(0))
        before = writer.path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match="metrics of step 1 not written") as error:
                writer.write(1, {f"metric_{i}": i for i in range(400)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.filename == str(writer.path)
        assert writer.path.read_bytes() == before
        writer.write(1, _loss(1))
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_event_files_that_cannot_be_written_keep_nobody_waiting(tmp_path):
    """The thread that writes them ends when the disk is full."""
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 0.0})
        events = writer._tensorboard.file_writer.event_writer
        events._worker.stop()
        for step in range(1, 60):
            writer.write(step, {"loss": 0.0})
