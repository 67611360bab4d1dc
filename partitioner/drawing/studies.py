"""What else could be planned: the front of latency against throughput, and the best cut for each bandwidth. Arithmetic, no drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from partitioner.profiling import Profile
from splitnet.cluster import Cluster
from splitnet.errors import NoPlan
from splitnet.plan import Alternative, Plan

__all__ = ["Choice", "Planner", "Share", "SweepPoint", "choices", "front", "sweep"]

Planner = Callable[..., Plan]  #: `partitioner.plan`, perhaps with constraints bound to it
_MOST_STAGES = 6
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


def choices(plan: Plan, profile: Profile, cluster: Cluster, planner: Planner) -> list[Choice]:
    """The plan itself, every node alone that can hold the model, and the best of every number of stages for either objective. Of those
    that are as good as equal there is one, in this order."""
    found: list[Choice] = []

    def add(choice: Choice) -> None:
        if not any(_close(choice, other) for other in found):
            found.append(choice)

    if plan.prediction:
        add(Choice(f"this plan, {_stages(plan)}", plan.prediction.latency_s, plan.prediction.throughput_per_s, chosen=True))
    free = _try(planner, profile, cluster, objective=plan.objective)
    for a in free.prediction.alternatives if free and free.prediction else ():
        if a.fits:
            add(Choice(f"{a.node} alone", a.latency_s, a.throughput_per_s, alone=True))
    for count in range(2, min(len(cluster.nodes), _MOST_STAGES) + 1):
        for objective in ("latency", "throughput"):
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
    """Plans anew for each bandwidth, the links' latencies as they are. A bandwidth at which nothing can be planned is left out."""
    points = []
    for bits in bits_per_s:
        links = tuple(dataclasses.replace(link, bandwidth_bytes_per_s=bits / _BITS) for link in cluster.links)
        other = _try(planner, profile, dataclasses.replace(cluster, links=links), objective=plan.objective)
        if other is None or other.prediction is None:
            continue
        p = other.prediction
        value = p.latency_s if plan.objective == "latency" else 1.0 / p.throughput_per_s
        points.append(SweepPoint(bits, value, _shares(other, profile), sum(p.bytes_per_link.values()), p.alternatives))
    return points


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
