"""Equal devices count as one kind: a set of devices becomes a count per kind, and 2^M sets become prod(n_k + 1) (PipeEdge 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from partitioner.solvers.problem import Candidate, ChainProblem, Codecs, Overheads

__all__ = ["Grouped", "group", "sets_of", "table_figures"]


@dataclass(frozen=True, eq=False)
class Grouped:
    """`problem` has one device per kind; two of one kind are joined by the link on its diagonal. `members` are the devices of each kind in the
    problem that was given."""

    problem: ChainProblem
    members: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.members))

    def unfold(self, candidate: Candidate) -> Candidate:
        """The same with devices in the place of kinds."""
        left = [list(devices) for devices in self.members]
        return replace(candidate, order=tuple(left[kind].pop(0) for kind in candidate.order))


def group(problem: ChainProblem) -> Grouped:
    """Two devices are of one kind when exchanging them changes no figure of the problem."""
    count = len(problem.devices)
    rows = _own_figures(problem)
    kinds: list[list[int]] = []
    for device in range(count):
        for kind in kinds:
            if np.array_equal(rows[kind[0]], rows[device]) and _exchangeable(problem, kind[0], device):
                kind.append(device)
                break
        else:
            kinds.append([device])
    first = [kind[0] for kind in kinds]
    second = [kind[-1] for kind in kinds]  # the far end of a link within a kind
    row, column = np.ix_(first, first)
    diagonal = np.arange(len(kinds))

    def pairs(figures: np.ndarray) -> np.ndarray:
        found = figures[..., row, column].copy()
        found[..., diagonal, diagonal] = figures[..., first, second]
        return found

    latency = pairs(problem.latency)
    for k, kind in enumerate(kinds):
        if len(kind) == 1:
            latency[k, k] = np.inf  # there is no second one
    codecs, overheads = problem.codecs, problem.overheads
    reduced = replace(
        problem,
        devices=tuple(problem.devices[d] for d in first),
        seconds=problem.seconds[first],
        limits=problem.limits[first],
        bandwidth=pairs(problem.bandwidth),
        latency=latency,
        given_codecs=Codecs(
            codecs.names,
            codecs.ratio,
            codecs.encode[:, first],
            codecs.decode[:, first],
            codecs.error,
            pairs(codecs.permitted),
            codecs.ratio_at,
        ),
        given_overheads=Overheads(overheads.stage_s[first], overheads.message_s[first], overheads.request_s[first]),
        allowed=None if problem.allowed is None else problem.allowed[first],
        given_ends=None if problem.given_ends is None else problem.given_ends[first],
    )
    return Grouped(reduced, tuple(map(tuple, kinds)))


def sets_of(sizes: tuple[int, ...], most: int) -> int:
    """How many choices of at most `most` devices there are; two devices of one kind are the same choice."""
    ways = [1] + [0] * most
    for size in sizes:
        ways = [sum(ways[k - taken] for taken in range(min(size, k) + 1)) for k in range(most + 1)]
    return sum(ways[1:])


def _own_figures(problem: ChainProblem) -> np.ndarray:
    codecs, overheads = problem.codecs, problem.overheads
    columns = [
        problem.seconds,
        problem.limits[:, None],
        codecs.encode.T,
        codecs.decode.T,
        np.stack([overheads.stage_s, overheads.message_s, overheads.request_s], axis=1),
    ]
    if problem.allowed is not None:
        columns.append(problem.allowed.astype(np.float64))
    return np.concatenate(columns, axis=1)


def _exchangeable(problem: ChainProblem, a: int, b: int) -> bool:
    others = np.ones(len(problem.devices), dtype=bool)
    others[[a, b]] = False
    for figures in (problem.bandwidth, problem.latency, problem.codecs.permitted):
        if not np.array_equal(figures[..., a, others], figures[..., b, others]):
            return False
        if not np.array_equal(figures[..., others, a], figures[..., others, b]):
            return False
        if not np.array_equal(figures[..., a, b], figures[..., b, a]):
            return False
    return True


def table_figures(sizes: tuple[int, ...], most: int, length: int, firsts: int, levels: int) -> float:
    """How many figures a table over all choices of devices would look at."""
    return float(sets_of(sizes, most)) * len(sizes) ** 2 * firsts * levels * (length + 1) if sizes else math.inf
