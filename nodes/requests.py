"""One request on one node: what has arrived of it, what it holds, when its time runs out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nodes.admission import Buffers
from splitnet.errors import ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import TensorAssembler

if TYPE_CHECKING:
    from nodes.clients import ClientStream
    from nodes.deployment import Deployment

__all__ = ["Answer", "Request", "RequestKey", "Requests"]

_REMEMBERED = 8192  # ended requests, whose late frames are ignored; a frame later than that opens a request that soon runs out of time


class RequestKey(NamedTuple):
    """Unique among the nodes of a deployment: ids are made by the ingress."""

    deployment: str
    ingress: str
    request: str


@dataclass(slots=True)
class Answer:
    """What only the ingress knows of a request."""

    client: ClientStream
    client_id: str  #: the id that the client chose
    started_s: float
    symbols: dict[str, int] = field(default_factory=dict)  #: sizes that the inputs agreed on
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    received: bool = False  #: the client has sent all of it
    awaited: set[str] = field(default_factory=set)  #: values that make up the answer and have not arrived


class Request:
    """`live` until it is answered, failed or dropped; nothing is done for it afterwards."""

    __slots__ = (
        "_assemblers",
        "_buffers",
        "_held",
        "answer",
        "deadline_s",
        "deployment",
        "inputs",
        "key",
        "live",
        "ran",
        "running",
        "timer",
        "unsent",
    )

    def __init__(self, key: RequestKey, deployment: Deployment, deadline_s: float, buffers: Buffers) -> None:
        self.key = key
        self.deployment = deployment
        self.deadline_s = deadline_s  # by the event loop's clock
        self.live = True
        self.answer: Answer | None = None
        self.inputs: dict[str, dict[str, np.ndarray]] = {}  # of stages on this node, until they run
        self.ran: set[str] = set()  # stages of this node that have been started
        self.running = 0  # those of them that have not finished
        self.unsent = 0  # parcels
        self.timer: asyncio.TimerHandle | None = None
        self._assemblers: dict[tuple[str, str], TensorAssembler] = {}
        self._buffers = buffers
        self._held: dict[Hashable, int] = {}

    @property
    def done(self) -> bool:
        """Whether this node has nothing more to do for it (the ingress has, until it has answered)."""
        return len(self.ran) == len(self.deployment.stages) and not (self.running or self.unsent)

    @property
    def arriving(self) -> int:
        """Tensors of which a part is there."""
        return len(self._assemblers)

    def hold(self, what: Hashable, size_bytes: int) -> None:
        """Counts bytes that this request keeps in memory, until `free(what)` or the end. Raises Overloaded when the node has no room."""
        if self.live:
            self._buffers.take(size_bytes)
            self._held[what] = size_bytes

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
        if self.timer is not None:
            self.timer.cancel()
        self.live = False
        self._buffers.give_back(sum(self._held.values()))
        self._held.clear()
        self._assemblers.clear()
        self.inputs.clear()
        if self.answer is not None:
            self.answer.inputs.clear()


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
