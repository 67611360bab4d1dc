"""A plan as one node sees it: its own stages with their engines, where each value goes, and what has been counted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nodes.admission import Admission
from nodes.codec_choice import CodecChooser, CodecOnLink, chooser_of
from nodes.engines.base import Engine
from nodes.generation.stage import StageSessions
from nodes.goodput import Goodput
from nodes.line import Line
from nodes.link import Link
from nodes.noising import StageNoise
from splitnet.batching import BatchAxes
from splitnet.generations import FIRST, parse_key
from splitnet.plan import CLIENT, NodeRef, Plan, StageSpec
from splitnet.standby import followers
from splitnet.tensors import TensorSpec

if TYPE_CHECKING:
    from nodes.calls import Call
    from nodes.generation.generator import Generator

__all__ = ["Deployment", "Route", "Stage"]


@dataclass(frozen=True, slots=True)
class Route:
    """Where one value goes. `stage` CLIENT: to the ingress, as a part of the answer. `chooser`: where the codec may change while serving."""

    stage: str
    node: str
    codec: str
    chooser: CodecChooser | None = None

    def coding(self, goodput: Goodput) -> str | CodecOnLink:
        """The codec, or who chooses one; equal for values that can be encoded once for all."""
        return self.codec if self.chooser is None else CodecOnLink(self.chooser, goodput)


@dataclass(slots=True, eq=False)
class Stage:
    """One of this node's stages. Totals are since activation."""

    spec: StageSpec
    engine: Engine
    shard: str  #: sha256 of the manifest
    inputs: Mapping[str, TensorSpec]
    routes: Mapping[str, tuple[Route, ...]]
    reserved_bytes: int
    requests: int = 0
    failures: int = 0
    queued: int = 0
    wait_s: float = 0.0
    decode_s: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0
    send_s: float = 0.0
    sessions: StageSessions = field(default_factory=StageSessions)  #: of a decoder model
    noise: StageNoise | None = None  #: by its plan, without which nothing of it goes to other stages


@dataclass(eq=False)
class Deployment:
    """One generation of a deployment. `name` is its key among the nodes, `family` what clients call it. `links`: to every node that this one has
    something to say to, by the plan's names."""

    name: str
    plan: Plan
    plan_sha256: str
    node: NodeRef
    stages: Mapping[str, Stage]
    admission: Admission
    links: Mapping[str, Link] = field(default_factory=dict)
    standby: Mapping[str, Stage] = field(default_factory=dict)  #: stages of other nodes that are ready here, should one of those be lost
    paused: bool = False  #: at the ingress: calls wait, for a node was lost and there is hope
    heir: Deployment | None = None  #: at the ingress: the generation that has taken over its calls
    draining: bool = False  #: it is being unloaded here
    stopping: set[str] = field(default_factory=set)  #: at the ingress: nodes that were asked to stop and finish what was admitted
    closing: set[str] = field(default_factory=set)  #: those of them in whose place there is nobody
    released: asyncio.Event = field(default_factory=asyncio.Event)  #: elsewhere: the ingress needs nothing more of this node
    gone: asyncio.Event = field(default_factory=asyncio.Event)  #: it has been unloaded here

    def __post_init__(self) -> None:
        self.family, self.generation = parse_key(self.name)
        self.generation = self.generation or FIRST
        self.ingress = self.plan.ingress
        self.is_ingress = self.node == self.ingress
        self.follows = self.node.name in followers(self.plan)  # this node becomes the ingress when that is lost
        self.inputs = {spec.name: spec for spec in self.plan.inputs}
        self.input_routes = routes(self.plan, CLIENT)
        for stage in self.held.values():
            stage.noise = StageNoise.of(self.plan, stage.spec, stage.shard)
        self.line: Line[Call] = Line(self.plan.batching)  # at the ingress
        self.batch_axes: BatchAxes | None = self.plan.batch_axes  # None where requests are neither joined nor divided
        self.generator: Generator | None = None  # at the ingress of a decoder model, from its first call on
        self._waker: asyncio.TimerHandle | None = None
        self.outputs: dict[str, list[str]] = {}  # value -> the names under which the client gets it
        for output in self.plan.outputs:
            self.outputs.setdefault(output.value, []).append(output.spec.name)

    def wake(self, timer: asyncio.TimerHandle) -> None:
        """Keeps the one timer that looks at the line again."""
        if self._waker is not None:
            self._waker.cancel()
        self._waker = timer

    def choosers(self) -> list[tuple[str, Route, CodecChooser]]:
        """The transfers from this node whose codec may change: source, where one of its values goes, and who chooses."""
        sources = {CLIENT: self.input_routes if self.is_ingress else {}} | {stage.spec.name: stage.routes for stage in self.stages.values()}
        found = {
            route.chooser: (source, route, route.chooser)
            for source, values in sources.items()
            for targets in values.values()
            for route in targets
            if route.chooser is not None and route.node != self.node.name
        }
        return list(found.values())

    @property
    def reserved_bytes(self) -> int:
        return sum(stage.reserved_bytes for stage in self.held.values())

    @property
    def newest(self) -> Deployment:
        """Itself, or whoever has taken over its calls."""
        return self if self.heir is None else self.heir.newest

    @property
    def is_next(self) -> bool:
        """Whether it is for this node to follow the ingress: the others before it are gone, too."""
        order = followers(self.plan)
        before = order[: order.index(self.node.name)] if self.follows else order
        return self.follows and not any(link.connected for name, link in self.links.items() if name in before)

    @property
    def held(self) -> dict[str, Stage]:
        """All that is loaded here."""
        return {**self.stages, **self.standby}

    def forget_engines(self) -> None:
        """In the compute thread, so that what torch holds is freed where it was made."""
        for stage in self.held.values():
            if len(stage.sessions):  # another generation may go on with the engine
                stage.sessions.close_all(stage.engine)
        self.stages, self.standby = {}, {}

    def stages_on(self, node: str) -> str:
        """For messages: the stages that `node` serves."""
        return ", ".join(stage.name for stage in self.plan.stages if stage.node == node)

    def neighbours(self) -> tuple[NodeRef, ...]:
        """The nodes to which this one needs a link: the ingress, and whoever may follow it, watches and tells all of them; the others pass values on, and report
        to the ingress. Links to those that may take over are there before they are needed."""
        if self.is_ingress or self.follows:
            names = {name for stage in self.plan.stages for name in (stage.node, *stage.replicas)}
        else:
            targets = {route.stage for stage in self.held.values() for routes in stage.routes.values() for route in routes} - {CLIENT}
            targets.add(self.plan.stages[0].name)  # the ingress's
            names = {name for target in targets for name in (self.plan.stage(target).node, *self.plan.stage(target).replicas)}
        return tuple(node for node in self.plan.nodes if node.name in names and node != self.node)


def routes(plan: Plan, source: str) -> dict[str, tuple[Route, ...]]:
    """For each value that leaves `source` (a stage, or CLIENT): where it goes."""
    found: dict[str, tuple[Route, ...]] = {}
    for transfer in plan.transfers:
        if transfer.source == source:
            node = plan.ingress.name if transfer.target == CLIENT else plan.stage(transfer.target).node
            chooser = chooser_of(plan, transfer)
            for tensor in transfer.tensors:
                found[tensor] = (*found.get(tensor, ()), Route(transfer.target, node, transfer.codec, chooser))
    return found
