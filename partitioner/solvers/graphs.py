"""`partitioner.solve`: a plan for any networkx graph of costs, without a model, torch or a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from partitioner.solvers.bound import Fastest, bottleneck_bound, latency_bound
from partitioner.solvers.chain import is_solvable
from partitioner.solvers.problem import Objective
from partitioner.solvers.reading import read_graph
from partitioner.solvers.select import alternatives, select
from splitnet.errors import BadInput
from splitnet.plan import NodeRef, Plan, Prediction

if TYPE_CHECKING:
    import networkx

__all__ = ["check_objective", "solve", "stage_range"]


def check_objective(objective: str) -> Objective:
    if objective == "latency" or objective == "throughput":
        return objective  # type: ignore[return-value]
    raise BadInput(f"objective {objective!r} is neither 'latency' nor 'throughput'")


def solve(
    graph: networkx.DiGraph,
    devices: Mapping[str, float],
    links: Mapping[tuple[str, str], tuple[float, float]],
    objective: str = "latency",
    codecs: Sequence[str] | None = None,
    *,
    stages: int | None = None,
    max_stages: int | None = None,
) -> Plan:
    """The best plan for a graph of operators on devices.

    graph: each vertex carries `seconds` (a mapping from device name to seconds), `param_bytes` and `activation_bytes` (default 0); a
    vertex without successors may carry `output_bytes`, which return to the first stage's device. Each edge carries `bytes`. Edges of one
    vertex that name the same `tensor`, or name none and carry equally many bytes, carry one tensor, sent at most once over a cut.
    devices: name -> memory in bytes (math.inf: no limit). links: (a, b) -> (bytes per second, seconds of latency); a pair
    that is not listed cannot send. codecs: only "raw" can be planned with so far. stages: exactly so many; max_stages: at most.

    The operators are put in a topological order and cut into intervals, each device running at most one; every tensor that is
    alive at a cut is charged there. That is exact for chains; `prediction.bound` proves it (there it equals the objective), and for other
    graphs it is a bound for every plan. The returned plan's nodes have no address. The cost model is `partitioner.cost`'s.

    Raises BadInput naming the item that is wrong, NoPlan saying what is missing where.
    """
    goal = check_objective(objective)
    unknown = sorted(set(codecs or ()) - {"raw"})
    if unknown:
        raise BadInput(f"codec {unknown[0]!r} cannot be planned with; only 'raw' can")
    costs = read_graph(graph, devices, links)
    allowed = stage_range(len(costs.problem.devices), stages, max_stages)
    alone = alternatives(costs.problem, costs.realise)
    best = select(costs.problem, goal, costs.realise, costs.links, costs.names, allowed, exact=costs.is_chain)
    cost = best.cost
    reached = cost.objective_s(goal)
    everything = stage_range(len(devices), None, None)
    if costs.is_chain and (allowed == everything or is_solvable(costs.problem, len(devices))):
        free = (
            best if allowed == everything else select(costs.problem, goal, costs.realise, costs.links, costs.names, everything, exact=True)
        )
        bound = free.cost.objective_s(goal)
    elif goal == "latency":
        singles = [a.latency_s for a in alone if a.fits]
        bound = latency_bound(costs.problem.seconds, costs.uses, singles, Fastest.of(costs.links.values()))
    else:
        bound = bottleneck_bound(costs.problem.seconds)
    return Plan(
        model=str(graph.name or "graph"),
        model_sha256="",
        objective=goal,
        nodes=tuple(NodeRef(name, "") for name in dict.fromkeys(stage.node for stage in best.realised.stages)),
        stages=best.realised.stages,
        transfers=best.realised.transfers,
        inputs=(),
        outputs=costs.outputs,
        prediction=Prediction(
            batch=1,
            latency_s=cost.latency_s,
            throughput_per_s=cost.throughput_per_s,
            bottleneck=cost.bottleneck,
            bound=min(bound, reached),
            memory_bytes=dict(cost.memory_bytes),
            bytes_per_link={f"{a}->{b}": size for (a, b), size in cost.link_bytes.items()},
            alternatives=alone,
        ),
    )


def stage_range(devices: int, stages: int | None, max_stages: int | None) -> range:
    """How many stages there may be. Raises BadInput for a number below 1."""
    for name, figure in (("stages", stages), ("max_stages", max_stages)):
        if figure is not None and figure < 1:
            raise BadInput(f"{name} must be at least 1, got {figure}")
    if stages is not None:
        return range(stages, stages + 1)
    return range(1, min(devices, max_stages or devices) + 1)
