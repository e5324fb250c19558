"""`k25 preflight`: names of topologies, what it reports and with which status it ends."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

import runs
from k25_jax.cli import main
from k25_jax.config import ConfigError, load_experiment
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.preflight import aot, topology
from k25_jax.preflight.topology import CHIPS, parse_topology, slices
from k25_jax.sharding.mesh import make_mesh
from k25_jax.vision.patchpack import Clip

DEMO = "experiments/pretrain/demo.py"
SMALL = ("--config.model.text.layers=2", "--config.data.seq_len=64", "--config.data.pack_patches=64")
SMALL += ("--config.model.vision.layers=1",)

NAMES = {
    "v5p-1024": ("v5p", (8, 8, 8)),
    "v5p-512": ("v5p", (4, 8, 8)),
    "v5p-256": ("v5p", (4, 4, 8)),
    "v5p-128": ("v5p", (4, 4, 4)),
    "v5p-64": ("v5p", (2, 4, 4)),
    "v5p-8": ("v5p", (2, 2, 1)),
    "v5p-12288": ("v5p", (16, 16, 24)),
    "v5litepod-16": ("v5e", (4, 4)),
    "v5e-8": ("v5e", (2, 4)),
    "v5e-1": ("v5e", (1, 1)),
    "v6e-256": ("v6e", (16, 16)),
    "tpu7x-128": ("tpu7x", (4, 4, 4)),
    "v7x-8": ("tpu7x", (2, 2, 1)),
    "v5p:4x4x12": ("v5p", (4, 4, 12)),
}


def test_names_of_several_slices():
    two = parse_topology("2xv5p-512")
    assert (two.chip.name, two.shape, two.slices, two.name) == ("v5p", (4, 8, 8), 2, "2xv5p:4x8x8")
    assert two.slice_name == "v5p:4x8x8" == parse_topology("v5p-512").name and parse_topology("v5p-512").slices == 1
    assert parse_topology("16xv5e:4x4").slices == 16


@pytest.mark.parametrize("name", NAMES)
def test_names_of_slices(name):
    parsed = parse_topology(name)
    assert (parsed.chip.name, parsed.shape) == NAMES[name] and parsed.is_tpu


WRONG = {
    "v5p-100": r"v5p-64 \(32 chips\) or v5p-128 \(64 chips\)",
    "v5e-300": "v5e-256 .256 chips.",
    "v5x-8": "v5p-8",
    "v5p": "v5p-8",
    "v5p:8x8": "3 sides, .* v5p:",
    "v5e:2x2x2": "2 sides",
    "v5p:0x2x2": "3 sides",
    "v5p:64x64x64": "at most 6144 chips",
    "2xv5p-100": r"v5p-64 \(32 chips\)",
    "0xv5p-64": "at least one",
    "2xcpu": "of TPUs",
    "2x2xv5p-64": "did you mean",
    "": "did you mean",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_told_the_nearest(name):
    with pytest.raises(ConfigError, match=WRONG[name]):
        parse_topology(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_slice_has_its_own_size_and_all_sides(chip):
    sizes = [math.prod(shape) for shape in slices(chip)]
    assert len(set(sizes)) == len(sizes) and sizes == sorted(sizes) and sizes[-1] <= chip.largest
    assert all(len(shape) == chip.dims for shape in slices(chip))


def test_no_tpu_compiler_is_one_line_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert main(["preflight", f"--config={DEMO}", "--topology=v5e-8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install -e ".[preflight]"' in error


MISTAKES = {
    "--topology=v5p-1000": "v5p-1024",
    "--topology=cpu --rows=-1": "--rows=-1",
    "--topology=cpu --config.mesh.expert=3": "mesh.expert",
    "--topology=cpu --config.train.stepz=3": "did you mean 'steps'",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, capsys):
    assert main(["preflight", f"--config={DEMO}", *mistake.split()]) == 2
    out, error = capsys.readouterr()
    assert out == "" and MISTAKES[mistake] in error and error.count("\n") == 1


def test_a_step_on_this_machine_in_a_process_of_its_own():
    """Standard output is one line of JSON; what it reports is what the step holds."""
    done = runs.k25("preflight", f"--config={DEMO}", "--topology=cpu", "--rows=2", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["fits"] and report["chips"] == 1 and report["mesh"] == {"pipe": 1, "fsdp": 1, "context": 1, "expert": 1}
    )
    assert report["rows"] == 2 and report["packs"] == 1  # half a pack for each row, as in the experiment
    assert 0.5 < report["flops_compiled"] / report["flops_asked"] < 1.05
    assert report["argument_gb"] + report["temp_gb"] <= report["peak_hbm_gb"] < 1
    assert report["collectives"] == [] and report["compile_s"] > 0 and 0.1 < report["rss_gb"] < 10
    assert report["largest"][0]["bytes"] >= report["largest"][-1]["bytes"] > 0
    assert "lowering" in done.stderr and "compiling" in done.stderr


def test_the_batch_is_that_of_the_pipeline():
    experiment = load_experiment(DEMO)
    clip = Clip(np.zeros((4, 588), np.uint8), (1, 2, 2))
    words = [experiment.model.media_pad_id, 1]
    example = make_example(words, [1.0, 1.0], [clip], experiment.model.media_pad_id)
    real = pack_examples([example], experiment.data, experiment.model)
    shapes = aot.abstract_batch(experiment, make_mesh(devices=jax.devices()[:1]))
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, shapes, real)))


def test_the_layout_lists_every_array_with_its_share():
    """Over 2 x 4 devices, of the experts an eighth lies on each."""
    script = f"""
        from k25_jax.cli import main
        flags = ["--json", "--config.mesh.expert=4", "--config.data.packs=8", "--topology=cpu", "--layout"]
        assert main(["preflight", "--config={DEMO}", *flags]) == 0
    """
    tensors = {tensor["name"]: tensor for tensor in json.loads(runs.on_eight_devices(script))}
    gate = tensors["state.params.moe.moe.experts.gate"]
    assert gate["shape"] == [2, 8, 96, 64] and gate["layout"] == "-, expert, fsdp, -"
    assert gate["bytes"] == 2 * 8 * 96 * 64 * 4 / 8
    assert tensors["batch.tokens_BL"]["bytes"] == 8 * 256 * 4 / 8
    state = [tensor for name, tensor in tensors.items() if name.startswith("state.")]
    params = sum(np.prod(t["shape"]) for n, t in tensors.items() if n.startswith("state.params."))
    assert params == 990656 and len(state) > 100


def test_what_lies_on_the_host_is_told_apart(capsys):
    """The means of 990656 parameters, two each, are beside what the device holds."""
    flags = ["--topology=cpu", "--layout", "--config.optim.offload=True"]
    assert main(["preflight", f"--config={DEMO}", *flags]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    on_host = [row for row in rows if row.endswith(" on the host")]
    assert on_host and all("state.opt_state." in row for row in on_host)
    assert total.endswith(f", beside {2 * 990656 * 4 / 1e9:.4f} in its host's memory")


def test_what_does_not_fit_is_named_with_status_1(monkeypatch, capsys):
    """A chip with next to no memory; the largest arrays are listed, and an unfitting step is no error."""
    report = aot.Report(
        "v5e:1x1", 1, {"pipe": 1, "fsdp": 1, "context": 1, "expert": 1}, 8, 4, hbm_gb=16.0, argument_gb=2.0
    )
    report.largest = [dict(name="state.params.head", shape=(8, 8), dtype="float32", layout="-, -", bytes=2e9)]
    aot._refused(report, REFUSAL)
    monkeypatch.setattr(aot, "preflight", lambda *arguments, **settings: report)
    assert main(["preflight", f"--config={DEMO}", "--topology=v5e-1"]) == 1
    out, _ = capsys.readouterr()
    assert "DOES NOT FIT" in out and "exceeds available HBM" in out and "state.params.head" in out
    assert main(["preflight", f"--config={DEMO}", "--topology=v5e-1", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert not values["fits"] and values["peak_hbm_gb"] == pytest.approx(26.86 * 2**30 / 1e9)
    assert values["temp_gb"] == pytest.approx(values["peak_hbm_gb"] - 2.0)


REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.86G) exceeds "
    "available HBM (15.75G)."
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the preflight extra")
def test_a_step_for_eight_chips_that_are_not_here():
    flags = ("--topology=v5e-8", "--config.mesh.expert=4", "--config.data.packs=8", "--json", *SMALL)
    done = runs.k25("preflight", f"--config={DEMO}", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fits"] and report["chips"] == 8 and report["hbm_gb"] == 16.0
    assert report["unknown_loops"] == 4  # chunks of the experts, forward and backward, as asked for and as compiled
    exchanged = {(entry["kind"], *entry["axes"]) for entry in report["collectives"]}
    assert ("all-gather", "expert") in exchanged and report["mfu_bound"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the preflight extra")
def test_a_step_for_two_slices_that_are_not_here():
    """Only fsdp crosses the network between them; the experts' exchange stays inside a slice."""
    flags = ("--topology=2xv5e:2x2", "--config.mesh.expert=4", "--config.data.packs=8", "--json", *SMALL)
    done = runs.k25("preflight", f"--config={DEMO}", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["chips"] == 8 and report["mesh"] == {"pipe": 1, "fsdp": 2, "context": 1, "expert": 4}
    exchanged = {(entry["kind"], *entry["axes"]) for entry in report["collectives"]}
    assert ("all-gather", "expert") in exchanged and ("all-gather", "dcn") in exchanged
    assert not any("fsdp" in entry["axes"] for entry in report["collectives"])
