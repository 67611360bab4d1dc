"""What else could be planned: the front of latency against throughput, and the best cut for each bandwidth. Arithmetic, no drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from partitioner.drawing.words import words_of
from partitioner.profiling import Profile
from splitnet.cluster import Cluster
from splitnet.errors import NoPlan
from splitnet.plan import Alternative, Plan

__all__ = ["Choice", "Planner", "Share", "SweepPoint", "choices", "front", "large", "left_out", "stage_counts", "sweep"]

Planner = Callable[..., Plan]  #: `partitioner.plan`, perhaps with constraints bound to it
_MOST_STAGES, _MOST_OF_LARGE = 6, 4
_LARGE = 20_000  # operators x nodes: with 1,000 operators and 64 nodes a plan of four stages takes about four seconds
_EVERY_OF_LARGE = 5  # bandwidths
_BITS = 8
_SAME = 0.02  # relative


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan's figures. `label` for people: "3 stages", or a node's name."""

    label: str
    latency_s: float
    throughput_per_s: float
    alone: bool = False
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """What part of the model runs where: `end` is the share of the computing that is done once this stage is."""

    node: str
    end: float


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The best plan where every link has this bandwidth. `sent_bytes` go between nodes, for one request."""

    bandwidth_bits_per_s: float
    objective_s: float
    shares: tuple[Share, ...]
    sent_bytes: int
    alternatives: tuple[Alternative, ...]


def large(profile: Profile, cluster: Cluster) -> bool:
    """Whether one plan takes so long (seconds) that only a few are made for a picture."""
    return len(profile.structure.vertices) * len(cluster.nodes) > _LARGE


def stage_counts(profile: Profile, cluster: Cluster) -> list[int]:
    """The numbers of stages that are compared."""
    few = large(profile, cluster)
    return list(range(2, min(len(cluster.nodes), _MOST_OF_LARGE if few else _MOST_STAGES) + 1, 2 if few else 1))


def left_out(profile: Profile, cluster: Cluster) -> tuple[str, str]:
    """What of it is not planned for want of time, in a sentence each: of the numbers of stages, and of the bandwidths. Empty: nothing."""
    if not large(profile, cluster):
        return "", ""
    why = f"A plan of {len(profile.structure.vertices)} operators on {len(cluster.nodes)} nodes takes seconds, so"
    return (
        f" {why} more stages than {_MOST_OF_LARGE}, and odd numbers of them, are left out.",
        f" {why} plans have at most {_MOST_OF_LARGE} stages here, and few bandwidths are looked at.",
    )


def choices(plan: Plan, profile: Profile, cluster: Cluster, planner: Planner) -> list[Choice]:
    """The plan itself, every node alone that can hold the model, and the best of every number of stages for either objective. Of those
    that are as good as equal there is one, in this order."""
    found: list[Choice] = []

    def add(choice: Choice) -> None:
        if not any(_close(choice, other) for other in found):
            found.append(choice)

    if plan.prediction:
        add(Choice(f"this plan, {_stages(plan)}", plan.prediction.latency_s, plan.prediction.throughput_per_s, chosen=True))
    for a in _alone(plan, profile, cluster, planner):
        if a.fits:
            add(Choice(f"{a.node} alone", a.latency_s, a.throughput_per_s, alone=True))
    for count in stage_counts(profile, cluster):
        for objective in (words_of(plan).quick, "throughput"):
            other = _try(planner, profile, cluster, objective=objective, stages=count)
            if other is not None and other.prediction:
                add(Choice(_stages(other), other.prediction.latency_s, other.prediction.throughput_per_s))
    return sorted(found, key=lambda c: (c.latency_s, -c.throughput_per_s))


def front(found: Sequence[Choice]) -> list[Choice]:
    """Those that no other beats in both; by latency."""
    best: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.latency_s, -c.throughput_per_s)):
        if not best or choice.throughput_per_s > best[-1].throughput_per_s:
            best.append(choice)
    return best


def sweep(plan: Plan, profile: Profile, cluster: Cluster, planner: Planner, bits_per_s: Sequence[float]) -> list[SweepPoint]:
    """The best plan for each bandwidth (ascending), the links' latencies as they are. A bandwidth at which nothing can be planned is left out.

    Planned are the ends, and the middle between two bandwidths whose plans differ. Between two that have the same plan it is taken to be
    the plan as well: its latency, and its bottleneck while that is the same, are linear in 1 / bandwidth; and where all are, no other plan that is
    worse at both ends is better in between. Of a large model on a large cluster (`large`) every fifth bandwidth is planned, for at most four stages."""
    few = large(profile, cluster)
    bits_per_s = [*bits_per_s[:-1:_EVERY_OF_LARGE], bits_per_s[-1]] if few else bits_per_s
    options: dict[str, Any] = {"max_stages": _MOST_OF_LARGE} if few else {}
    made: dict[int, Plan | None] = {}

    def planned(k: int) -> Plan | None:
        if k not in made:
            links = tuple(dataclasses.replace(link, bandwidth_bytes_per_s=bits_per_s[k] / _BITS) for link in cluster.links)
            made[k] = _try(planner, profile, dataclasses.replace(cluster, links=links), objective=plan.objective, **options)
        return made[k]

    points: dict[int, SweepPoint] = {}

    def add(k: int, other: Plan | None, objective_s: float | None = None) -> None:
        if other is not None and other.prediction is not None:
            p = other.prediction
            value = _objective_s(plan.objective, other) if objective_s is None else objective_s
            points[k] = SweepPoint(bits_per_s[k], value, _shares(other, profile), sum(p.bytes_per_link.values()), p.alternatives)

    pending = [(0, len(bits_per_s) - 1)]
    while pending:
        low, high = pending.pop()
        a, b = planned(low), planned(high)
        add(low, a)
        add(high, b)
        if high - low < 2:
            continue
        if _same_plan(a, b) and plan.generation is None:  # of chunks of prompts the bottleneck counts, too
            ends = [(1 / bits_per_s[k], points[k].objective_s) for k in (low, high)] if a else []
            for k in range(low + 1, high):
                add(k, a, _between(1 / bits_per_s[k], *ends) if ends else None)
        else:
            pending += [(low, (low + high) // 2), ((low + high) // 2, high)]
    return [points[k] for k in sorted(points)]


def _objective_s(objective: str, plan: Plan) -> float:
    assert plan.prediction is not None
    return 1.0 / plan.prediction.throughput_per_s if objective == "throughput" else plan.prediction.latency_s


def _same_plan(a: Plan | None, b: Plan | None) -> bool:
    if a is None or b is None:
        return a is b
    same_cuts = [(s.node, s.operators) for s in a.stages] == [(s.node, s.operators) for s in b.stages]
    bottleneck = a.objective == "latency" or (a.prediction and a.prediction.bottleneck) == (b.prediction and b.prediction.bottleneck)
    return same_cuts and a.transfers == b.transfers and bottleneck


def _between(x: float, a: tuple[float, float], b: tuple[float, float]) -> float:
    return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])


def _alone(plan: Plan, profile: Profile, cluster: Cluster, planner: Planner) -> tuple[Alternative, ...]:
    """Each node by itself: the plan knows, unless it was made for some of the nodes only."""
    known = plan.prediction.alternatives if plan.prediction else ()
    if {a.node for a in known} == {node.name for node in cluster.nodes}:
        return known
    free = _try(planner, profile, cluster, objective=plan.objective)
    return free.prediction.alternatives if free and free.prediction else ()


def _shares(plan: Plan, profile: Profile) -> tuple[Share, ...]:
    here = dict(zip((v.name for v in profile.structure.vertices), profile.columns[""].seconds, strict=True))
    work = [sum(here.get(name, 0.0) for name in stage.operators) for stage in plan.stages]
    total, done, shares = sum(work) or 1.0, 0.0, []
    for stage, part in zip(plan.stages, work, strict=True):
        done += part
        shares.append(Share(stage.node, done / total))
    return tuple(shares)


def _try(planner: Planner, profile: Profile, cluster: Cluster, **options: Any) -> Plan | None:
    try:
        return planner(profile, cluster, **options)
    except NoPlan:
        return None


def _close(a: Choice, b: Choice) -> bool:
    return math.isclose(a.latency_s, b.latency_s, rel_tol=_SAME) and math.isclose(a.throughput_per_s, b.throughput_per_s, rel_tol=_SAME)


def _stages(plan: Plan) -> str:
    return "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
