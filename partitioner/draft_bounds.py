"""What is known of the best plan of a draft without finding it: lower bounds, and what a minimum cut suggests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from partitioner.cost import Machine
from partitioner.draft import Draft
from partitioner.solvers.bound import Instance, bottleneck_bound, latency_bound, shared_bound
from partitioner.solvers.chain import solve_chain
from partitioner.solvers.graphs import overhead_arrays
from partitioner.solvers.placement import Placement, Scale
from partitioner.solvers.problem import Floats, Objective, interval_memory
from partitioner.solvers.reading import link_arrays
from partitioner.solvers.tiers import two_tiers
from partitioner.structure import Structure

__all__ = ["bound_s", "chain_bound_s", "cuts_for_two"]

_MAX_TIERS = 3000  # operators for which a minimum cut is looked for


def bound_s(draft: Draft, goal: Objective, stages: int = 1) -> float:
    """A lower bound over all plans of at least so many stages. Only operators that run exactly once count: cheap ones may run anywhere, or not
    at all."""
    costs = draft.costly
    kept = [i for i, o in enumerate(draft.operators) if o.counts]
    if not kept:
        return 0.0
    uses: dict[int, dict[int, float]] = {}
    for value in costs.values:
        for user in value.users:
            carried = uses.setdefault(user, {})
            carried[value.source] = carried.get(value.source, 0.0) + value.bytes
    bandwidth, latency = link_arrays(draft.names, draft.links)
    structure, inputs = draft.structure, {spec.name for spec in draft.structure.inputs}
    entering = [sum(structure.value_bytes[v] for v in structure.vertices[i].inputs if v in inputs) for i in kept]
    answers: dict[int, float] = {}
    for value in costs.values:
        if value.answer:
            answers[value.source] = answers.get(value.source, 0.0) + value.bytes
    instance = Instance(
        seconds=costs.seconds, uses=uses, latency=latency, bandwidth=bandwidth, codecs=draft.codecs,
        stage_s=overhead_arrays(draft.names, draft.overheads).stage_s, sizes=(1,) * len(draft.names),
        limits=np.array([draft.limits[name] for name in draft.names]), param_bytes=np.asarray(costs.param_bytes, dtype=np.float64),
        allowed=None if draft.allowed is None else draft.allowed[:, kept], input_bytes=np.asarray(entering, dtype=np.float64),
        return_bytes=answers,
    )  # fmt: skip
    if goal == "latency":
        return latency_bound(instance)
    seconds = costs.seconds if instance.allowed is None else np.where(instance.allowed, costs.seconds, np.inf)
    return max([bottleneck_bound(instance), *(_shared_s(draft, machine, seconds, stages) for machine in draft.machines)])


def _shared_s(draft: Draft, machine: Machine, seconds: Floats, stages: int) -> float:
    """See `shared_bound`. A stage that is not the first takes at least one tensor where each operator depends on an input of the model."""
    fed: list[bool] = []
    for vertex, operator in zip(draft.structure.vertices, draft.operators, strict=True):
        fed.append(vertex.op == "input" or any(fed[u] for u in operator.before))
    arrivals = all(f for f, operator in zip(fed, draft.operators, strict=True) if operator.counts)
    threads = {k: machine.threads[name] for k, name in enumerate(draft.names) if name in machine.threads}
    return shared_bound(seconds, threads, machine.cores, overhead_arrays(draft.names, draft.overheads), stages, arrivals)


def chain_bound_s(draft: Draft, goal: Objective, stages: range) -> float:
    """What the best plan of a simple chain, with one stage per node, cannot fall below; 0 for a model that is none. There the dynamic programme is
    exact but for the cheap operators, which a plan may have on either side of a cut: here they run where they are fastest (for throughput: nowhere),
    and what is sent is the smallest of what they pass on. Wishes that only rule plans out, and the cores that nodes share, are left away."""
    kept = [i for i, o in enumerate(draft.operators) if o.counts]
    positions = draft.positions
    if not _is_path(draft.structure) or len(positions) != len(kept) + 1 or draft.codecs.ratio_at is not None:
        return 0.0
    problem = draft.problem(positions)
    own = draft.costly.param_bytes
    memory = interval_memory([0.0] * len(kept), [[(str(i), float(size))] for i, size in enumerate(own)], np.zeros(len(positions)))
    allowed = None if draft.allowed is None else draft.allowed[:, kept]
    relaxed = replace(problem, seconds=draft.seconds[:, kept], memory=memory, allowed=allowed)
    cheap_s = np.delete(draft.seconds, kept, axis=1).min(axis=0).sum() if goal == "latency" else 0.0  # one after the other, each somewhere
    return solve_chain(relaxed, goal, stages=stages).bound_s + float(cheap_s)


def _is_path(structure: Structure) -> bool:
    """Whether each operator takes the one value that the operator before it makes, and nothing else but parameters."""
    if len(structure.inputs) != 1 or len(structure.outputs) != 1:
        return False
    last = structure.inputs[0].name
    for vertex in structure.vertices:
        if vertex.op == "input":
            continue
        if tuple(vertex.inputs) != (last,) or len(vertex.values) != 1:
            return False
        last = vertex.values[0].name
    return structure.outputs[0].value == last


def cuts_for_two(draft: Draft, goal: Objective, scale: Scale) -> Iterator[Placement]:
    """For two nodes and latency: what a minimum cut of the costly operators suggests."""
    costs = draft.costly
    if len(draft.nodes) != 2 or goal != "latency" or scale.budget is not None or len(costs.operators) > _MAX_TIERS:
        return
    kept = [i for i, o in enumerate(draft.operators) if o.counts]
    bandwidth, latency = link_arrays(draft.names, draft.links)
    problem = costs.problem(
        np.array([draft.limits[name] for name in draft.names]), (bandwidth, latency),
        replace(draft.codecs, error=np.zeros((len(draft.codecs.names), len(kept) + 1)), ratio_at=None), overhead_arrays(draft.names, draft.overheads),
        None if draft.allowed is None else draft.allowed[:, kept], (0, len(kept)),
    )  # fmt: skip
    for placement in two_tiers(costs, replace(problem, allowed=None if draft.allowed is None else draft.allowed[:, kept])).placements:
        stage_of, k = [], 0
        for i in range(len(draft.operators)):
            if i in kept[k : k + 1]:
                k += 1
            stage_of.append(placement.stage_of[min(k, len(kept) - 1)] if i not in kept[k - 1 : k] else placement.stage_of[k - 1])
        yield Placement(placement.order, tuple(stage_of))
