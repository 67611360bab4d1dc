"""Lower bounds that hold for every plan, whatever the order of operators and however often a device is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partitioner.solvers.problem import Floats
from splitnet.cluster import Link

__all__ = ["Fastest", "bottleneck_bound", "latency_bound"]

_STEPS = 60


@dataclass(frozen=True)
class Fastest:
    """The best link of the cluster in each respect: no transfer is quicker."""

    latency_s: float
    bandwidth_bytes_per_s: float

    @classmethod
    def of(cls, links: Iterable[Link]) -> Fastest:
        links = list(links)
        return cls(min((link.latency_s for link in links), default=0.0), max((link.bandwidth_bytes_per_s for link in links), default=1.0))


def latency_bound(seconds: Floats, uses: Mapping[int, Mapping[int, float]], single: Sequence[float], fastest: Fastest) -> float:
    """Seconds below which no plan's latency can be.

    seconds: (M, L), operators in a topological order. uses: for each operator the operators that it uses, with the bytes that would be
    sent. single: the latencies of the devices that can take the whole model.

    A plan runs on one device alone, or it takes at least as long as the path P that is longest when each operator runs on its fastest
    device. More: P lies wholly on one device, or it crosses a link.
    """
    count = seconds.shape[1]
    quickest = seconds.min(axis=0)
    done = np.zeros(count)
    came = np.full(count, -1)
    for i in range(count):
        if before := uses.get(i):
            came[i] = max(before, key=done.__getitem__)
            done[i] = done[came[i]]
        done[i] += quickest[i]
    path = [int(done.argmax())]
    while came[path[-1]] >= 0:
        path.append(int(came[path[-1]]))
    length = float(done.max())
    smallest = min((uses[i][int(came[i])] for i in path[:-1]), default=0.0)
    crossing = fastest.latency_s + smallest / fastest.bandwidth_bytes_per_s if smallest else 0.0
    together = float(seconds[:, path].sum(axis=1).min())
    return min([max(length, min(length + crossing, together)), *single])


def bottleneck_bound(seconds: Floats) -> float:
    """Seconds below which no plan's busiest node can be: for any weights w of the devices that sum to 1, the busiest node is at least
    sum over operators of min over devices of w * seconds (Lagrangian duality). The weights are improved by a few subgradient
    steps; every step's figure is a bound."""
    devices = seconds.shape[0]
    total = seconds.sum(axis=1)
    if not total.min() > 0:
        return 0.0
    weights = (1.0 / total) / np.sum(1.0 / total)
    best = float(seconds.min(axis=0).max())
    for step in range(_STEPS):
        scaled = weights[:, None] * seconds
        choice = scaled.argmin(axis=0)
        best = max(best, float(scaled.min(axis=0).sum()))
        load = np.bincount(choice, weights=seconds[choice, np.arange(seconds.shape[1])], minlength=devices)
        weights = weights * np.exp((load - load.mean()) / max(load.max(), 1e-30) / (step + 1))
        weights /= weights.sum()
    return best
