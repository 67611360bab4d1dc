"""From the line into the pipeline, and from the pipeline back to the clients: which rows of which calls make up a request, and whose the
rows of its answer are."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence

import numpy as np

from nodes.calls import Call
from nodes.deployment import Deployment
from nodes.ledger import Ledger
from nodes.line import Part
from nodes.noising import Released, StageNoise
from nodes.outbox import EncodedTensor, Parcel
from nodes.pace import Passage
from nodes.pipeline import Pipeline
from nodes.requests import Request, RequestKey
from splitnet.errors import BadInput, EngineFailure, InsufficientMemory, NodeUnavailable, Overloaded, SplitnetError
from splitnet.plan import CLIENT
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import aligned_empty

__all__ = ["Dispatcher"]

_MOST_LOSSES = 16
_KEPT = 40  # characters of the client's id that stand in the nodes' own, for people who read logs

#: What one bad input may do to all that it was joined with, and what a smaller batch may be spared.
_PERHAPS_ANOTHERS = (BadInput, EngineFailure, InsufficientMemory, Overloaded)


class _Batch:
    """The calls' side of one request; it is the request's owner."""

    def __init__(self, dispatcher: Dispatcher, parts: Sequence[Part[Call]], passage: Passage) -> None:
        self.parts = parts
        self.passage = passage
        self.rows = sum(part.rows for part in parts)
        self.outputs: dict[str, np.ndarray] = {}  # unless it is one whole call: until all are there
        self._dispatcher = dispatcher

    @property
    def one_whole_call(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].whole

    @property
    def wanted(self) -> bool:
        return any(part.call.live for part in self.parts)

    def take_output(self, request: Request, value: str, array: np.ndarray) -> None:
        """All of them wait for the last: nothing goes to a client of what may yet be lost and computed again."""
        request.awaited.discard(value)
        self.outputs[value] = array
        if request.awaited:
            return
        if self.one_whole_call:
            for name, whole in self.outputs.items():
                request.free((CLIENT, name))
                self._dispatcher.answer(self.parts[0].call, name, whole)
        else:
            self._dispatcher.share(self)
        self._dispatcher.complete(request)

    def only_once(self, noise: StageNoise, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found, start = dict(values), 0
        joined = self.parts[0].call.deployment.batch_axes is not None
        for part in self.parts:
            call = part.call
            if call.live:
                if call.released is None:
                    call.released = Released()
                new_bytes = call.released.replace(found, noise, start, part.first, part.rows if joined else None, call.rows)
                call.hold(Released, new_bytes)
            start += part.rows
        return found

    def ended(self, request: Request, error: SplitnetError | None) -> None:
        self._dispatcher.ended(self, request, error)


class Dispatcher:
    def __init__(self, ledger: Ledger, pipeline: Pipeline) -> None:
        self._ledger = ledger
        self._calls = ledger.calls
        self._pipeline = pipeline
        self._loop = ledger.loop
        self._epoch = secrets.token_hex(4)  # so that ids of an earlier process of this node do not come again
        self._numbers = itertools.count()
        self._calls.carrier = self

    # ------------------------------------------------------------------------------------------------------------ there

    def join_line(self, call: Call) -> None:
        """All of its inputs are there."""
        axes = call.deployment.batch_axes
        if axes is not None:
            call.rows = call.symbols[axes.symbol]
            call.kind = tuple(
                (*a.shape[:axis], *a.shape[axis + 1 :]) for a, axis in ((call.inputs[n], axes.inputs[n]) for n in axes.inputs)
            )
        call.deployment.line.add(call, self._loop.time())
        self.advance(call.deployment)

    def advance(self, deployment: Deployment) -> None:
        """Keeps the pipeline full, unless it lacks a node."""
        deployment = deployment.newest
        if deployment.paused:
            return
        line, pace = deployment.line, deployment.admission.pace
        while pace.has_room(now_s := self._loop.time()):
            wait_s = line.wait_s(now_s)
            if wait_s is None:
                return
            if wait_s > 0:
                deployment.wake(self._loop.call_later(wait_s, self.advance, deployment))
                return
            self._send(deployment, line.take(now_s), pace.enter(now_s))

    def _send(self, deployment: Deployment, parts: Sequence[Part[Call]], passage: Passage) -> None:
        batch = _Batch(self, parts, passage)
        key = RequestKey(
            deployment.name, deployment.ingress.name, f"{parts[0].call.client_id[:_KEPT]}-{self._epoch}-{next(self._numbers):x}"
        )
        request = self._ledger.open(key, deployment, max(part.call.deadline_s for part in parts), batch)
        for part in parts:
            part.call.requests.add(request)
        self._pipeline.deliver(request, self._inputs(batch), deployment.input_routes, None)

    def _inputs(self, batch: _Batch) -> dict[str, np.ndarray]:
        """A whole call's as they came; else rows in memory of their own, as if a client had sent just these. No engine writes to its
        inputs, so they can be sent again."""
        first = batch.parts[0].call
        if batch.one_whole_call:
            return first.inputs
        axes = first.deployment.batch_axes
        assert axes is not None, "only what has a batch is joined or divided"
        return {
            name: _joined([_rows(p.call.inputs[name], axis, p.first, p.rows) for p in batch.parts], axis)
            for name, axis in axes.inputs.items()
        }

    # ------------------------------------------------------------------------------------------------------------- back

    def share(self, batch: _Batch) -> None:
        """The rows of every output, to the calls that they belong to. Raises EngineFailure where an output does not have the batch's rows."""
        deployment = batch.parts[0].call.deployment
        axes = deployment.batch_axes
        assert axes is not None
        for value, array in batch.outputs.items():
            if array.shape[axes.outputs[value]] != batch.rows:
                raise EngineFailure(
                    f"output {value!r} of a batch of {batch.rows} has shape {array.shape}: it does not keep the batch",
                    remedy="deploy the plan without max_batch and microbatch",
                )
        start = 0
        for part in batch.parts:
            for value, array in batch.outputs.items():
                if part.call.live:
                    self._share(part, value, axes.outputs[value], _rows(array, axes.outputs[value], start, part.rows))
            start += part.rows

    def _share(self, part: Part[Call], value: str, axis: int, rows: np.ndarray) -> None:
        try:
            whole = np.array(rows) if part.whole else part.call.gather(value, axis, part.first, rows)
            if whole is not None:
                self.answer(part.call, value, whole)
        except SplitnetError as error:  # no room for it; the others are not to blame
            self._calls.fail(part.call, error)

    def answer(self, call: Call, value: str, array: np.ndarray) -> None:
        """A value that makes up (a part of) the answer; the client gets it at once. Raises Overloaded."""
        call.awaited.discard(value)
        names = call.deployment.outputs[value]
        for name in names:

            def envelope() -> pb.Frame:
                return pb.Frame(request=call.client_id, deployment=call.deployment.name)

            def sent(parcel: Parcel) -> None:
                call.free(parcel)
                if parcel.end:
                    self._calls.answered(call)

            end = not call.awaited and name is names[-1]
            tensor = EncodedTensor(name, array, "raw", self._pipeline.pool)
            parcel = Parcel(call, tensor, envelope, sent, lambda _, error: self._calls.fail(call, error), end)
            call.hold(parcel, array.nbytes)
            call.client.outbox.put(parcel)

    def complete(self, request: Request) -> None:
        self._ledger.end(request)

    def ended(self, batch: _Batch, request: Request, error: SplitnetError | None) -> None:
        deployment = request.deployment
        worth = sum(part.rows / part.call.rows for part in batch.parts)
        deployment.admission.pace.leave(batch.passage, self._loop.time(), worth, batch.rows, answered=not request.awaited and error is None)
        batch.outputs.clear()
        for part in batch.parts:
            part.call.requests.discard(request)
        if error is not None:
            self._fail(batch, error)
        self.advance(deployment)

    def _fail(self, batch: _Batch, error: SplitnetError) -> None:
        if isinstance(error, NodeUnavailable) and self._send_again(batch):
            return
        calls = {part.call: None for part in batch.parts if part.call.live}
        if len(batch.parts) > 1 and isinstance(error, _PERHAPS_ANOTHERS):
            self._ledger.log.info("a joined batch failed; each part is sent again alone", parts=len(batch.parts), error=error.message)
            for part in batch.parts:
                if part.call.live:
                    part.call.deployment.line.put_back(part)
            return
        for call in calls:
            self._calls.fail(call, error)

    def _send_again(self, batch: _Batch) -> bool:
        """What was lost with a node, where there is hope; a call that loses again and again fails."""
        parts = [part for part in batch.parts if part.call.live]
        if not parts or not self._ledger.recovery.hopeful(parts[0].call.deployment):
            return False
        for part in parts:
            part.call.losses += 1
        if any(part.call.losses > _MOST_LOSSES for part in parts):
            return False
        self._ledger.recovery.replayed(parts[0].call.deployment, len(parts))
        for part in parts:
            part.call.deployment.line.put_back(part)
        self._ledger.recovery.switched(parts[0].call.deployment.family)  # it may have been meanwhile
        return True

    def forsake(self, call: Call, reason: str) -> None:
        call.deployment.line.remove(call)
        for request in list(call.requests):
            batch = request.owner
            if isinstance(batch, _Batch) and not batch.wanted:
                self._ledger.cancel(request, reason)


def _rows(array: np.ndarray, axis: int, first: int, rows: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(first, first + rows),)]


def _joined(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """In one piece of memory that begins where a received tensor would: kernels may look at that."""
    shape = list(pieces[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    joined = aligned_empty(sum(piece.nbytes for piece in pieces)).view(pieces[0].dtype).reshape(shape)
    np.concatenate(pieces, axis, out=joined)
    return joined
