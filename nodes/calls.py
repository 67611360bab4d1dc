"""What clients asked, at the ingress: from the first frame of each to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import numpy as np

from nodes.admission import Buffers
from nodes.clients import ClientStream
from nodes.deployment import Deployment
from nodes.logs import Log
from nodes.noising import Released
from nodes.requests import Holder, Request
from splitnet.errors import DeadlineExceeded, SplitnetError, UserError
from splitnet.plan import CLIENT

__all__ = ["Call", "Calls"]


class Carrier(Protocol):
    """Who takes calls through the pipeline."""

    def forsake(self, call: Call, reason: str) -> None:
        """The call has ended: whatever waits or is under way for it alone is given up."""
        ...


class Call(Holder):
    """`client_id` is the id that the client chose, `priority` 0 to 9. `rows` and `kind` are known once all inputs are there: see
    `nodes.line.Waiting`. `inputs` are kept until it has ended: what is lost with a node is sent again."""

    __slots__ = (
        "_gathered",
        "awaited",
        "client",
        "client_id",
        "inputs",
        "kind",
        "losses",
        "priority",
        "received",
        "released",
        "requests",
        "rows",
        "started_s",
        "symbols",
        "timer",
    )

    def __init__(
        self,
        client: ClientStream,
        client_id: str,
        deployment: Deployment,
        priority: int,
        started_s: float,
        deadline_s: float,
        buffers: Buffers,
    ) -> None:
        super().__init__(deployment, deadline_s, buffers)
        self.client = client
        self.client_id = client_id
        self.priority = priority
        self.started_s = started_s
        self.symbols: dict[str, int] = {}  # sizes that the inputs agreed on
        self.inputs: dict[str, np.ndarray] = {}
        self.received = False  # the client has sent all of it
        self.losses = 0  # how often what was under way of it was lost with a node
        self.rows = 1
        self.released: Released | None = None  # what has left of it with noise
        self.kind: Hashable = None
        self.requests: set[Request] = set()  # that carry rows of it now
        self.awaited = set(deployment.outputs)  # values that make up the answer and have not all arrived
        self.timer: asyncio.TimerHandle | None = None
        self._gathered: dict[str, tuple[np.ndarray, int]] = {}  # values of which some rows are there, and how many are missing

    def restart(self, deployment: Deployment) -> None:
        """From its inputs, as if nothing of it had been answered."""
        self.deployment, self.awaited = deployment, set(deployment.outputs)
        for value in self._gathered:
            self.free((CLIENT, "gathered", value))
        self._gathered.clear()

    def gather(self, value: str, axis: int, first: int, rows: np.ndarray) -> np.ndarray | None:
        """Puts some rows of a value in their place; the whole once all are there. Raises Overloaded where the node has no room."""
        found = self._gathered.get(value)
        if found is None:
            shape = (*rows.shape[:axis], self.rows, *rows.shape[axis + 1 :])
            self.hold((CLIENT, "gathered", value), rows.nbytes // max(rows.shape[axis], 1) * self.rows)
            found = np.empty(shape, rows.dtype), self.rows
        whole, missing = found
        count = rows.shape[axis]
        whole[(slice(None),) * axis + (slice(first, first + count),)] = rows
        missing -= count
        if missing:
            self._gathered[value] = whole, missing
            return None
        self._gathered.pop(value, None)
        self.free((CLIENT, "gathered", value))
        return whole

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.inputs.clear()
        self._gathered.clear()
        self.released = None
        super().end()


class Calls:
    """All live calls of a node; each ends here, once. `ended` hears of it."""

    carrier: Carrier  #: set by it

    def __init__(self, log: Log, buffers: Buffers, ended: Callable[[Deployment], None]) -> None:
        self._log = log
        self._buffers = buffers
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._live: set[Call] = set()

    def __iter__(self) -> Iterator[Call]:
        """Over a copy: calls may end meanwhile."""
        return iter(list(self._live))

    def count(self, deployment: Deployment | None = None) -> int:
        """Of one deployment, or of all."""
        return len(self._live) if deployment is None else sum(call.deployment is deployment for call in self._live)

    def open(self, client: ClientStream, client_id: str, deployment: Deployment, priority: int, deadline_s: float) -> Call:
        """It has been admitted. It ends at its deadline at the latest."""
        call = Call(client, client_id, deployment, priority, self._loop.time(), deadline_s, self._buffers)
        self._live.add(call)
        client.add(client_id, call)
        call.timer = self._loop.call_at(deadline_s, self._expired, call)
        return call

    def move(self, call: Call, deployment: Deployment) -> None:
        """Nothing of it is under way: another generation answers it."""
        before = call.deployment
        before.line.remove(call)
        before.admission.leave(call.client, None)
        deployment.admission.take_over(call.client)
        call.restart(deployment)
        self._ended(before)

    def answered(self, call: Call) -> None:
        self._end(call, "answered", self._loop.time() - call.started_s)

    def fail(self, call: Call, error: SplitnetError) -> None:
        """Tells the client, and gives up what is under way for it."""
        if not call.live:
            return
        error.at(node=call.deployment.node.name)
        error.request = call.client_id
        tell = self._log.info if isinstance(error, UserError) else self._log.warning
        tell(
            "request failed",
            deployment=call.deployment.name,
            request=call.client_id,
            kind=type(error).__name__,
            error=error.message,
            at=error.node,
            stage=error.stage,
        )
        call.client.fail(call.client_id, call, error)
        self._end(call, error.message)

    def cancel(self, call: Call, reason: str) -> None:
        """As `fail`, and the client is told nothing."""
        if call.live:
            self._log.info("request cancelled", request=call.client_id, deployment=call.deployment.name, reason=reason)
            call.client.outbox.drop(call)
            self._end(call, reason)

    def _end(self, call: Call, reason: str, service_s: float | None = None) -> None:
        if not call.live:
            return
        call.end()
        self._live.discard(call)
        call.deployment.admission.leave(call.client, service_s)
        call.client.remove(call.client_id, complete=call.received)
        self.carrier.forsake(call, reason)
        self._ended(call.deployment)

    def _expired(self, call: Call) -> None:
        missing = ", ".join(sorted(call.awaited)) if call.received else "inputs"
        self.fail(
            call,
            DeadlineExceeded(
                f"the request's time ran out; still missing: {missing}",
                remedy="give it more time, or see `splitnet status` for the slowest stage",
            ),
        )
