"""What a link delivers, from when messages set out and when the far side had them. Pure: the caller reads the clock.

A link serves messages one after the other. Message m, which set out at w, arrives at a; the link has worked on it from when it reached the
far end of an empty link, or from when the one before it was through, whichever was later: s = a - max(w + round trip, a of the one before)
(Lindley's recursion). So idle time is never counted, whatever waits in gRPC or the kernel is, and no message is sent only to measure.
Goodput is the sum of bytes over the sum of s, the older the less.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["Goodput"]

_FADE_S = 0.3  # what is this old counts 1/e
_NOISE_S = 0.01  # a box that is busy answers this much late
# Of its whole way, a message that found the link empty was being transmitted for this share at least: the round trip may be wrong.
_ALONE_SHARE = 0.1
_ALONE_S, _ALONE = (
    0.6,
    16,
)  # of the latest messages that found the link empty, and of so many, the quickest counts: what makes one late is mostly the box
_LEAST_ALONE_BYTES = 1 << 13  # of a smaller one the time is hardly the link's
_SHORTEST_S = 1e-6
_ASK_BYTES, _ASK_S = 1 << 16, 0.005  # a receipt is asked for: of a message this large, and of smaller ones not more often than this
_AHEAD_S = 0.06  # how much is handed to the network beyond a round trip: it bridges the pauses of a busy box, and no more is stuck when the link gets slow
_AHEAD_BYTES, _FIRST_BYTES = 1 << 17, 1 << 20  # at least; while nothing is known


@dataclass(slots=True)
class _Sent:
    started_s: float
    size_bytes: int


class Goodput:
    """`sent` and `arrived` are told what happens; `bytes_per_s` is 0 as long as nothing is known."""

    def __init__(self) -> None:
        self.round_trip_s = math.inf
        self.unacknowledged_bytes = 0
        self._waiting: deque[_Sent] = deque()  # those of which a receipt was asked for
        self._between: _Sent | None = None  # what went since, without one
        self._between_until_s = 0.0
        self._asked_s = -math.inf
        self._arrived_s = -math.inf
        self._alone: deque[tuple[float, float]] = deque(maxlen=_ALONE)  # when they arrived, and at how many bytes per second
        self._bytes = self._seconds = 0.0
        self._known_s = 0.0
        self._counts = False

    def restart(self, round_trip_s: float, counts: bool) -> None:
        """A new connection. `counts`: the far side gives receipts."""
        self._waiting.clear()
        self.unacknowledged_bytes = 0
        self._between = None
        self._alone.clear()
        self._arrived_s = -math.inf
        self.round_trip_s = round_trip_s
        self._counts = counts

    def asks(self, now_s: float, size_bytes: int) -> bool:
        """Whether a message that sets out now is to ask for a receipt."""
        more = size_bytes + (self._between.size_bytes if self._between is not None else 0)
        return self._counts and (more >= _ASK_BYTES or (size_bytes > 0 and now_s - self._asked_s >= _ASK_S))

    def sent(self, now_s: float, size_bytes: int, *, asked: bool) -> None:
        """A message begins its way."""
        before = self._between if now_s - self._between_until_s < _ASK_S else None
        if not asked:
            self._between = before or _Sent(now_s, 0)
            self._between.size_bytes += size_bytes
            self._between_until_s = now_s
            return
        self._between = None
        self._asked_s = now_s
        started_s, more = (before.started_s, before.size_bytes) if before is not None else (now_s, 0)
        self._waiting.append(_Sent(started_s, size_bytes + more))
        self.unacknowledged_bytes += size_bytes + more

    def arrived(self, now_s: float) -> None:
        """The receipt for the first message that waits for one; more receipts than messages are not counted."""
        if not self._waiting:
            return
        message = self._waiting.popleft()
        self.unacknowledged_bytes -= message.size_bytes
        self.round_trip_s = min(self.round_trip_s, now_s - message.started_s)
        seconds, alone = self._service_s(message, now_s)
        self._arrived_s = now_s
        known = self._bytes / self._seconds if self._seconds else 0.0
        if alone:
            seconds = self._quickest_s(message.size_bytes, seconds, now_s)
        if alone and seconds < _NOISE_S:
            if not known and message.size_bytes < _ASK_BYTES:
                return  # it says nothing
            seconds = min(seconds, message.size_bytes / known) if known else seconds  # it used the link too little to say that it is slow
        fade = math.exp((self._known_s - now_s) / _FADE_S)
        if alone and message.size_bytes > 2 * known * seconds:
            fade /= 2  # few such messages come, and short ones: else it would take long to believe them
        self._bytes = self._bytes * fade + message.size_bytes
        self._seconds = self._seconds * fade + max(seconds, _SHORTEST_S)
        self._known_s = now_s

    def bytes_per_s(self, now_s: float) -> float:
        """0: not known. A message that takes longer than the estimate allows lowers it before it is there."""
        known = self._bytes / self._seconds if self._seconds else 0.0
        if not self._waiting:
            return known
        first = self._waiting[0]
        seconds, _ = self._service_s(first, now_s)
        if not known:
            return first.size_bytes / seconds if seconds > 5 * _NOISE_S else 0.0
        if seconds < 2 * _NOISE_S + 1.5 * first.size_bytes / known:
            return known
        fade = math.exp((self._known_s - now_s) / _FADE_S)
        return (self._bytes * fade + first.size_bytes) / (self._seconds * fade + seconds)

    def has_room(self, now_s: float) -> bool:
        """Whether more should be handed to the network: enough to keep it busy, and not so much that it is stuck there when the link gets slow."""
        if not self._waiting:
            return True
        known = self.bytes_per_s(now_s)
        ahead_bytes = known * (self.round_trip_s + _AHEAD_S) if known else _FIRST_BYTES
        return self.unacknowledged_bytes < max(_AHEAD_BYTES, ahead_bytes)

    def _quickest_s(self, size_bytes: int, seconds: float, now_s: float) -> float:
        """How long the link needed for this message at most, by what it needed for those before it."""
        while self._alone and now_s - self._alone[0][0] > _ALONE_S:
            self._alone.popleft()
        if size_bytes >= _LEAST_ALONE_BYTES:
            self._alone.append((now_s, size_bytes / max(seconds, _SHORTEST_S)))
        return min(seconds, size_bytes / max((rate for _, rate in self._alone), default=_SHORTEST_S))

    def _service_s(self, message: _Sent, arrived_s: float) -> tuple[float, bool]:
        """How long the link worked on it, and whether the link was empty before."""
        begun_s = message.started_s + self.round_trip_s
        alone = begun_s > self._arrived_s
        whole_s = arrived_s - max(message.started_s, self._arrived_s)
        return max(arrived_s - max(begun_s, self._arrived_s), whole_s * _ALONE_SHARE), alone
