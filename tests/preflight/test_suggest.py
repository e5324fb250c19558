"""Settings that are tried where a step does not fit; on this machine's compiler, with a device of little memory."""

import dataclasses
import json

import pytest

from k25_jax.cli import main
from k25_jax.config import load_experiment
from k25_jax.preflight import aot, topology
from k25_jax.preflight.suggest import changes, suggest
from k25_jax.preflight.table import render
from k25_jax.preflight.topology import Chip, Topology
from k25_jax.train.layout import idle_packs

SMALL = ("model.text.layers=2", "data.seq_len=256", "model.vision.layers=1", "data.pack_patches=64", "data.packs=0")


def test_what_costs_least_comes_first():
    """Nothing is undone on the way, and each step is written as flags that make the same experiment."""
    experiment = load_experiment("pretrain/k25_1t", ["data.batch_size=1024", "train.accumulate=1", "train.remat=dots"])
    found = list(changes(experiment, 512))
    assert [change.flags[-1] for change in found] == [
        "--config.data.packs=512", "--config.train.accumulate=2", "--config.train.remat=full",
        "--config.train.accumulate=4", "--config.optim.offload=True", "--rows=512", "--rows=256",
    ]  # fmt: skip
    overrides = [flag.removeprefix("--config.") for flag in found[4].flags]
    assert load_experiment("pretrain/k25_1t", ["data.batch_size=1024", *overrides]) == found[4].experiment
    assert found[5].experiment.data.batch_size == 512 and found[5].experiment.train.accumulate == 4


@pytest.fixture(scope="module")
def little():
    """(an experiment, a device that it does not fit by little, what preflight says of it)."""
    experiment = load_experiment("pretrain/demo", SMALL)
    peak = aot.preflight(experiment, Topology(Chip("cpu", hbm_bytes=1e12))).peak_hbm_gb
    device = Topology(Chip("cpu", hbm_bytes=0.9 * peak * 1e9))
    return experiment, device, aot.preflight(experiment, device)


def test_the_first_that_fits_is_named(little):
    experiment, device, report = little
    assert not report.fits and "are needed" in report.reason
    said = []
    report.tried = suggest(experiment, device, report, said.append)
    *others, last = report.tried
    assert last["fits"] and last["peak_hbm_gb"] <= report.hbm_gb < report.peak_hbm_gb
    assert not any(other["fits"] for other in others) and last["flags"][0] == "--config.train.accumulate=2"
    assert "up to 6 other settings" in said[0] and "try 1: --config.train.accumulate=2" in said
    assert f"instead    fits: {last['peak_hbm_gb']:.2f} GB with --config.train.accumulate=2" in render(report)
    repeated = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, accumulate=2))
    assert aot.preflight(repeated, device).fits == (len(report.tried) == 1)


def test_a_state_that_is_too_large_costs_no_compilation(little, monkeypatch, capsys):
    experiment, _, report = little
    tiny = Chip("cpu", hbm_bytes=0.5 * report.argument_gb * 1e9)
    monkeypatch.setattr(topology, "parse_topology", lambda name: Topology(tiny))
    flags = [f"--config.{setting}" for setting in SMALL]
    assert main(["preflight", "--config=pretrain/demo", "--topology=cpu", "--json", "--suggest", *flags]) == 1
    out = json.loads(capsys.readouterr().out)
    assert not out["fits"] and out["compile_s"] == 0 and "the state and the batch alone" in out["reason"]
    assert out["tried"] and not any(entry["compiled"] or entry["fits"] for entry in out["tried"])


def test_packs_that_stay_empty_are_named():
    experiment = load_experiment("pretrain/k25_1t", ["data.batch_size=1024"])
    assert "data.packs=8192 are 20 times" in idle_packs(experiment) and "about data.packs=410" in idle_packs(experiment)
    assert not idle_packs(load_experiment("pretrain/k25_1t")) and not idle_packs(aot.with_rows(experiment, 8192))
    for name in ("pretrain/moonlight_16b", "vit/k25_1t", "pretrain/demo", "pretrain/k25_1b", "pretrain/k25_100m"):
        assert not idle_packs(load_experiment(name)), name
