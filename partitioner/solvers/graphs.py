"""`partitioner.solve`: a plan for any networkx graph of costs, without a model, torch or a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from partitioner.cost import RAW, SHORTEST_S, CodecFigures, Overhead
from partitioner.solvers.arguments import check_kinds
from partitioner.solvers.choosing import Chosen, Question, choose_plan, pipeline_depth
from partitioner.solvers.constraints import Constraints, allowed_operators, matching, stage_range
from partitioner.solvers.problem import Objective, Overheads
from partitioner.solvers.reading import GraphCosts, codec_arrays, figure, link_arrays, read_graph, read_links
from splitnet.cluster import Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import NodeRef, Plan, Prediction

if TYPE_CHECKING:
    import networkx

__all__ = ["check_objective", "shared", "solve"]

Pattern = str


def check_objective(objective: str) -> Objective:
    if objective == "latency" or objective == "throughput":
        return objective  # type: ignore[return-value]
    raise BadInput(f"objective {objective!r} is neither 'latency' nor 'throughput'")


def solve(
    graph: networkx.DiGraph,
    devices: Mapping[str, float],
    links: Mapping[tuple[str, str], tuple[float, float]],
    objective: str = "latency",
    codecs: Mapping[str, CodecFigures] | Sequence[str] | None = None,
    *,
    stages: int | range | None = None,
    max_stages: int | None = None,
    pin: Mapping[Pattern, str] | None = None,
    forbid: Sequence[str] | Mapping[str, Sequence[Pattern]] = (),
    at: Sequence[Pattern] | None = None,
    input_at: str = "",
    output_at: str = "",
    private: tuple[str, int | Pattern] | None = None,
    taken: Mapping[str, tuple[float, float]] | None = None,
    link_codecs: Mapping[tuple[str, str], Sequence[str]] | None = None,
    max_accuracy_loss: float | None = None,
    overheads: Mapping[str, Overhead] | None = None,
    batch: int = 1,
    microbatches: Sequence[int] | None = None,
    tolerance: float = 0.0,
) -> Plan:
    """The best plan for a graph of operators on devices.

    graph: each vertex carries `seconds`, a mapping from device name to seconds per item, or to a pair (fixed, per item); `param_bytes` and
    `activation_bytes` per item (default 0), `scope` (a module path, default ""); a vertex without successors may carry `output_bytes`,
    which return to the first stage's device. Each edge carries `bytes` per item. Edges of one vertex that name the same `tensor`, or name
    none and carry equally many bytes, carry one tensor, sent at most once to a stage. devices: name -> memory in bytes (math.inf: no
    limit). links: (a, b) -> (bytes per second, seconds of latency); a pair that is not listed cannot send. codecs: name ->
    `CodecFigures`, the ones to choose from (default: raw, at no cost); answers return raw.

    stages: exactly so many, or a range of them; max_stages: at most. at: cut before these operators or modules and nowhere else. The other
    wishes are those of `Constraints`; forbid takes nodes, or node -> patterns. batch: items that one request brings; microbatches: sizes of
    the parts that it may be sent in (default: the powers of two up to it); the best one is `prediction.batch`. For latency the whole batch counts,
    for throughput items per second. tolerance: of plans whose objective is within this share of the best one that sends least is taken.

    Each device takes at most one stage. Exact for chains, for two devices and latency, and for graphs with few enough ideals
    (docs/planning.md); `prediction.bound` proves it, or says how far the plan may be from the best. The returned plan's nodes have no address.

    Raises BadInput naming the item that is wrong, NoPlan saying what is missing where.
    """
    check_kinds(
        devices=devices, links=links, objective=objective, codecs=codecs, stages=stages, max_stages=max_stages, pin=pin, forbid=forbid, at=at,
        input_at=input_at, output_at=output_at, private=private, taken=taken, link_codecs=link_codecs, max_accuracy_loss=max_accuracy_loss,
        overheads=overheads, batch=batch, microbatches=microbatches, tolerance=tolerance,
    )  # fmt: skip
    goal = check_objective(objective)
    if not devices:
        raise BadInput("there is no device to plan for")
    figures = _codec_figures(codecs)
    wishes = Constraints(
        pin=pin or {}, forbid=() if isinstance(forbid, Mapping) else tuple(forbid or ()),
        forbid_operators=forbid if isinstance(forbid, Mapping) else {}, input_at=input_at, output_at=output_at, private=private,
        taken=taken or {}, link_codecs=link_codecs or {}, max_accuracy_loss=max_accuracy_loss,
    )  # fmt: skip
    wishes.check(tuple(devices), tuple(figures))
    if not 0 <= tolerance < 1:
        raise BadInput(f"tolerance must be within [0, 1), got {tolerance}")
    if strange := sorted(set(overheads or ()) - set(devices)):
        raise BadInput(f"overheads: there is no device {strange[0]!r}; there are {', '.join(devices)}")
    for name, overhead in (overheads or {}).items():
        for what in ("stage_s", "message_s", "request_s"):
            figure(getattr(overhead, what), f"overheads: {what} of {name!r}")
    limits = {name: figure(size, f"device {name!r}: memory", infinite=True) for name, size in devices.items()}
    sizes = _microbatches(batch, microbatches)
    case = _Case(graph, limits, read_links(links, tuple(devices)), goal, figures, wishes, dict(overheads or {}), tolerance, batch)
    allowed = stage_range(len(devices), stages, max_stages)
    asked = [case.ask(items, allowed, at) for items in sizes]
    return _plan(case, _best_size(goal, batch, asked), batch)


@dataclass(frozen=True)
class _Answered:
    items: int
    costs: GraphCosts
    chosen: Chosen

    def total_s(self, goal: Objective, batch: int) -> float:
        """What the objective is with parts of this size: seconds for the whole batch, or per item."""
        cost = self.chosen.selected.cost
        if goal == "throughput":
            return cost.bottleneck_s / self.items
        return cost.latency_s + (math.ceil(batch / self.items) - 1) * cost.bottleneck_s


def _best_size(goal: Objective, batch: int, asked: Sequence[list[_Answered] | NoPlan]) -> tuple[_Answered, float]:
    """The best answer, and the bound over all sizes, in seconds of the whole objective."""
    answers = [answer for each in asked if not isinstance(each, NoPlan) for answer in each]
    if not answers:
        raise next(each for each in asked if isinstance(each, NoPlan))
    best = min(answers, key=lambda a: (a.total_s(goal, batch), a.items))
    bounds = []
    for answer in answers:
        if goal == "throughput":
            bounds.append(answer.chosen.bound_s / answer.items)
        elif answer.chosen.goal == "latency":
            more = math.ceil(batch / answer.items) - 1
            bounds.append(answer.chosen.bound_s + more * answer.chosen.busiest_bound_s)
    return best, min(bounds)


@dataclass(frozen=True)
class _Case:
    graph: networkx.DiGraph
    limits: Mapping[str, float]
    links: Mapping[tuple[str, str], Link]
    goal: Objective
    codecs: Mapping[str, CodecFigures]
    wishes: Constraints
    overheads: Mapping[str, Overhead]
    tolerance: float
    batch: int

    def ask(self, items: int, stages: range, at: Sequence[str] | None) -> list[_Answered] | NoPlan:
        names, wishes = tuple(self.limits), self.wishes
        costs = read_graph(self.graph, names, items)
        share = {name: taken[1] for name, taken in wishes.taken.items()}
        slow = np.array([1.0 / (1.0 - share.get(name, 0.0)) for name in names])
        costs = replace(costs, seconds=costs.seconds * slow[:, None])
        overheads = {n: o.times(slow[k]) for k, n in enumerate(names) if (o := self.overheads.get(n))}
        figures = shared(self.codecs, names, share)
        fixed = None
        if at is not None:
            fixed = (0, *sorted({matching(pattern, costs.operators)[0] for pattern in at}), len(costs.operators))
            if fixed[1] == 0:
                raise BadInput(f"at: {at[0]!r} is the first operator of the model; there is nothing before it")
        question = Question(
            costs=costs, links=self.links,
            limits=np.array([max(0.0, size - wishes.taken.get(n, (0.0, 0.0))[0]) for n, size in self.limits.items()]),
            arrays=link_arrays(names, self.links),
            codecs=codec_arrays(figures, names, costs.operators, wishes.link_codecs, {}), figures=figures,
            overheads=overheads, overhead_arrays=overhead_arrays(names, overheads),
            allowed=allowed_operators(wishes, names, costs.operators), wishes=wishes,
            stages=range(len(fixed) - 1, len(fixed)) if fixed else stages, positions=fixed, tolerance=self.tolerance,
        )  # fmt: skip
        try:
            chosen = [choose_plan(question, self.goal)]
            if self.goal == "latency" and self.batch > items:  # parts follow each other: the pace counts too
                chosen.append(choose_plan(question, "throughput"))
        except NoPlan as error:
            return error
        return [_Answered(items, costs, each) for each in chosen]


def overhead_arrays(names: Sequence[str], overheads: Mapping[str, Overhead]) -> Overheads:
    rows = [overheads.get(name, Overhead()) for name in names]
    return Overheads(np.array([r.stage_s for r in rows]), np.array([r.message_s for r in rows]), np.array([r.request_s for r in rows]))


def shared(codecs: Mapping[str, CodecFigures], devices: Sequence[str], share: Mapping[str, float]) -> Mapping[str, CodecFigures]:
    """The same codecs on devices of whose time a share is taken."""
    if not any(share.values()):
        return codecs

    def slower(codec: CodecFigures) -> CodecFigures:
        left = {d: 1.0 - share.get(d, 0.0) for d in devices}
        return replace(
            codec,
            encode_bytes_per_s={d: left[d] / s if (s := codec.encode_s(1.0, d)) else math.inf for d in devices},
            decode_bytes_per_s={d: left[d] / s if (s := codec.decode_s(1.0, d)) else math.inf for d in devices},
        )

    return {name: slower(codec) for name, codec in codecs.items()}


def _codec_figures(codecs: Mapping[str, CodecFigures] | Sequence[str] | None) -> Mapping[str, CodecFigures]:
    if codecs is None:
        return RAW
    if isinstance(codecs, Mapping):
        for name, found in codecs.items():
            if not isinstance(found, CodecFigures):
                raise BadInput(f"codec {name!r}: expected CodecFigures, got {found!r}")
        return codecs if "raw" in codecs else {**RAW, **codecs}
    if unknown := sorted(set(codecs) - {"raw"}):
        raise BadInput(f"codec {unknown[0]!r} has no figures", remedy="give codecs={name: CodecFigures(ratio=..., ...)}")
    return RAW


def _microbatches(batch: int, microbatches: Sequence[int] | None) -> list[int]:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise BadInput(f"batch must be a whole number of at least 1, got {batch!r}")
    sizes = sorted(set(microbatches or [1 << k for k in range(batch.bit_length())] + [batch]))
    for size in sizes:
        if not 1 <= size <= batch:
            raise BadInput(f"a microbatch must be of 1 to {batch} items, got {size}")
    return sizes


def _plan(case: _Case, answered: tuple[_Answered, float], batch: int) -> Plan:
    best, bound = answered
    chosen, cost = best.chosen, best.chosen.selected.cost
    realised = chosen.selected.realised
    reached = best.total_s(case.goal, batch)
    own = cost.objective_s(case.goal)
    if batch > 1 and case.goal == "latency":
        cost_latency, scaled = reached, bound
    else:
        cost_latency, scaled = cost.latency_s, bound * (best.items if case.goal == "throughput" else 1)
    return Plan(
        model=str(case.graph.name or "graph"),
        model_sha256="",
        objective=case.goal,
        nodes=tuple(NodeRef(name, "") for name in dict.fromkeys(stage.node for stage in realised.stages)),
        stages=realised.stages,
        transfers=realised.transfers,
        inputs=(),
        outputs=best.costs.outputs,
        max_in_flight=pipeline_depth(realised, cost, case.limits, {n: t[0] for n, t in case.wishes.taken.items()}),
        prediction=Prediction(
            batch=best.items,
            latency_s=cost_latency,
            throughput_per_s=cost.throughput_per_s,
            bottleneck=cost.bottleneck,
            # A plan that costs nothing is as fast as any.
            bound=min(scaled, reached) if case.goal == "latency" else max(min(scaled, own), SHORTEST_S),
            memory_bytes=dict(cost.memory_bytes),
            bytes_per_link={f"{a}->{b}": round(size) for (a, b), size in cost.sent_bytes.items()},
            alternatives=chosen.alternatives,
            note=chosen.note,
        ),
    )
