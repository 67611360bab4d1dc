"""Two tiers, any graph, least latency: a minimum cut (DADS, Hu and others 2019).

The source's side runs on the first device, the sink's on the second. An operator costs the arc to the side where it does not run. A tensor is
charged once however many operators use it: its arc leads to an auxiliary vertex, from where arcs without limit lead to its users.
Arcs without limit from each user to its producer keep results from coming back. Push-relabel (Goldberg, Tarjan 1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from partitioner.solvers.placement import Placement
from partitioner.solvers.problem import ChainProblem
from partitioner.solvers.reading import GraphCosts

__all__ = ["Tiers", "cut_in_two", "two_tiers"]


@dataclass(frozen=True)
class Tiers:
    """The best placements that use both devices, one per direction; `bound_s` holds for all of them, memory aside. `proven` is False where two parts
    of the graph might run side by side, so that a sum is no bound."""

    placements: tuple[Placement, ...]
    bound_s: float
    proven: bool


def two_tiers(costs: GraphCosts, problem: ChainProblem, *, ingress: int = -1) -> Tiers:
    """`problem` holds one operator per vertex, on two devices."""
    found, bounds = [], [math.inf]
    for first, second in ((0, 1), (1, 0)):
        if ingress not in (-1, first):
            continue
        pinned_variants = (False, True) if problem.return_bytes else (False,)
        for answers_stay in pinned_variants:
            value, upstream = cut_in_two(costs, problem, first, second, answers_stay=answers_stay)
            if not math.isfinite(value):
                continue
            bounds.append(value)
            if 0 < len(upstream) < len(costs.operators):
                found.append(Placement((first, second), tuple(0 if v in upstream else 1 for v in range(len(costs.operators)))))
    return Tiers(tuple(dict.fromkeys(found)), min(bounds), _joined(costs))


def cut_in_two(
    costs: GraphCosts, problem: ChainProblem, first: int, second: int, *, answers_stay: bool = False
) -> tuple[float, frozenset[int]]:
    """(latency of the best division with the first part on `first`, what runs there); inf where there is none."""
    import networkx
    from networkx.algorithms.flow import preflow_push

    codecs, message = problem.codecs, problem.overheads.message_s
    each = 1 / codecs.encode[:, first] + 1 / (codecs.ratio * problem.bandwidth[first, second]) + 1 / codecs.decode[:, second]
    usable = codecs.permitted[:, first, second]
    if not usable.any() or not math.isfinite(problem.latency[first, second]):
        return math.inf, frozenset()
    per_byte, per_tensor = float(each[usable].min()), float(message[first] + message[second])
    back = float(problem.latency[second, first]) if problem.return_bytes and not answers_stay else 0.0
    back_per_byte = float(
        1 / codecs.encode[0, second] + 1 / (codecs.ratio[0] * problem.bandwidth[second, first]) + 1 / codecs.decode[0, first]
    )
    on_second = costs.seconds[second].copy()
    stay = np.zeros(len(on_second), dtype=bool)
    for value in costs.values:
        if value.answer and value.bytes:
            if answers_stay or not math.isfinite(back):
                stay[value.source] = True
            else:
                on_second[value.source] += value.bytes * back_per_byte + per_tensor
    flow: Any = networkx.DiGraph()
    for v in range(len(on_second)):
        if not stay[v] and (problem.allowed is None or problem.allowed[second, v]):
            flow.add_edge("s", v, capacity=float(on_second[v]))
        else:
            flow.add_edge("s", v)
        if problem.allowed is None or problem.allowed[first, v]:
            flow.add_edge(v, "t", capacity=float(costs.seconds[first, v]))
        else:
            flow.add_edge(v, "t")
        for u in costs.before[v]:
            flow.add_edge(v, u)
    for k, value in enumerate(costs.values):
        if value.users and value.bytes:
            flow.add_edge(value.source, ("tensor", k), capacity=value.bytes * per_byte + per_tensor)
            for user in value.users:
                flow.add_edge(("tensor", k), user)
    try:
        value, (upstream, _) = networkx.minimum_cut(flow, "s", "t", flow_func=preflow_push)
    except networkx.NetworkXUnbounded:
        return math.inf, frozenset()
    fixed = problem.overheads.request_s[first] + problem.overheads.stage_s[[first, second]].sum() + problem.latency[first, second]
    fixed += back if math.isfinite(back) else 0.0
    return float(value + fixed), frozenset(v for v in upstream if isinstance(v, int))


def _joined(costs: GraphCosts) -> bool:
    """Whether any two parts of the graph have bytes to send to each other."""
    root = list(range(len(costs.operators)))

    def find(v: int) -> int:
        while root[v] != v:
            root[v] = root[root[v]]
            v = root[v]
        return v

    for value in costs.values:
        if value.bytes:
            for user in value.users:
                root[find(user)] = find(value.source)
    return len({find(v) for v in range(len(root))}) == 1
