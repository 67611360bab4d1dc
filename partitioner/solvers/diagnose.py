"""Why there is no plan: how much memory is missing where, or which link."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partitioner.solvers.chain import MinMax, MinSum
from partitioner.solvers.problem import Candidate, ChainProblem
from splitnet.errors import NoPlan
from splitnet.explain import bytes_text

__all__ = ["why_no_plan"]


def why_no_plan(problem: ChainProblem, operators: Sequence[str], stages: range | None = None) -> NoPlan:
    """The error to raise where the chain problem has no solution; `operators` are the names of its L operators."""
    allowed = stages or range(1, len(problem.devices) + 1)
    if problem.length < min(allowed, default=1) or len(problem.devices) < min(allowed, default=1):
        return NoPlan(
            f"{min(allowed)} stages were asked for, but there are {problem.length} places for operators and {len(problem.devices)} nodes",
            remedy="ask for fewer stages, or add nodes: each takes one stage",
        )
    order = np.triu(np.ones(problem.memory.shape, dtype=bool), 1)
    excess = np.maximum(problem.memory[None] - problem.limits[:, None, None], 0.0)
    excess = np.where(order, excess, np.inf)
    pairs = np.isfinite(problem.latency)[:, :, None] | (problem.cut_bytes == 0)
    back = np.isfinite(problem.latency) | (problem.return_bytes == 0)
    fits = np.where(excess > 0, np.inf, 0.0)
    joined = MinSum(fits, np.where(pairs, 0.0, 1.0), np.where(back, 0.0, 1.0), allowed).best_candidate()
    if joined is not None:
        return _missing_link(problem, joined, pairs, back)
    tightest = MinMax(excess, np.where(pairs, 0.0, np.inf), np.where(back, 0.0, np.inf), allowed).best_candidate()
    tightest = tightest or MinMax(excess, np.zeros(pairs.shape), np.zeros(back.shape), allowed).best_candidate()
    assert tightest is not None, "an unconstrained chain has a solution"
    return _too_little_memory(problem, operators, tightest)


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


def _missing_link(problem: ChainProblem, candidate: Candidate, pairs: np.ndarray, back: np.ndarray) -> NoPlan:
    """`candidate` fits and uses as few missing links as possible."""
    names = problem.devices
    missing = [(a, b) for a, b, cut in zip(candidate.order, candidate.order[1:], candidate.cuts[1:], strict=False) if not pairs[a, b, cut]]
    if len(candidate.order) > 1 and not back[candidate.order[-1], candidate.order[0]]:
        missing.append((candidate.order[-1], candidate.order[0]))
    listed = ", ".join(f"{names[a]!r} -> {names[b]!r}" for a, b in missing)
    return NoPlan(
        f"the nodes that would have to work together are not connected: there is no link {listed}",
        remedy="add the link to the cluster (`splitnet probe` measures every pair), or give the nodes more memory",
    )
