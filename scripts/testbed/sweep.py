"""The same nodes at several bandwidths: the best plan against each device alone, predicted and measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import partitioner
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text, table
from splitnet.plan import Plan
from testbed.bed import Testbed
from testbed.measuring import Outcome, Subject, probed
from testbed.spec import BedSpec

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Option", "Point", "points_json", "sweep", "sweep_text"]

_HOPELESS = 2.5  # a single device that is predicted to be so much worse than the best is not measured: at 1 Mbit/s that would take minutes


@dataclass(frozen=True)
class Option:
    """A plan, with what the client's way to its ingress adds; `sent_bytes` over links, per request. `outcome` None: not measured."""

    plan: Plan
    latency_s: float
    bottleneck_s: float
    sent_bytes: int
    outcome: Outcome | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(stage.node for stage in self.plan.stages)

    def predicted_s(self, objective: str) -> float:
        return self.latency_s if objective == "latency" else self.bottleneck_s

    def measured_s(self, objective: str) -> float | None:
        if self.outcome is None:
            return None
        return self.outcome.latency_s if objective == "latency" else 1 / self.outcome.per_s


@dataclass(frozen=True)
class Point:
    """One bandwidth: what the planner chose, and each device alone (the choice itself among them, where it is one)."""

    bandwidth_bytes_per_s: float
    objective: str
    chosen: Option
    alone: tuple[Option, ...]

    @property
    def ratio(self) -> float:
        """The chosen plan's measured seconds (latency, or time per batch) by those of the best single device: below 1 it pays to split."""
        chosen_s = self.chosen.measured_s(self.objective)
        alone_s = [s for option in self.alone if (s := option.measured_s(self.objective)) is not None]
        assert chosen_s is not None
        assert alone_s, "the best single device is always measured"
        return chosen_s / min(alone_s)


def sweep(
    spec: BedSpec,
    model: ModelGraph,
    bandwidths_bytes_per_s: Sequence[float],
    objective: str,
    say: Callable[[str], None] = lambda text: None,
    budget_s: float = 4.0,
) -> Iterator[Point]:
    """Starts the testbed, profiles the model on its nodes once, and yields a point per bandwidth, in the given order.

    The client stands where the file says. Where that is a node, the input arises there: whoever else runs the first stage gets
    it over that node's link, and the answer goes back over it, which counts in the prediction and is really done. `budget_s`: for each measurement of the profile and of a plan."""
    with Testbed(spec) as bed:
        for note in bed.notes:
            say(f"note: {note}")
        subject = Subject.measure(bed, model, probed(bed, budget_s / 4), budget_s)
        for bandwidth in bandwidths_bytes_per_s:
            bed.reshape(spec.at_bandwidth(bandwidth))
            yield _point(subject, probed(bed, budget_s / 4), bandwidth, objective, budget_s)


def _point(subject: Subject, cluster: Cluster, bandwidth: float, objective: str, budget_s: float) -> Point:
    at = subject.bed.spec.client_at
    alone = [_option(subject, cluster, subject.alone(cluster, node.name)) for node in cluster.nodes]
    wishes = {"input_at": at} if at else {}
    best = _option(subject, cluster, partitioner.plan(subject.profile, cluster, objective=objective, **wishes))  # type: ignore[arg-type]
    chosen = min([*alone, best], key=lambda option: option.predicted_s(objective))
    if len(best.nodes) == 1 and chosen is best:  # one of those alone, by the same figures
        chosen = next(option for option in alone if option.nodes == best.nodes)
    least_s = chosen.predicted_s(objective)
    best_alone = min(alone, key=lambda option: option.predicted_s(objective))
    measured = [
        _measured(subject, o, budget_s) if o is chosen or o is best_alone or o.predicted_s(objective) < _HOPELESS * least_s else o
        for o in alone
    ]
    if chosen in alone:
        return Point(bandwidth, objective, measured[alone.index(chosen)], tuple(measured))
    return Point(bandwidth, objective, _measured(subject, chosen, budget_s), tuple(measured))


def _option(subject: Subject, cluster: Cluster, plan: Plan) -> Option:
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
    return Option(plan, latency_s, bottleneck_s, sent)


def _measured(subject: Subject, option: Option, budget_s: float) -> Option:
    assert option.plan.prediction is not None
    extra_s = option.latency_s - option.plan.prediction.latency_s
    outcome = subject.outcome(option.plan, extra_latency_s=extra_s, extra_bottleneck_s=option.bottleneck_s, budget_s=budget_s)
    return dataclasses.replace(option, outcome=outcome)


def sweep_text(points: Sequence[Point]) -> str:
    """A table for people: predicted -> measured, "-" where it was not worth measuring."""
    names = [option.nodes[0] for option in points[0].alone]
    rows = [("Mbit/s", "chosen", "bytes sent", "chosen", *(f"{name} alone" for name in names), "chosen / best alone")]
    for point in points:
        cells = [_cell(option, point.objective) for option in (point.chosen, *point.alone)]
        where = " > ".join(point.chosen.nodes)
        rows.append((f"{point.bandwidth_bytes_per_s * 8 / 1e6:g}", where, f"{point.chosen.sent_bytes:,}", *cells, f"{point.ratio:.2f}"))
    return "\n".join(table(rows))


def _cell(option: Option, objective: str) -> str:
    measured_s = option.measured_s(objective)
    return f"{seconds_text(option.predicted_s(objective))} -> {'-' if measured_s is None else seconds_text(measured_s)}"


def points_json(points: Sequence[Point]) -> str:
    def option(o: Option) -> dict[str, Any]:
        predicted = {
            "nodes": o.nodes,
            "predicted_latency_s": o.latency_s,
            "predicted_bottleneck_s": o.bottleneck_s,
            "sent_bytes": o.sent_bytes,
        }
        return {**predicted, **(o.outcome.figures() if o.outcome else {})}

    document = [
        {
            "bandwidth_bytes_per_s": p.bandwidth_bytes_per_s,
            "objective": p.objective,
            "chosen": option(p.chosen),
            "alone": [option(o) for o in p.alone],
            "ratio": p.ratio,
        }
        for p in points
    ]
    return json.dumps(document, indent=1)
