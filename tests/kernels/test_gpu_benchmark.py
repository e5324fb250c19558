"""benchmarks/gpu.py from end to end where there is no GPU, in small sizes: so that it works the first time there is one."""

import json
import os
import subprocess
import sys

import pytest

import runs
from benchmarks import gpu

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

    def absent(name):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    monkeypatch.setattr(gpu.importlib, "import_module", absent)
    assert gpu.main(["--part=training"]) == 0
    (line,) = said(capsys)
    assert line["ok"] is False and line["lacks"] == "optax" and line["part"] == "training"


def test_a_failed_figure_does_not_end_its_part(capsys):
    from benchmarks.on_gpu.run import Run

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
