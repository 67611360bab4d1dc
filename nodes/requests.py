"""One request on one node: what has arrived of it, what it holds, when its time runs out.

A request is what goes through the pipeline under one key. What a client asked is a call (`nodes.calls`), which only the ingress knows:
its rows may be spread over several requests, and one request may carry rows of several calls.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nodes.admission import Buffers
from splitnet.errors import ProtocolError, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import TensorAssembler

if TYPE_CHECKING:
    from nodes.deployment import Deployment
    from nodes.generation.orders import Orders
    from nodes.noising import StageNoise

__all__ = ["Holder", "Owner", "RemembersReleases", "Request", "RequestKey", "Requests"]

_REMEMBERED = 8192  # ended requests, whose late frames are ignored; a frame later than that opens a request that soon runs out of time


class RequestKey(NamedTuple):
    """Unique among the nodes of a deployment: ids are made by the ingress."""

    deployment: str
    ingress: str
    request: str


class Holder:
    """What keeps tensors in this node's memory. `live` until it has ended; nothing is done for it afterwards."""

    __slots__ = ("_assemblers", "_buffers", "_held", "deadline_s", "deployment", "live")

    def __init__(self, deployment: Deployment, deadline_s: float, buffers: Buffers) -> None:
        self.deployment = deployment
        self.deadline_s = deadline_s  # by the event loop's clock
        self.live = True
        self._assemblers: dict[tuple[str, str], TensorAssembler] = {}
        self._buffers = buffers
        self._held: dict[Hashable, int] = {}

    @property
    def arriving(self) -> int:
        """Tensors of which a part is there."""
        return len(self._assemblers)

    def hold(self, what: Hashable, size_bytes: int) -> None:
        """Counts bytes that are kept in memory, until `free(what)` or the end. Raises Overloaded when the node has no room."""
        if self.live:
            self._buffers.take(size_bytes)
            self._held[what] = self._held.get(what, 0) + size_bytes

    def free(self, what: Hashable) -> None:
        self._buffers.give_back(self._held.pop(what, 0))

    def assembler(self, stage: str, chunk: pb.TensorChunk, max_bytes: int) -> tuple[TensorAssembler, bool]:
        """The tensor that this chunk belongs to, and whether it is a new one: counted before anything is allocated. Raises
        ProtocolError, BadInput, Overloaded."""
        place = (stage, chunk.name)
        found = self._assemblers.get(place)
        if found is not None:
            return found, False
        if not chunk.dtype:
            raise ProtocolError(f"tensor {chunk.name!r}: its first chunk is missing")
        if chunk.stored_bytes <= max_bytes:  # else the assembler refuses it, and says why
            self.hold(place, chunk.stored_bytes)
        found = self._assemblers[place] = TensorAssembler(chunk, max_bytes)
        return found, True

    def assembled(self, stage: str, name: str) -> None:
        del self._assemblers[stage, name]

    def end(self) -> None:
        """Lets go of everything."""
        self.live = False
        self._buffers.give_back(sum(self._held.values()))
        self._held.clear()
        self._assemblers.clear()


class Owner(Protocol):
    """Who answers for a request, at its ingress."""

    def take_output(self, request: Request, value: str, array: np.ndarray) -> None:
        """A value that makes up a part of the answer has come. Raises SplitnetError."""
        ...

    def ended(self, request: Request, error: SplitnetError | None) -> None:
        """It holds nothing any more. `error`: what it failed with. Without one it was answered, or nobody wanted it."""
        ...


@runtime_checkable
class RemembersReleases(Protocol):
    """An owner of requests that go through a stage with noise."""

    def only_once(self, noise: StageNoise, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The stage's values as they are to leave: those of rows that left before as they were then. Raises SplitnetError."""
        ...


class Request(Holder):
    __slots__ = ("awaited", "inputs", "key", "orders", "owner", "ran", "running", "timer", "unsent")

    def __init__(self, key: RequestKey, deployment: Deployment, deadline_s: float, buffers: Buffers) -> None:
        super().__init__(deployment, deadline_s, buffers)
        self.key = key
        self.owner: Owner | None = None  # at the ingress
        self.awaited: set[str] = set()  # at the ingress: values that make up the answer and have not arrived
        self.inputs: dict[str, dict[str, np.ndarray]] = {}  # of stages on this node, until they run
        self.ran: set[str] = set()  # stages of this node that have been started
        self.running = 0  # those of them that have not finished
        self.unsent = 0  # parcels
        self.orders: Orders | None = None  # of a decoder model's forward pass: what it does
        self.timer: asyncio.TimerHandle | None = None

    @property
    def done(self) -> bool:
        """Whether this node has nothing more to do for it (the ingress has, until it is answered)."""
        return len(self.ran) == len(self.deployment.stages) and not (self.running or self.unsent)

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.inputs.clear()
        super().end()


class Requests:
    """All live requests of a node, and the keys of those that ended a short while ago."""

    def __init__(self) -> None:
        self._live: dict[RequestKey, Request] = {}
        self._ended: OrderedDict[RequestKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """Over a copy: requests may end meanwhile."""
        return iter(list(self._live.values()))

    def get(self, key: RequestKey) -> Request | None:
        return self._live.get(key)

    def has_ended(self, key: RequestKey) -> bool:
        return key in self._ended

    def add(self, request: Request) -> None:
        self._live[request.key] = request

    def forget(self, key: RequestKey) -> None:
        """From now on, frames that still come for it are ignored."""
        self._live.pop(key, None)
        self._ended[key] = None
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def count(self, deployment: Deployment | None = None) -> int:
        """Of one deployment, or of all."""
        return len(self._live) if deployment is None else sum(request.deployment is deployment for request in self._live.values())
