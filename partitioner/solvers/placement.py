"""A placement of vertices, and what it costs when it is realised as stages and transfers: the one figure that plans are compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from partitioner.cost import CodecFigures, Cost, Machine, Overhead, evaluate
from partitioner.solvers.problem import Candidate, Objective
from splitnet.cluster import Link
from splitnet.errors import CaptureError, NoPlan
from splitnet.plan import CLIENT, StageSpec, Transfer

__all__ = ["Placement", "Realised", "Scale", "Selected"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Stage k runs on device order[k]; vertex v is in stage_of[v]. `codecs` (by stage and stage) where they are decided already."""

    order: tuple[int, ...]
    stage_of: tuple[int, ...]
    codecs: tuple[tuple[tuple[int, int], str], ...] | None = None

    @classmethod
    def of(cls, candidate: Candidate, positions: tuple[int, ...], names: tuple[str, ...]) -> Placement:
        """`positions`: where in the vertices each of the chain's positions is."""
        stage_of: list[int] = []
        for k, (j, i) in enumerate(pairwise(candidate.cuts)):
            stage_of += [k] * (positions[i] - positions[j])
        return cls(candidate.order, tuple(stage_of), tuple(((k, k + 1), names[c]) for k, c in enumerate(candidate.codecs)))


@dataclass(frozen=True)
class Realised:
    """A placement as a plan holds it: stages in a topological order, and what goes between them."""

    stages: tuple[StageSpec, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Selected:
    placement: Placement
    realised: Realised
    cost: Cost

    @property
    def bytes(self) -> int:
        return sum(self.cost.link_bytes.values())


@dataclass
class Scale:
    """Weighs placements. `realise` makes stages and transfers (codecs not yet chosen), and raises CaptureError where stages would wait for each
    other. What was weighed before is remembered. `refused` is the first NoPlan that a placement met."""

    realise: Callable[[Placement], Realised]
    objective: Objective
    links: Mapping[tuple[str, str], Link]
    limits: Mapping[str, float]
    stages: range
    codecs: Mapping[str, CodecFigures]
    overheads: Mapping[str, Overhead]
    producers: Mapping[str, str]
    link_codecs: Mapping[tuple[str, str], tuple[str, ...]]
    budget: float | None = None
    ingress: str = ""
    machines: Sequence[Machine] = ()
    allowed: np.ndarray | None = None  # (devices, vertices) bool: which device may run which vertex
    refused: NoPlan | None = None

    def __post_init__(self) -> None:
        self._known: dict[Placement, Selected | None] = {}

    def weigh(self, placement: Placement) -> Selected | None:
        """None where it cannot be: memory, links, loss, or the number of stages."""
        if placement not in self._known:
            self._known[placement] = self._weigh(placement)
        return self._known[placement]

    @property
    def weighed(self) -> int:
        return len(self._known)

    @property
    def known(self) -> list[Selected]:
        """All that was weighed and can be."""
        return [selected for selected in self._known.values() if selected is not None]

    def rank(self, selected: Selected) -> tuple[float, float, int, int]:
        return selected.cost.objective_s(self.objective), selected.cost.latency_s, len(selected.realised.stages), selected.bytes

    def cost(self, realised: Realised) -> Cost:
        return evaluate(realised.stages, realised.transfers, self.links, self.codecs, self.overheads, self.producers, self.machines)

    def _weigh(self, placement: Placement) -> Selected | None:
        if self.allowed is not None:  # the search proposes what wishes rule out, too
            device = np.asarray(placement.order)[np.asarray(placement.stage_of)]
            if not self.allowed[device, np.arange(len(device))].all():
                return None
        try:
            realised = self.realise(placement)
            if len(realised.stages) not in self.stages or (self.ingress and realised.stages[0].node != self.ingress):
                return None
            realised = self._with_codecs(realised, dict(placement.codecs or ()))
            cost = self.cost(realised)
        except CaptureError:
            return None
        except NoPlan as error:
            self.refused = self.refused or error
            return None
        if any(size > self.limits[node] for node, size in cost.memory_bytes.items()):
            return None
        if self.budget is not None and cost.error > self.budget * (1 + 1e-12):
            return None
        return Selected(placement, realised, cost)

    def _with_codecs(self, realised: Realised, decided: Mapping[tuple[int, int], str]) -> Realised:
        node_of = {stage.name: stage.node for stage in realised.stages}
        number = {stage.name: k for k, stage in enumerate(realised.stages)}
        transfers, undecided = list(realised.transfers), []
        for at, transfer in enumerate(transfers):
            if CLIENT in (transfer.source, transfer.target):
                continue
            a, b = node_of[transfer.source], node_of[transfer.target]
            if a == b or not transfer.bytes:
                continue
            names = self.link_codecs.get((a, b), tuple(self.codecs))
            codec = decided.get((number[transfer.source], number[transfer.target]))
            if codec not in names:
                codec = min(names, key=lambda name: (self._error(name, transfer), name != "raw"), default="raw")
                undecided.append((at, names))
            elif len(realised.stages) > 2 and len(transfers) > len(realised.stages):
                undecided.append((at, names))
            transfers[at] = dataclasses.replace(transfer, codec=codec)
        realised = Realised(realised.stages, tuple(transfers))
        return self._better_codecs(realised, undecided) if any(len(names) > 1 for _, names in undecided) else realised

    def _error(self, name: str, transfer: Transfer) -> float:
        return max((self.codecs[name].error_of(self.producers.get(t, t)) for t in transfer.tensors), default=0.0)

    def _better_codecs(self, realised: Realised, undecided: list[tuple[int, tuple[str, ...]]]) -> Realised:
        """Changes one codec at a time as long as that is better."""
        best, cost = realised, self.cost(realised)

        def rank(cost: Cost) -> tuple[float, float, float]:
            excess = max(0.0, cost.error - self.budget * (1 + 1e-12)) if self.budget is not None else 0.0
            return excess, cost.objective_s(self.objective), cost.latency_s

        improved = True
        while improved:
            improved = False
            for at, names in undecided:
                for name in names:
                    if name == best.transfers[at].codec:
                        continue
                    transfers = list(best.transfers)
                    transfers[at] = dataclasses.replace(transfers[at], codec=name)
                    other = Realised(best.stages, tuple(transfers))
                    weighed = self.cost(other)
                    if rank(weighed) < rank(cost):
                        best, cost, improved = other, weighed, True
        return best
