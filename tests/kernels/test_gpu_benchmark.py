"""benchmarks/gpu.py from end to end where there is no GPU, in small sizes: so that it works the first time there is one."""

import json
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import runs
from benchmarks import gpu
from benchmarks.on_gpu import training
from benchmarks.on_gpu.run import Run
from k25_jax.sharding.mesh import AXES
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import abstract_state
from k25_jax.train.step import make_step

BROKEN = """
from k25_jax.kernels import paged_attention as kernel
right = kernel.paged_attention
kernel.paged_attention = lambda *arguments: right(*arguments) * 1.1
"""


def run(*flags, **variables):
    """(status, lines by name) of the command in a process of its own."""
    variables = os.environ | {"PYTHONPATH": str(runs.ROOT)} | variables
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    done = subprocess.run(command, cwd=runs.ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_broken_kernel_is_named_and_ends_with_status_1(tmp_path):
    """The other kernels' figures come all the same; a part without time is named too; a file takes all lines."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path, output = f"{tmp_path}:{runs.ROOT}", tmp_path / "out.jsonl"
    flags = "--parts=kernels,engine", "--budget=kernels=3600,engine=0", "--seconds=3600", f"--output={output}"
    status, lines = run(*flags, PYTHONPATH=path)
    assert status == 1
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    first, *found, last = lines
    assert first["name"] == "packages" and isinstance(first["missing"], list)
    checked = {(line["name"], line["dtype"]): line["ok"] for line in found if line.get("unit") == "relative"}
    wrong = {("paged_attention_error", dtype) for dtype in ("float32", "bfloat16")}
    kernels = "attention_blocked", "swiglu_blocked", "swiglu_triton", "grouped_matmul_ragged", "paged_attention"
    assert checked.keys() == {(f"{name}_error", dtype) for name in kernels for dtype in ("float32", "bfloat16")}
    assert {key for key, ok in checked.items() if not ok} == wrong
    (skipped,) = [line for line in found if "skipped" in line]
    assert skipped["name"] == "engine" and "not begun" in skipped["skipped"]
    assert last["name"] == "verdict" and last["wrong"] == ["kernels"] and last["failed"] == ["engine", "kernels"]


def said(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_part_that_takes_too_long_is_ended(capsys):
    report = gpu.Report("")
    gpu.run_part(report, "model", allowed=0.2, small=True)
    late, seconds = said(capsys)
    assert late["ok"] is False and "not done after 0 s" in late["error"] and seconds["name"] == "model_seconds"
    assert report.wrong == {"model"}


def test_a_part_that_dies_is_a_line_with_its_last_words(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "environment", lambda: os.environ | {"JAX_PLATFORMS": "no_such_platform"})
    gpu.run_part(gpu.Report(""), "kernels", allowed=3600, small=True)
    died, _ = said(capsys)
    assert died["ok"] is False and "status 1" in died["error"] and "no_such_platform" in died["error"]


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "installed", lambda name: "" if name in ("grain", "optax") else "1.0")
    assert gpu.missing() == ["optax", "grain"]

    monkeypatch.delitem(sys.modules, "benchmarks.on_gpu.training")
    monkeypatch.setitem(sys.modules, "k25_jax.preflight.cost", None)  # as if it were not there
    assert gpu.main(["--part=training"]) == 0
    (line,) = said(capsys)
    assert line["ok"] is False and line["lacks"] == "k25_jax.preflight.cost" and line["part"] == "training"


def test_a_failed_figure_does_not_end_its_part(capsys):
    def fails(text):
        raise ValueError(text)

    part = Run("grouped", small=True, ends=float("inf"))
    part.attempt("first", fails, "out of registers")
    part.attempt("second", part.line, "second", float("nan"), "TFLOP/s")
    part.ends = 0.0
    part.attempt("third", fails, "never called", seconds=5)
    first, second, third = said(capsys)
    assert first["ok"] is False and first["error"] == "ValueError: out of registers"
    assert second["value"] == "nan" and "needs 5" in third["skipped"]


def test_the_training_step_lowers_for_a_gpu_that_is_not_there():
    """With the kernels chosen there: each of three products forward, once more for the backward pass, and two gradients."""
    experiment = training.experiment_of(training.minute(), 2, 64, "bfloat16", side=4, remat="full")
    card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    sizes, types = (1,) * len(AXES), (AxisType.Auto,) * len(AXES)
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, AXES, axis_types=types, abstract_device=card)):
        arguments = abstract_state(experiment), training.make_batch(experiment, 0)
        lowered = make_step(experiment, loss_fn).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3 * (1 + 1 + 2)


@pytest.mark.parametrize(
    "flag, words", [("--parts=kernel", "no part 'kernel'"), ("--budget=kernel=3", "no part 'kernel'")]
)
def test_parts_that_there_are_not_are_refused(capsys, flag, words):
    with pytest.raises(SystemExit):
        gpu.main([flag])
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_prints_its_figures_and_none_fails():
    budget = ",".join(f"{name}=900" for name in gpu.PARTS)
    status, lines = run("--seconds=3600", f"--budget={budget}")
    assert status == 0, lines
    assert not [line for line in lines if line.get("ok") is False or "skipped" in line or "error" in line]
    parts = [line["part"] for line in lines if line["unit"] and line["name"] != f"{line['part']}_seconds"]
    assert set(gpu.PARTS) <= set(parts)
    figures = {line["name"] for line in lines if line["value"] is not None}
    assert {
        "step_loss_error", "engine_same_answers", "grouped_minute_heavy_forward_backward", "attention_minute_packed_xla",
        "training_step_auto", "engine_2",
    } <= figures  # fmt: skip
