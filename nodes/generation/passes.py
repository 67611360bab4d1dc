"""A forward pass under way, seen from the ingress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nodes.engines.decoder.steps import Step
from nodes.generation.orders import Fork
from splitnet.errors import DeadlineExceeded, NodeUnavailable, SplitnetError
from splitnet.plan import CLIENT, Plan
from splitnet.wire import CHUNK_BYTES

if TYPE_CHECKING:
    from nodes.generation.companion import Price
    from nodes.generation.session import Session
    from nodes.requests import Request

__all__ = ["Entry", "ForwardPass", "Making", "Sender", "late", "most_tokens"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A step of a session; `epoch`: of the session when it was made."""

    session: Session
    step: Step
    epoch: int

    @property
    def counts(self) -> bool:
        return self.session.live and self.session.epoch == self.epoch


@dataclass(slots=True)
class Making:
    """A pass that is being made. Without a price nothing is guessed."""

    entries: list[Entry] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    sources: list[Session] = field(default_factory=list)
    tokens: int = 0
    price: Price | None = None


class Sender(Protocol):
    """Who makes passes."""

    def returned(self, forward: ForwardPass, request: Request) -> None:
        """All stages have run it; `forward.sampled` is there."""
        ...

    def failed(self, forward: ForwardPass, error: SplitnetError) -> None:
        """Some stages may have run it, others not."""
        ...


class ForwardPass:
    """The owner of the request that carries it: see `nodes.requests.Owner`. `sources`: sessions that others are forked from."""

    def __init__(
        self, sender: Sender, entries: Sequence[Entry], sources: Sequence[Session], closes: Sequence[int], busy_s: float, sent_s: float
    ) -> None:
        self.entries = entries
        self.closes = closes
        self.sources = sources
        self.busy_s = busy_s  # how long it keeps the slowest stage busy, by what is known
        self.sent_s = sent_s
        self.tokens = sum(len(entry.step.tokens) for entry in entries)
        self.wanted = sum(entry.step.wanted for entry in entries)
        self.sampled: np.ndarray | None = None
        self._sender = sender

    def take_output(self, request: Request, value: str, array: np.ndarray) -> None:
        request.awaited.discard(value)
        request.free((CLIENT, value))
        self.sampled = array
        if not request.awaited:
            self._sender.returned(self, request)

    def ended(self, request: Request, error: SplitnetError | None) -> None:
        if error is not None or self.sampled is None:
            self._sender.failed(self, error or NodeUnavailable("the forward pass was given up", remedy="try again"))


def most_tokens(plan: Plan) -> int:
    """Of a pass: its hidden states are one chunk on the wire, so that a pass never overtakes the one before it."""
    widest = 1
    for stage in plan.stages:
        for spec in stage.outputs:
            size = 4
            for dimension in spec.shape:
                size *= dimension if isinstance(dimension, int) else 1
            widest = max(widest, size)
    return max(CHUNK_BYTES // widest, 1)


def late() -> DeadlineExceeded:
    return DeadlineExceeded("a forward pass did not come back in time", remedy="see `splitnet status` for the slowest stage")
