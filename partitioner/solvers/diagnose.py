"""Why there is no plan: how much memory is missing where, which link, or which wishes contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from partitioner.solvers.kinds import group
from partitioner.solvers.problem import Candidate, ChainProblem, Floats
from partitioner.solvers.sums import Hop, Sums
from splitnet.errors import NoPlan
from splitnet.explain import bytes_text

__all__ = ["why_no_plan"]

_MOST_STAGES = 6  # that are looked at where the choices of devices are many
_MANY = 10  # devices


def why_no_plan(problem: ChainProblem, operators: Sequence[str], stages: range | None = None, budget: float | None = None) -> NoPlan:
    """The error to raise where the chain problem has no solution; `operators` are the names of its L operators."""
    allowed = stages or range(1, len(problem.devices) + 1)
    if problem.length < min(allowed, default=1) or len(problem.devices) < min(allowed, default=1):
        return NoPlan(
            f"{min(allowed)} stages were asked for, but there are {problem.length} places for operators and {len(problem.devices)} nodes",
            remedy="ask for fewer stages, or add nodes: each takes one stage",
        )
    if len(problem.devices) > _MANY:
        allowed = range(min(allowed), max(min(allowed) + 1, min(max(allowed), _MOST_STAGES) + 1))
    connected: np.ndarray = np.isfinite(problem.latency) & problem.codecs.permitted.any(axis=0)
    pairs = connected[:, :, None] | (problem.cut_bytes == 0)
    back = np.isfinite(problem.latency) | (problem.return_bytes == 0)
    joined = _arrange(problem, pairs, back, allowed, 0.0)
    if joined is not None:
        missing = _missing_links(problem, joined, pairs, back)
        if missing:
            return NoPlan(
                f"the nodes that would have to work together are not connected: there is no link {missing}",
                remedy="add the link to the cluster (`splitnet probe` measures every pair), or give the nodes more memory",
            )
        return NoPlan(
            f"no plan stays within the error that is allowed ({budget})",
            remedy="allow more (max_accuracy_loss), or a codec without loss",
        )
    if _arrange(problem, pairs, back, allowed, np.inf) is None:
        return NoPlan(
            "what is pinned, forbidden and asked for cannot all hold: a node runs one stage, which is one stretch of the model, and no order "
            f"of {_stages_text(allowed)} over the nodes {', '.join(map(repr, problem.devices))} gives every operator to a node that may run it",
            remedy="take back one of the wishes, or allow more stages",
        )
    return _too_little_memory(problem, operators, _tightest(problem, pairs, back, allowed))


def _stages_text(allowed: range) -> str:
    low, high = min(allowed), max(allowed)
    return f"{low} stage{'s' * (low != 1)}" if low == high else f"{low} to {high} stages"


def _arrange(problem: ChainProblem, pairs: np.ndarray, back: np.ndarray, stages: range, lacking: float) -> Candidate | None:
    """An arrangement in which no node lacks more than so many bytes, with as few missing links as can be."""
    grouped = group(replace(problem, limits=problem.limits + lacking))
    reduced = grouped.problem
    first, second = [m[0] for m in grouped.members], [m[-1] for m in grouped.members]
    row, column = np.ix_(first, first)
    crossing: Floats = np.where(pairs, 0.0, 1.0)[row, column]
    home: Floats = np.where(back, 0.0, 1.0)[row, column]
    diagonal = np.arange(len(first))
    crossing[diagonal, diagonal] = np.where(pairs, 0.0, 1.0)[first, second]
    home[diagonal, diagonal] = np.where(back, 0.0, 1.0)[first, second]
    nothing = np.zeros(problem.length + 1, dtype=np.int64)
    hop = Hop(np.zeros(crossing.shape, dtype=np.int64), crossing, nothing)
    found = Sums(np.where(reduced.possible, 0.0, np.inf), [hop], home, grouped.sizes, stages).best()
    return None if found is None else grouped.unfold(found)


def _tightest(problem: ChainProblem, pairs: np.ndarray, back: np.ndarray, stages: range) -> Candidate:
    """The arrangement that makes the largest lack on any node as small as it can be."""
    lacking = np.unique(np.maximum(problem.memory[None] - problem.limits[:, None, None], 0.0)[:, np.triu_indices(problem.length + 1, 1)[0]])
    lacking = lacking[np.isfinite(lacking)]
    low, high = 0, len(lacking) - 1
    while low < high:
        middle = (low + high) // 2
        if _arrange(problem, pairs, back, stages, float(lacking[middle])) is None:
            low = middle + 1
        else:
            high = middle
    found = _arrange(problem, pairs, back, stages, float(lacking[low]))
    assert found is not None, "with enough memory there is an arrangement"
    return found


def _too_little_memory(problem: ChainProblem, operators: Sequence[str], candidate: Candidate) -> NoPlan:
    """`candidate` makes the largest excess on any node as small as it can be."""
    worst = max(
        zip(candidate.order, candidate.cuts, candidate.cuts[1:], strict=False),
        key=lambda s: problem.memory[s[1], s[2]] - problem.limits[s[0]],
    )
    device, start, end = worst
    need, limit = problem.memory[start, end], problem.limits[device]
    whole, together = problem.memory[0, -1], float(np.sum(problem.limits))
    single = np.diag(problem.memory, 1)
    hopeless = int(np.argmax(single))
    if single[hopeless] > problem.limits.max():
        where = f"operator {operators[hopeless]!r} alone needs {bytes_text(single[hopeless])}, and the largest node has {bytes_text(problem.limits.max())}"
        missing = float(single[hopeless] - problem.limits.max())
    else:
        where = (
            f"in the arrangement that lacks least, node {problem.devices[device]!r} would need {bytes_text(need)} for the operators "
            f"{operators[start]!r} to {operators[end - 1]!r} and has {bytes_text(limit)}"
        )
        missing = float(need - limit)
    return NoPlan(
        f"the model does not fit: {bytes_text(missing)} of memory are missing; {where} (the whole model needs {bytes_text(whole)} on one node, "
        f"all nodes together have {bytes_text(together)})",
        remedy="raise the nodes' memory limits, add a node, or take a smaller batch",
    )


def _missing_links(problem: ChainProblem, candidate: Candidate, pairs: np.ndarray, back: np.ndarray) -> str:
    """`candidate` fits and uses as few missing links as possible."""
    names = problem.devices
    missing = [(a, b) for a, b, cut in zip(candidate.order, candidate.order[1:], candidate.cuts[1:], strict=False) if not pairs[a, b, cut]]
    if len(candidate.order) > 1 and not back[candidate.order[-1], candidate.order[0]]:
        missing.append((candidate.order[-1], candidate.order[0]))
    return ", ".join(f"{names[a]!r} -> {names[b]!r}" for a, b in missing)
