"""`k25 preflight --what=sample`: what an engine needs of each device, and what fits beside its weights."""

import importlib.util
import json

import jax
import pytest

from k25_jax.cli import main
from k25_jax.config import preset
from k25_jax.models.count import count_params
from k25_jax.models.k25 import KEPT, abstract_params
from k25_jax.preflight import sample
from k25_jax.preflight.topology import parse_topology
from k25_jax.sampling.layout import Layout
from k25_jax.sampling.requests import EngineConfig

DEMO = "experiments/pretrain/demo.py"
SMALL = ("--config.model.text.layers=4", "--config.model.vision.layers=1")
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the preflight extra")


def judged(hbm: float, requests: int, length: int):
    """A report over eight devices of `hbm` GB: weights 4, programs 0.5, temporaries 1 for `requests`, 1 MB a token."""
    report = sample.SampleReport("v5e:2x4", 8, {"expert": 4, "tensor": 2}, requests, length, hbm_gb=hbm, weights_gb=4.0)
    report.programs = [
        sample.Program("decode", 1.0, 0.3, 0.0, 0.0),
        sample.Program("decode and read", 0.5, 0.2, 0.0, 0.0),
    ]
    report.cache_token_bytes = 1e6
    share = EngineConfig(rows=(requests,), pages=requests * length // 16).share(8)
    report.cache_gb = share.pages * 16 * 1e6 / 1e9
    sample._judge(report, share, parse_topology("v5e-8"), 2**15)
    return report


def test_the_largest_number_of_requests_fits_and_one_more_does_not():
    report = judged(95.0, 64, 4096)
    assert report.fits and report.peak_gb == pytest.approx(4 + 0.5 + 1 + 8 * 4.096)
    assert [entry["length"] for entry in report.largest] == [4096, 8192, 16384, 32768]

    def need(requests: int, length: int) -> float:
        here = requests / 8  # temporaries are those of 8 requests a device, and grow with more
        return 4.5 + max(1.0, here / 8) + here * length * 1e-3

    for entry in report.largest:
        assert need(entry["requests"], entry["length"]) <= 95.0 < need(entry["requests"] + 8, entry["length"])
    assert report.read_ms == pytest.approx((4 + 8 * 4.096) / 0.819)


def test_what_does_not_fit_is_told_the_nearest_that_does():
    report = judged(16.0, 64, 4096)
    assert not report.fits and "38.3 GB are needed, a device has 16" in report.reason
    assert report.nearest == ["--rows=16 --length=4096", "--rows=64 --length=1312"]
    assert judged(16.0, 16, 4096).fits and judged(16.0, 64, 1312).fits
    assert "DOES NOT FIT" in sample.render(report) and "fits       --rows=16 --length=4096" in sample.render(report)


def test_weights_that_are_too_many_are_shown_another_mesh_or_slice():
    config, chip = preset("k25_1t"), parse_topology("v5e-256")
    (other,) = sample._other_devices(config, chip, 64)
    assert other.startswith("--topology=v5e-256 --tensor=16: 12.") and "GB of weights" in other
    (same,) = sample._other_devices(config, parse_topology("v5p-512"), 256)
    assert same.startswith("--tensor=2: 2")


def test_weights_of_one_device_are_those_of_the_model():
    """Two bytes a parameter, and four for what stays in float32."""
    config = preset("tiny")
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    kept = sum(a.size for path, a in leaves if any(name in jax.tree_util.keystr(path) for name in KEPT))
    assert 0 < kept < count_params(config)["total"]
    assert sample.weights_bytes(config, Layout()) == 2 * (count_params(config)["total"] + kept)


def test_the_command_reports_what_it_compiled(capsys):
    flags = ["--what=sample", "--topology=cpu", "--rows=3", "--length=100", "--json", *SMALL]
    assert main(["preflight", f"--config={DEMO}", *flags]) == 0
    out, said = capsys.readouterr()
    report = json.loads(out)
    assert report["fits"] and report["requests"] == 3 and report["length"] == 100 and report["chips"] == 1
    assert report["cache_token_bytes"] == 4 * 40 * 2 and report["cache_gb"] * 1e9 == 3 * 112 * 320
    assert [program["name"] for program in report["programs"]] == ["decode", "decode and read"]
    assert all(program["temp_gb"] > 0 for program in report["programs"]) and said.count("3 of 4 layers") == 2
    assert said.count("compiling decode, 4 of 4 layers") == 1
    assert main(["preflight", f"--config={DEMO}", "--what=sample", "--topology=cpu", "--length=9999"]) == 2
    assert "--length at most 1024" in capsys.readouterr().err


@pytest.mark.slow
@TPU
def test_an_engine_for_eight_chips_that_are_not_here(monkeypatch, capsys):
    """Temporaries of all layers by a few of them are those of all; and a program is compiled anew, not read in vain."""
    flags = ["--what=sample", "--topology=v5e-8", "--rows=64", "--length=1024", "--json", *SMALL]
    flags[-2] = "--config.model.text.layers=8"
    reports = []
    for moe_layers in ((2, 4), (7, 7), (2, 4)):
        monkeypatch.setattr(sample, "MOE_LAYERS", moe_layers[0])
        monkeypatch.setattr(sample, "MORE_LAYERS", moe_layers[1])
        assert main(["preflight", f"--config={DEMO}", *flags]) == 0
        out, said = capsys.readouterr()
        assert "compilation cache" not in said
        reports.append(json.loads(out))
    by_few, by_all, again = reports
    assert by_few["mesh"] == {"expert": 8, "tensor": 1} and by_few["hbm_gb"] == 16.0
    for a, b, c in zip(*(report["programs"] for report in reports), strict=True):
        assert a["name"] == b["name"] and a["temp_gb"] == pytest.approx(b["temp_gb"], rel=0.1) == c["temp_gb"]
