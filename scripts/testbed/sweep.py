"""The same nodes at several bandwidths: the best plan against each device alone, predicted, and measured in turns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import partitioner
from partitioner.worthwhile import MARGIN, why_alone, worth_splitting
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text, table
from splitnet.plan import Plan
from testbed.bed import Testbed
from testbed.measuring import Subject, probed
from testbed.spec import BedSpec
from testbed.turns import measure_in_turns

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Option", "Point", "points_json", "sweep", "sweep_text"]

_HOPELESS = 2.5  # what is predicted to be so much worse than the best is not measured: at 1 Mbit/s that would take minutes


@dataclass(frozen=True)
class Option:
    """A plan, with what the client's way to its ingress adds; `sent_bytes` over links, per request. Figures are seconds of a request, or, for
    throughput, from one answer to the next. `measured_s` None: not measured."""

    plan: Plan
    predicted_s: float
    sent_bytes: int
    measured_s: float | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(stage.node for stage in self.plan.stages)


@dataclass(frozen=True)
class Point:
    """One bandwidth: the best split if the planner found any, and each device alone; `chosen` is one of them, and `reason` says why it is
    not the split."""

    bandwidth_bytes_per_s: float
    objective: str
    chosen: Option
    reason: str
    split: Option | None
    alone: tuple[Option, ...]

    @property
    def ratio(self) -> float:
        """The chosen plan's measured seconds by those of the best single device: below 1 it pays to split."""
        alone_s = [option.measured_s for option in self.alone if option.measured_s is not None]
        assert self.chosen.measured_s is not None
        assert alone_s, "the best single device is always measured"
        return self.chosen.measured_s / min(alone_s)


def sweep(
    spec: BedSpec,
    model: ModelGraph,
    bandwidths_bytes_per_s: Sequence[float],
    objective: str,
    say: Callable[[str], None] = lambda text: None,
    budget_s: float = 4.0,
    margin: float = MARGIN,
) -> Iterator[Point]:
    """Starts the testbed, and yields a point per bandwidth, in the given order. The model is profiled on its nodes three times at first and
    once more before each point; medians of all so far count, because the speed of a shared box drifts.

    The client stands where the file says. Where that is a node, the input arises there: whoever else runs the first stage gets it over that node's
    link, and the answer goes back over it, which counts in the prediction and is really done. `budget_s`: for each node in the first profile, and for
    each plan that is measured. `margin`: see `partitioner.worthwhile`."""
    with Testbed(spec) as bed:
        for note in bed.notes:
            say(f"note: {note}")
        first = probed(bed, budget_s / 4)
        subject = Subject.measure(bed, model, first, budget_s)
        profiles = [subject.profile, *(subject.measured_again(first, budget_s / 2) for _ in range(2))]
        for bandwidth in bandwidths_bytes_per_s:
            profiles.append(subject.measured_again(first, budget_s / 2))
            bed.reshape(spec.at_bandwidth(bandwidth))
            yield _point(subject.with_median(profiles), probed(bed, budget_s / 4), bandwidth, objective, budget_s, margin)


def _point(subject: Subject, cluster: Cluster, bandwidth: float, objective: str, budget_s: float, margin: float) -> Point:
    at = subject.bed.spec.client_at
    alone = [_option(subject, cluster, subject.alone(cluster, node.name), objective) for node in cluster.nodes]
    best_alone = min(alone, key=lambda option: option.predicted_s)
    wishes = {"input_at": at, "margin": 0.0} if at else {"margin": 0.0}
    split = _option(subject, cluster, partitioner.plan(subject.profile, cluster, objective=objective, **wishes), objective)  # type: ignore[arg-type]
    options = alone if len(split.nodes) == 1 else [*alone, split]
    chosen, reason = best_alone, "the planner found no split"
    if split in options:
        reason = why_alone(best_alone.nodes[0], split.predicted_s, best_alone.predicted_s, margin)
        if worth_splitting(split.predicted_s, best_alone.predicted_s, margin):
            chosen, reason = split, ""
    least_s = min(option.predicted_s for option in options)
    worth = [o for o in options if o is chosen or o is best_alone or o.predicted_s < _HOPELESS * least_s]
    seconds = measure_in_turns(subject, [option.plan for option in worth], objective, budget_s)
    measured = {id(o): dataclasses.replace(o, measured_s=s) for o, s in zip(worth, seconds, strict=True)}
    return Point(
        bandwidth,
        objective,
        measured[id(chosen)],
        reason,
        measured.get(id(split), split) if split in options else None,
        tuple(measured.get(id(option), option) for option in alone),
    )


def _option(subject: Subject, cluster: Cluster, plan: Plan, objective: str) -> Option:
    """The client's way to the ingress is that of the node where it stands, there and back; none where that is the ingress."""
    predicted = plan.prediction
    assert predicted is not None
    latency_s, bottleneck_s, sent = predicted.latency_s, 1 / predicted.throughput_per_s, sum(predicted.bytes_per_link.values())
    at, ingress = subject.bed.spec.client_at, plan.stages[0].node
    if at and at != ingress:
        structure = subject.profile.structure
        given = sum(structure.value_bytes[spec.name] for spec in structure.inputs)
        answered = sum(structure.value_bytes[value] for value in {output.value for output in structure.outputs})
        for link, size in ((cluster.link(at, ingress), given), (cluster.link(ingress, at), answered)):
            assert link is not None, "the nodes of a testbed reach each other"
            latency_s += link.seconds(size)
            bottleneck_s = max(bottleneck_s, size / link.bandwidth_bytes_per_s)
            sent += size
    return Option(plan, latency_s if objective == "latency" else bottleneck_s, sent)


def sweep_text(points: Sequence[Point]) -> str:
    """A table for people: predicted -> measured, "-" where it was not worth measuring."""
    names = [option.nodes[0] for option in points[0].alone]
    rows = [("Mbit/s", "chosen", "sent", "best split", *(f"{name} alone" for name in names), "chosen / best alone")]
    for point in points:
        cells = [_cell(option) for option in (point.split, *point.alone)]
        where = " > ".join(point.chosen.nodes)
        rows.append((f"{point.bandwidth_bytes_per_s * 8 / 1e6:g}", where, f"{point.chosen.sent_bytes:,}", *cells, f"{point.ratio:.2f}"))
    return "\n".join(table(rows))


def _cell(option: Option | None) -> str:
    if option is None:
        return "none"
    return f"{seconds_text(option.predicted_s)} -> {'-' if option.measured_s is None else seconds_text(option.measured_s)}"


def points_json(points: Sequence[Point]) -> str:
    def option(o: Option) -> dict[str, Any]:
        return {"nodes": o.nodes, "predicted_s": o.predicted_s, "measured_s": o.measured_s, "sent_bytes": o.sent_bytes}

    document = [
        {
            "bandwidth_bytes_per_s": p.bandwidth_bytes_per_s,
            "objective": p.objective,
            "chosen": option(p.chosen),
            "split": option(p.split) if p.split else None,
            "alone": [option(o) for o in p.alone],
            "reason": p.reason,
            "ratio": p.ratio,
        }
        for p in points
    ]
    return json.dumps(document, indent=1)
