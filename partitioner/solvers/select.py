"""From the chain solver's candidates to the plan that is best when evaluated exactly.

The chain problem charges a tensor that skips over a stage at every cut; a plan sends it directly. So candidates are realised as
stages and transfers, evaluated by `partitioner.cost`, and compared by that. On a chain the two agree, and the first candidate is it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from partitioner.cost import Cost, evaluate
from partitioner.solvers.chain import candidates, solve_chain
from partitioner.solvers.diagnose import why_no_plan
from partitioner.solvers.problem import Candidate, ChainProblem, Objective
from splitnet.cluster import Link
from splitnet.errors import NoPlan
from splitnet.plan import Alternative, StageSpec, Transfer

__all__ = ["Realised", "Selected", "alternatives", "select"]

_EXAMINED = 32  # candidates evaluated once there is one that holds


@dataclass(frozen=True)
class Realised:
    """A candidate as a plan holds it: stages in a topological order, and what goes between them."""

    stages: tuple[StageSpec, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Selected:
    realised: Realised
    cost: Cost


Realise = Callable[[Candidate], Realised]


def select(
    problem: ChainProblem, objective: Objective, realise: Realise, links: Mapping[tuple[str, str], Link], operators: Sequence[str], stages: range,
    *, exact: bool = False,
) -> Selected:  # fmt: skip
    """The best plan of so many `stages`, one machine alone among them where that is allowed. `operators` name the problem's operators in
    messages. `exact`: the chain problem's figures are the plan's. Raises NoPlan saying what is missing where."""
    limits = dict(zip(problem.devices, problem.limits, strict=True))
    best: Selected | None = None
    refused: NoPlan | None = None

    def consider(candidate: Candidate) -> None:
        nonlocal best, refused
        realised = realise(candidate)
        if len(realised.stages) not in stages:
            return  # a stage turned out to have nothing to compute
        try:
            cost = evaluate(realised.stages, realised.transfers, links)
        except NoPlan as error:
            refused = refused or error
            return
        if any(size > limits[node] for node, size in cost.memory_bytes.items()):
            return
        if best is None or _rank(cost, realised, objective) < _rank(best.cost, best.realised, objective):
            best = Selected(realised, cost)

    if 1 in stages:
        for single in _singles(problem):
            consider(single)
    answer = solve_chain(problem, objective, stages=stages)
    if answer.candidate is not None:
        consider(answer.candidate)
        if not exact:
            for candidate in islice(candidates(problem, objective, stages=stages, limit_s=answer.candidate.value_s * 1.1), _EXAMINED):
                consider(candidate)
    if best is None:
        raise refused or why_no_plan(problem, operators, stages)
    return best


def alternatives(problem: ChainProblem, realise: Realise) -> tuple[Alternative, ...]:
    """What each device alone would do, whether the model fits there or not."""
    found = []
    for single in _singles(problem):
        realised = realise(single)
        cost = evaluate(realised.stages, realised.transfers, {})
        limit = problem.limits[single.order[0]]
        fits = all(size <= limit for size in cost.memory_bytes.values())
        found.append(Alternative(problem.devices[single.order[0]], cost.latency_s, cost.throughput_per_s, bool(fits)))
    return tuple(found)


def _singles(problem: ChainProblem) -> list[Candidate]:
    return [Candidate(float("nan"), (0, problem.length), (device,)) for device in range(len(problem.devices))]


def _rank(cost: Cost, realised: Realised, objective: Objective) -> tuple[float, float, int]:
    return cost.objective_s(objective), cost.latency_s, len(realised.stages)
