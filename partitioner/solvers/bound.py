"""Lower bounds that hold for every plan, whatever the order of operators and however often a device is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from partitioner.solvers.problem import Floats

__all__ = ["bottleneck_bound", "latency_bound"]

_STEPS = 60


def latency_bound(seconds: Floats, predecessors: Mapping[int, Sequence[int]], single: Sequence[float], shortest_link_s: float) -> float:
    """Seconds below which no plan's latency can be. `seconds` is (M, L), operators in a topological order; `predecessors` of each;
    `single` the latencies of the devices that can take the whole model; `shortest_link_s` the least latency of any link.

    A plan runs on one device, or it crosses a link, and its longest path takes at least what the fastest device of each
    operator takes. (Where an operator graph falls apart into unconnected pieces, nothing need cross: give 0.)
    """
    fastest = seconds.min(axis=0)
    done = np.zeros(seconds.shape[1])
    for i in range(seconds.shape[1]):
        done[i] = fastest[i] + max((done[p] for p in predecessors.get(i, ())), default=0.0)
    split = float(done.max(initial=0.0)) + shortest_link_s
    return min([split, *single])


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
