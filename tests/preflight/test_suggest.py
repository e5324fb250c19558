"""Settings that are tried where a step does not fit; on this machine's compiler, with a device of little memory."""

import json

import pytest

from chips import chips_of
from k25_jax.cli import main
from k25_jax.config import load_experiment
from k25_jax.preflight import aot, topology
from k25_jax.preflight.suggest import changes, suggest
from k25_jax.preflight.table import render
from k25_jax.preflight.topology import Chip, Topology, parse_topology
from k25_jax.train.layout import idle_packs

SMALL = ("model.text.layers=2", "model.vision.layers=1", "data.batch_size=64", "data.packs=0")


def test_what_costs_least_comes_first():
    """Nothing is undone on the way; what does not divide is left out; flags make the same experiment."""
    base = ["train.accumulate=1", "train.remat=dots", "data.packs=131072"]
    experiment = load_experiment("pretrain/k25_1t", base)
    found = list(changes(experiment, chips_of(parse_topology("v5p-1024"))))
    assert [" ".join(change.flags[-2:] if i >= 5 else change.flags[-1:]) for i, change in enumerate(found)] == [
        "--config.data.packs=6656", "--config.train.accumulate=2", "--config.train.remat=full",
        "--config.train.accumulate=4", "--config.optim.offload=True",
        "--config.data.batch_size=8192 --config.data.packs=3584",
        "--config.data.batch_size=4096 --config.data.packs=2048",
    ]  # fmt: skip
    for change in found:
        overrides = [flag.removeprefix("--config.") for flag in change.flags]
        assert load_experiment("pretrain/k25_1t", [*base, *overrides]) == change.experiment


@pytest.mark.slow
def test_the_first_that_fits_is_named():
    """A device that has a little less than the step takes; what is named fits by itself too."""
    experiment = load_experiment("pretrain/demo", SMALL)
    report = aot.preflight(experiment, Topology(Chip("cpu", hbm_bytes=1e12)))
    assert report.temp_gb > report.argument_gb  # activations, which parts of the batch make fewer
    device, said = Topology(Chip("cpu", hbm_bytes=0.9 * report.peak_hbm_gb * 1e9)), []
    report.tried = suggest(experiment, device, report, said.append)
    *others, last = report.tried
    assert last["fits"] and last["peak_hbm_gb"] <= 0.9 * report.peak_hbm_gb
    assert not any(other["fits"] for other in others) and last["flags"][0] == "--config.train.accumulate=2"
    assert "up to 6 other settings" in said[0] and "try 1: --config.train.accumulate=2" in said
    assert f"instead    fits: {last['peak_hbm_gb']:.2f} GB with --config.train.accumulate=2" in render(report)


def test_a_state_that_is_too_large_costs_no_compilation(monkeypatch, capsys):
    monkeypatch.setattr(topology, "parse_topology", lambda name: Topology(Chip("cpu", hbm_bytes=1e6)))
    flags = [f"--config.{setting}" for setting in SMALL]
    assert main(["preflight", "--config=pretrain/demo", "--topology=cpu", "--json", "--suggest", *flags]) == 1
    out = json.loads(capsys.readouterr().out)
    assert not out["fits"] and out["compile_s"] == 0 and "the state and the batch alone" in out["reason"]
    (tried,) = out["tried"]
    assert "--config.optim.offload=True" in tried["flags"] and not tried["compiled"] and not tried["fits"]


def test_packs_that_stay_empty_are_named():
    experiment = load_experiment("pretrain/k25_1t", ["data.batch_size=1024"])
    assert "data.packs=8192 are 20 times" in idle_packs(experiment) and "about data.packs=410" in idle_packs(experiment)
    assert not idle_packs(load_experiment("pretrain/k25_1t")) and not idle_packs(
        aot.with_rows(load_experiment("pretrain/k25_1t"), 1024)
    )
    for name in ("pretrain/moonlight_16b", "vit/k25_1t", "pretrain/demo", "pretrain/k25_1b", "pretrain/k25_100m"):
        assert not idle_packs(load_experiment(name)), name
