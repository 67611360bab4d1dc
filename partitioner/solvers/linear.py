"""From the chain solver's candidates to the plan that is best when it is realised.

The chain problem charges a tensor that skips over a stage at every cut; a plan sends it directly. So candidates are realised as
stages and transfers, evaluated by `partitioner.cost`, and compared by that. On a chain the two agree, and the first candidate is it.
"""

from __future__ import annotations

from itertools import islice

from partitioner.cost import Cost
from partitioner.solvers.chain import Answer, candidates, solve_chain
from partitioner.solvers.placement import Placement, Realised, Scale, Selected
from partitioner.solvers.problem import Candidate, ChainProblem
from partitioner.solvers.route import Prices
from splitnet.plan import Alternative

__all__ = ["alternatives", "best_in_order", "singles"]

_EXAMINED = 24  # candidates that are realised
_SLACK = 1.1  # how far above the best chain bottleneck a plan is still looked at


def best_in_order(
    scale: Scale,
    problem: ChainProblem,
    positions: tuple[int, ...],
    *,
    exact: bool = False,
    bound_s: float = 0.0,
    prices: Prices | None = None,
) -> tuple[Selected | None, Answer]:
    """`positions`: where in the operators the chain's positions are. `exact`: the chain problem's figures are the plan's. `prices`: see
    `solve_chain`."""
    best: Selected | None = None
    names = problem.codecs.names

    def consider(candidate: Candidate) -> None:
        nonlocal best
        weighed = scale.weigh(Placement.of(candidate, positions, names))
        if weighed is not None and (best is None or scale.rank(weighed) < scale.rank(best)):
            best = weighed

    if not exact:
        for single in singles(problem):
            consider(single)
    answer = solve_chain(problem, scale.objective, stages=scale.stages, budget=scale.budget, bound_s=bound_s, prices=prices)
    if answer.candidate is not None:
        consider(answer.candidate)
        if not exact or best is None:
            for candidate in islice(
                candidates(problem, scale.objective, stages=scale.stages, budget=scale.budget, limit_s=answer.candidate.value_s * _SLACK),
                _EXAMINED,
            ):
                consider(candidate)
            if scale.machines and scale.objective == "throughput":
                # Nodes that share cores are as busy as all of them together: plans of little work in all are looked at, too.
                for candidate in islice(candidates(problem, "latency", stages=scale.stages, budget=scale.budget), _EXAMINED):
                    consider(candidate)
    return best, answer


def alternatives(scale: Scale, problem: ChainProblem, positions: tuple[int, ...]) -> tuple[Alternative, ...]:
    """What each device alone would do, whether the model fits there or not."""
    found = []
    for single in singles(problem):
        realised: Realised = scale.realise(Placement.of(single, positions, problem.codecs.names))
        cost: Cost = scale.cost(realised)
        limit = scale.limits[problem.devices[single.order[0]]]
        fits = all(size <= limit for size in cost.memory_bytes.values())
        found.append(Alternative(problem.devices[single.order[0]], cost.latency_s, cost.throughput_per_s, bool(fits)))
    return tuple(found)


def singles(problem: ChainProblem) -> list[Candidate]:
    """Each device alone, where it may run everything."""
    allowed = problem.allowed
    able = [d for d in range(len(problem.devices)) if allowed is None or allowed[d].all()]
    return [Candidate(float("nan"), (0, problem.length), (device,)) for device in able]
