"""Who is calling: an identity, what it may touch, and what it may still use."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar

from splitnet.errors import NotPermitted, Overloaded
from splitnet.security.policy import Limits
from splitnet.security.roles import LOCAL, Identity, Role

__all__ = ["Caller", "Callers", "Usage", "current_caller", "note", "set_caller"]

_MOST_USAGES = 4096
_LONGEST_PAUSE_S = 5.0
_NOTES = 400  # characters


class Usage:
    """What one client has used of this node lately, over all its streams; two buckets that fill at the limit's rate and hold one second's worth."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen_s = clock()
        self._requests = math.inf
        self._bytes = math.inf
        self.sessions = 0

    def take_request(self, limits: Limits) -> float:
        """0 where one more is within the limit, else the seconds after which it will be."""
        self._fill(limits)
        rate = limits.requests_per_s
        if not rate:
            return 0.0
        if self._requests >= 1:
            self._requests -= 1
            return 0.0
        return (1 - self._requests) / rate

    def take_bytes(self, count: int, limits: Limits) -> float:
        """How long to wait before the next bytes are read."""
        self._fill(limits)
        rate = limits.bytes_per_s
        if not rate:
            return 0.0
        self._bytes -= count
        return max(0.0, -self._bytes / rate)

    def _fill(self, limits: Limits) -> None:
        now = self._clock()
        passed_s, self._seen_s = now - self._seen_s, now
        self._requests = min(self._requests + passed_s * limits.requests_per_s, max(limits.requests_per_s, 1.0))
        self._bytes = min(self._bytes + passed_s * limits.bytes_per_s, limits.bytes_per_s)


class Caller:
    """One call's. `deployments`: empty for all; `token`: the name of the one that it came with."""

    def __init__(
        self, identity: Identity, peer: str, *, token: str = "", deployments: tuple[str, ...] = (), limits: Limits, usage: Usage
    ) -> None:
        self.identity = identity
        self.peer = peer
        self.token = token
        self.deployments = frozenset(deployments)
        self._limits = limits
        self._usage = usage
        self.notes: list[str] = []

    @property
    def who(self) -> str:
        return f"{self.identity.role} by token {self.token!r} ({self.identity.name})" if self.token else str(self.identity)

    def may_see(self, deployment: str) -> bool:
        return not self.deployments or deployment.partition("@")[0] in self.deployments

    def admit(self, deployment: str) -> None:
        """One more request. Raises NotPermitted for a deployment that is not the caller's, Overloaded where it asks too often or for too much at a time."""
        if not self.may_see(deployment):
            raise NotPermitted(
                f"token {self.token!r} is not for deployment {deployment!r}", remedy=f"it is for: {', '.join(sorted(self.deployments))}"
            )
        limits = self._limits
        if limits.sessions and self._usage.sessions >= limits.sessions:
            raise Overloaded(
                f"{self.who} has {limits.sessions} requests in flight, as many as it may", remedy="wait for an answer", retry_after_s=0.05
            )
        if (wait_s := self._usage.take_request(limits)) > 0:
            raise Overloaded(
                f"{self.who} may send {limits.requests_per_s:g} requests a second", remedy="send fewer", retry_after_s=max(wait_s, 0.001)
            )

    def entered(self) -> None:
        """A request of this caller is in flight from now on, until `left`."""
        self._usage.sessions += 1

    def left(self) -> None:
        self._usage.sessions -= 1

    async def pass_bytes(self, count: int) -> None:
        """Returns when the caller may send more: meanwhile nothing more is read from it."""
        if (wait_s := self._usage.take_bytes(count, self._limits)) > 0:
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S))


class Callers:
    """The usage of all clients, by who they are; the ones that were seen longest ago are forgotten."""

    def __init__(self) -> None:
        self._usages: OrderedDict[str, Usage] = OrderedDict()

    def usage(self, who: str) -> Usage:
        found = self._usages.get(who)
        if found is None:
            found = self._usages[who] = Usage()
            for name in [name for name, usage in self._usages.items() if not usage.sessions][: max(0, len(self._usages) - _MOST_USAGES)]:
                del self._usages[name]
        self._usages.move_to_end(who)
        return found


#: Whoever is here without a call: the node itself, or a test.
_NOBODY = Caller(LOCAL, "", limits=Limits(), usage=Usage())
_current: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def current_caller() -> Caller:
    return _current.get()


def set_caller(caller: Caller) -> None:
    """For the rest of this call."""
    _current.set(caller)


def note(text: str) -> None:
    """Goes into the audit log's line of the call that is being answered."""
    notes = _current.get().notes
    if sum(map(len, notes)) < _NOTES and _current.get() is not _NOBODY:
        notes.append(text[:_NOTES])


def is_local(caller: Caller) -> bool:
    return caller.identity.role is Role.LOCAL
