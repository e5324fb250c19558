"""Every experiment on every topology that README names: its set-up, by the code that training and preflight run.

No device is there; chips only say where they stand. What is refused must be too small for so many chips: by the rows or
packs of its batch, or by a mesh that needs more of them. Nothing may fail because numbers merely do not divide.
"""

import importlib.util
import pathlib
import re

import pytest

from chips import chips_of
from k25_jax.cli import main
from k25_jax.config import ConfigError, experiments, load_experiment
from k25_jax.preflight import aot
from k25_jax.preflight.topology import devices_of, parse_topology
from k25_jax.sharding.processes import hosts_of, owners_of, readers
from k25_jax.train.layout import lanes_of, mesh_of

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
TOPOLOGIES = sorted(set(re.findall(r"\b(?:\d+x)?v\d\w*-\d+\b", README)))
DEVICES = {name: chips_of(parse_topology(name)) for name in TOPOLOGIES}
TABLE = re.findall(r"^\| `(\w+)`[^|]*\| (v\d\w*-\d+): (\d+) \| (\d+) rows of (\d+)(.*?)\|", README, flags=re.M)


def variants(name: str) -> list[str]:
    """An experiment with each argument that its file takes, but for `runlocal`: those that it names when it gets none."""
    with pytest.raises(ConfigError) as refused:
        load_experiment(f"{name}:nonsense")
    words = re.findall(r"[\w.]+", str(refused.value).partition("it can be")[2])
    arguments = [word for word in words if word not in ("one", "of", "and", "or", "runlocal")]
    return [f"{name}:{argument}" for argument in arguments] or [name]


def test_there_is_something_to_test():
    assert {"v5e-1", "v5p-512", "2xv5p-1024"} <= set(TOPOLOGIES) and len(TABLE) >= 6
    assert "midtrain/k25_1t:262144" in variants("midtrain/k25_1t") and variants("pretrain/demo") == ["pretrain/demo"]


def too_small(error: ConfigError) -> bool:
    """Whether it says that there is less of something than the least that would do."""
    if found := re.search(r"=(\d+) must be a multiple of (\d+) .*take fewer devices", str(error)):
        return int(found[1]) < int(found[2])
    found = re.search(r"needs a multiple of (\d+) devices, there are (\d+)", str(error))
    return bool(found) and int(found[2]) < int(found[1])


@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_is_refused_only_where_it_is_too_small(name):
    for variant in variants(name):
        experiment, taken = load_experiment(variant), []
        for topology in TOPOLOGIES:
            try:
                mesh = mesh_of(experiment, DEVICES[topology])
            except ConfigError as error:
                assert too_small(error), (variant, topology, str(error))
                continue
            taken.append(topology)
            everyone, lanes = readers(owners_of(mesh)), lanes_of(experiment.data, mesh)
            assert set(hosts_of(mesh)) == {process for reader in everyone for process in reader.processes}
            for whole in (experiment.data.batch_size, experiment.data.packs, lanes):
                assert whole % len(everyone) == 0 and whole % lanes == 0, (variant, topology)
        assert taken, variant


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}")
def test_what_the_table_names_is_taken_with_its_rows_and_parts(row):
    name, topology, count, rows, length, rest = row
    parts = re.search(r"accumulate=(\d+)|in (\d+) parts", rest)
    overrides = [f"train.accumulate={parts[1] or parts[2]}"] if parts else []
    experiment = load_experiment(f"pretrain/{name}", overrides)
    assert experiment.data.seq_len == int(length) and len(DEVICES[topology]) == int(count)
    mesh_of(aot.with_rows(experiment, int(rows)), DEVICES[topology])


def test_a_model_too_large_for_its_chips_is_told_without_compiling(monkeypatch, capsys):
    monkeypatch.setattr(aot, "devices_of", chips_of)
    assert main(["preflight", "--config=pretrain/k25_1t", "--topology=v5p-128"]) == 1
    told = re.search(
        r"DOES NOT FIT: the state and the batch alone are (\S+) GB, .*at least (\d+) dev", capsys.readouterr().out
    )
    assert 95 < float(told[1]) < 200 and 64 < int(told[2]) <= 128


def test_lanes_that_do_not_divide_are_refused_and_none_are_as_many_as_read():
    devices = DEVICES["v5p-512"]
    experiment = load_experiment("vit/moonlight_16b", ["data.lanes=0"])
    assert lanes_of(experiment.data, mesh_of(experiment, devices)) == 64
    with pytest.raises(ConfigError, match="data.lanes=32 must be a multiple of the 64 processes that read, or 0"):
        mesh_of(load_experiment("vit/moonlight_16b", ["data.lanes=32"]), devices)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the preflight extra")
@pytest.mark.parametrize("name", [*TOPOLOGIES, "v6e-16", "v7x-8"])
def test_the_chips_stand_as_those_of_the_compiler(name):
    topology = parse_topology(name)
    where = lambda device: (tuple(device.coords), device.core_on_chip, device.process_index, device.device_kind)  # noqa: E731
    assert [where(device) for device in devices_of(topology)] == [where(device) for device in chips_of(topology)]
