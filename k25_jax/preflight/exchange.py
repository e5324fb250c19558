"""What the devices of a mesh exchange in a step, and how long it takes on their links at least (K2.5 §3.8)."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from k25_jax.preflight import hlo
from k25_jax.preflight.network import BY_RINGS, Network, network_of
from k25_jax.preflight.topology import Topology
from k25_jax.sharding.mesh import plain_order, slice_shape
from k25_jax.sharding.torus import hops


def axes_of(mesh: Mesh, devices: Sequence, topology: Topology) -> list[dict]:
    """Of each axis of more than one device: mean links to the next device, on the mesh and in the order of `devices`.

    And bytes a second that a device takes in when it gathers along the axis; empty where there is no torus.
    """
    network, inner = _network(mesh, topology), slice_shape(dict(mesh.shape), topology.slices)
    if network is None:
        return []
    numbers, out = np.arange(len(network.stand_D3)).reshape(tuple(inner.values())), []
    both = zip(hops(mesh.devices), hops(plain_order(mesh, devices)), strict=True)
    for place, ((axis, size), (near, plain)) in enumerate(zip(mesh.shape.items(), both, strict=True)):
        if size == 1:
            continue
        groups = np.moveaxis(numbers, place, -1).reshape(-1, inner[axis])
        busy = network.busy(BY_RINGS[0], groups.tolist()).max() if inner[axis] > 1 else 0.0
        rate = float(1 / busy) if busy else 0.0
        out.append({"axis": axis, "devices": size, "hops": near, "hops_in_plain_order": plain, "gather_rate": rate})
    return out


def exchanged(program: hlo.Program, times: dict[str, float], mesh: Mesh, topology: Topology):
    """(collectives by kind and axes, the most first; seconds of the busiest side of the torus; seconds between slices)."""
    network, inner = _network(mesh, topology), slice_shape(dict(mesh.shape), topology.slices)
    dcn = topology.share(topology.chip.dcn_bandwidth)
    sums: dict[tuple, list[float]] = {}
    sides, rates = np.zeros(3), {}
    for item in hlo.collectives(program, times, inner) + hlo.between_slices(program, times, topology.slices):
        sent = item.bytes * item.times
        if item.axes == ("dcn",):
            seconds = sent / dcn
        elif network is None or not item.axes:
            seconds = 0.0
        else:
            key = item.kind, item.groups
            if key not in rates:
                rates[key] = network.busy(*key)
            sides += rates[key] * sent
            seconds = float(rates[key].max() * sent)
        total = sums.setdefault((item.kind, item.axes), [0.0, 0.0, 0.0])
        sums[item.kind, item.axes] = [a + b for a, b in zip(total, (sent, item.times, seconds), strict=True)]
    entries = [
        {"kind": kind, "axes": list(axes), "bytes": sent, "times": number, "seconds": seconds}
        for (kind, axes), (sent, number, seconds) in sorted(sums.items(), key=lambda entry: -entry[1][0])
    ]
    across = sum(entry["seconds"] for entry in entries if entry["axes"] == ["dcn"])
    return entries, float(sides.max()), across


def _network(mesh: Mesh, topology: Topology) -> Network | None:
    """The links of the first slice; all are alike."""
    index = np.vectorize(lambda device: getattr(device, "slice_index", 0), otypes=[int])(mesh.devices)
    return network_of(mesh.devices[index == index.flat[0]], topology.chip.link)
