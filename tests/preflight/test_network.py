"""Seconds of collectives on a torus, against what is known of rings, and by hand; one link takes a byte a second."""

import numpy as np
import pytest

from chips import V5E, V5P, V7X, chips
from k25_jax.preflight import hlo
from k25_jax.preflight.exchange import axes_of, exchanged
from k25_jax.preflight.network import network_of
from k25_jax.preflight.topology import CHIPS, parse_topology
from k25_jax.sharding.mesh import make_mesh


def groups_of(shape, axis):
    return np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, -1).reshape(-1, shape[axis]).tolist()


def network(kind, sides, cores=1):
    """The links between chips in the order x, y, z, core."""
    devices = sorted(chips(kind, sides, cores=cores), key=lambda chip: (*chip.coords, chip.core_on_chip))
    return network_of(np.asarray(devices), 1.0)


@pytest.mark.parametrize("side", range(3))
def test_gathering_along_a_ring_and_along_a_line(side):
    """A ring has both its links, half of a side one; three sides at once have six."""
    cube, flat = network(V5P, (8, 8, 8)), network(V5E, (4, 4, 1))
    want = np.eye(3)[side]
    assert cube.busy("all-gather", groups_of((8, 8, 8), side)) == pytest.approx(want / 2)
    whole = [list(range(512))]
    assert cube.busy("reduce-scatter", whole) == pytest.approx(np.full(3, 1 / 6))
    if side < 2:
        assert flat.busy("all-reduce", groups_of((4, 4), side)) == pytest.approx(want)
    halves = np.asarray(groups_of((8, 8, 8), side))
    assert cube.busy("all-gather", halves[:, :4].tolist()) == pytest.approx(want)
    assert cube.busy("all-gather", halves[:, ::2].tolist()) == pytest.approx(want)  # two rings on the same links


def test_all_to_all_takes_as_long_as_the_middle_is_narrow():
    """On a ring of n an eighth of n times what a device has, all of it sent but its own share; on a line a quarter."""
    ring, line = network(V5E, (8, 16, 1)), network(V5E, (8, 8, 1))
    share = lambda n: n / (n - 1)  # noqa: E731
    assert ring.busy("all-to-all", groups_of((8, 16), 1)) == pytest.approx([0, 16 / 8 * share(16), 0])
    assert line.busy("all-to-all", groups_of((8, 8), 1)) == pytest.approx([0, 8 / 4 * share(8), 0])
    assert ring.busy("all-to-all", [list(range(128))]) == pytest.approx(np.asarray([8 / 4, 16 / 8, 0]) * share(128))


def test_a_permutation_takes_as_long_as_its_busiest_link():
    ring = network(V5E, (8, 16, 1))
    forward = [(a, b) for group in groups_of((8, 16), 1) for a, b in zip(group, group[1:] + group[:1], strict=True)]
    assert ring.busy("collective-permute", forward).tolist() == [0, 1, 0]
    by_two = [(a, group[(i + 2) % 16]) for group in groups_of((8, 16), 1) for i, a in enumerate(group)]
    assert ring.busy("collective-permute", by_two).tolist() == [0, 2, 0]
    across = [(a, group[(i + 8) % 16]) for group in groups_of((8, 16), 1) for i, a in enumerate(group)]
    assert ring.busy("collective-permute", across).tolist() == [0, 4, 0]  # half of it each way
    assert ring.busy("collective-permute", [(0, 127)]).tolist() == [1, 1, 0]  # up the line, round the ring


def test_two_cores_share_the_links_of_their_chip():
    cube = network(V7X, (4, 4, 4), cores=2)
    assert cube.cores == 2
    alone = [[2 * chip for chip in group] for group in groups_of((4, 4, 4), 0)]
    both = [[core for chip in group for core in (2 * chip, 2 * chip + 1)] for group in groups_of((4, 4, 4), 0)]
    assert cube.busy("all-gather", alone) == pytest.approx([1.0, 0, 0])  # two such groups on two links
    assert cube.busy("all-gather", both) == pytest.approx([0.5, 0, 0])
    assert cube.busy("all-gather", [[0, 1], [2, 3]]).tolist() == [0, 0, 0]  # inside a chip


def test_a_ring_through_a_square():
    """All of a 4x4 in one ring of neighbours: no block of the lines, but two links for each."""
    mesh = make_mesh(fsdp=16, devices=chips(V5E, (4, 4, 1)))
    (axis,) = axes_of(mesh, list(mesh.devices.flat), parse_topology("v5e-16"))
    assert axis["hops"] == 1.0 and axis["gather_rate"] == pytest.approx(2 * CHIPS["v5e"].link)
    corner = network_of(mesh.devices, 1.0)
    assert corner.busy("all-gather", [[0, 1, 2, 3, 4, 5]]).max() > 0.5


PROGRAM = """HloModule m

ENTRY %main (a: bf16[1024]) -> bf16[8192] {
  %a = bf16[1024]{0} parameter(0)
  %p = bf16[1024]{0} collective-permute(%a), source_target_pairs={PAIRS}, channel_id=1
  ROOT %g = bf16[8192]{0} all-gather(%p), replica_groups=[64,8]<=[4,8,16]T(0,2,1), dimensions={0}, channel_id=2
}
"""


def test_the_exchanges_of_a_program_in_seconds():
    """On v5p-1024 fsdp has a ring of its own; the stages of the pipeline stand two links apart."""
    topology = parse_topology("v5p-1024")
    devices = chips(V5P, (8, 8, 8))
    mesh = make_mesh(4, 8, 16, devices=devices)
    links = {entry["axis"]: entry["gather_rate"] / topology.chip.link for entry in axes_of(mesh, devices, topology)}
    assert links == pytest.approx({"pipe": 1.0, "fsdp": 2.0, "expert": 3.0}) and topology.chip.link == 100e9
    pairs = ",".join(f"{{{i},{(i + 128) % 512}}}" for i in range(512))
    program = hlo.parse(PROGRAM.replace("PAIRS", pairs))
    times, _, _ = hlo.runs(program)
    entries, busiest, across = exchanged(program, times, mesh, topology)
    gathered, passed = 7 * 2048 / 200e9, 2 * 2048 / 100e9
    assert {(e["kind"], *e["axes"]): e["seconds"] for e in entries} == pytest.approx(
        {("all-gather", "fsdp"): gathered, ("collective-permute", "pipe"): passed}
    )
    assert busiest == pytest.approx(max(gathered, passed)) and across == 0  # on two sides of the torus
