"""How long collectives take on the links of a torus: each over the links that its devices have, none over all (K2.5 §3.8).

A side of the torus along which the devices of a group stand in a whole ring gives each of them two links, a part of a side
one; where groups lie between each other on the same links, each has its part of them. What a device must take in
(all-gather) or give away (reduce-scatter) comes over all sides of its group at once, as by rings in several directions.
What goes from each device to each other one, or to the next, is routed along the sides in their order, the short way, and
takes as long as the busiest link. These are bounds: neither latency nor a worse algorithm is in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25_jax.sharding.torus import Torus, places, torus_of

BY_RINGS = ("all-gather", "reduce-scatter", "all-reduce")


@dataclass(frozen=True)
class Network:
    """The links of one slice: `stand_D3` is where each device stands, in the order of the mesh, `link` bytes a second.

    Devices that share a chip share its links.
    """

    torus: Torus
    stand_D3: np.ndarray
    link: float  # of one link, one way

    @property
    def cores(self) -> int:
        """Devices of a chip."""
        return len(self.stand_D3) // int(np.prod(self.torus.sides))

    def busy(self, kind: str, groups: Sequence[Sequence[int]]) -> np.ndarray:
        """Seconds that the links along each side are busy for each byte that a device sends, [sides].

        `groups` are the devices of a collective that exchange with one another, or the pairs of a permutation.
        """
        if kind == "collective-permute":
            return self._routed(groups, 1.0) / self.link
        size = len(groups[0])
        if kind in BY_RINGS:
            links = self.links(groups[0])
            if links is None:  # a ring in the order of the group, half of the bytes in either direction
                ring = [pair for group in groups for pair in zip(group, (*group[1:], group[0]), strict=True)]
                return self._routed(ring + [pair[::-1] for pair in ring], 0.5) / self.link
            return np.where(links > 0, self._sharers(groups[0]) / (self.link * max(links.sum(), 1e-9)), 0.0)
        pairs = [(a, b) for group in groups for a in group for b in group if a != b]
        return self._routed(pairs, 1.0 / (size - 1)) / self.link

    def links(self, group: Sequence[int]) -> np.ndarray | None:
        """Links along each side that a device of `group` has to itself, [sides]; None where the group is no even block."""
        stand, out = self.stand_D3[list(group)], []
        chips = np.unique(stand, axis=0)
        for side, (length, ring) in enumerate(zip(self.torus.sides, self.torus.rings, strict=True)):
            at = np.unique(chips[:, side])
            gaps = np.diff(at)
            if len(at) == 1:
                out.append(0.0)
                continue
            if (gaps != gaps[0]).any():
                return None
            whole = ring and len(at) * gaps[0] == length
            out.append((2.0 if whole else 1.0) / gaps[0])
        even = len(chips) == np.prod([len(np.unique(column)) for column in chips.T])
        return np.asarray(out) if even else None

    def _sharers(self, group: Sequence[int]) -> float:
        """Groups that share the links of a chip: its devices, over those of them that are in one group."""
        return self.cores * len(np.unique(self.stand_D3[list(group)], axis=0)) / len(group)

    def _routed(self, pairs, each: float) -> np.ndarray:
        """Bytes over the busiest link of each side when every pair (from, to) of devices passes on `each` bytes."""
        pairs = np.asarray(pairs)
        at, end = self.stand_D3[pairs[:, 0]].copy(), self.stand_D3[pairs[:, 1]]
        steps, out = self.torus.steps(at, end), []
        for side, (length, ring) in enumerate(zip(self.torus.sides, self.torus.rings, strict=True)):
            load = np.zeros((2, *self.torus.sides))
            half = ring & (2 * abs(steps[:, side]) == length)  # as far in both directions: half of it each way
            for way, sign in enumerate((1, -1)):
                forth = np.where(half, abs(steps[:, side]), sign * steps[:, side])
                for step in range(int(forth.max(initial=0))):
                    passing = forth > step
                    link = at[passing].copy()
                    link[:, side] = (link[:, side] + sign * step) % length
                    np.add.at(load[way], tuple(link.T), np.where(half[passing], each / 2, each))
            at[:, side] = end[:, side]
            out.append(load.max())
        return np.asarray(out)


def network_of(devices: np.ndarray, link: float) -> Network | None:
    """The links of the slice that an array of devices is; None where there are none."""
    torus = torus_of(devices)
    if torus is None or not link:
        return None
    stand = places(devices).reshape(devices.size, -1)
    return Network(torus, stand - stand.min(axis=0), link)
