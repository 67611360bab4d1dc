"""What bounds a node: requests in flight per deployment, and the bytes of all their tensors. Over a bound the answer is Overloaded,
at once, with the time after which to try again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from nodes.pace import Pace
from splitnet.errors import Overloaded
from splitnet.plan import Prediction

__all__ = ["Admission", "Buffers"]

_SHORTEST_RETRY_S = 0.01
_LONGEST_RETRY_S = 30.0
_WEIGHT = 0.2  # of the newest service time in the running mean
_PIECES = 4  # batches that may be under way beyond `limit`: a single request that is divided still fills a pipeline


class Admission:
    """Requests in flight of one deployment: at most `limit`, and of several clients together no more than leave each its share of a
    speed that was measured (`nodes.pace`). `joined`: how many rows may be joined."""

    def __init__(self, limit: int, prediction: Prediction | None = None, joined: int = 1) -> None:
        self.limit = limit
        self.in_flight = 0
        self.answered = self.unanswered = 0  # since activation
        most = limit + _PIECES
        if prediction is None:
            self.pace = Pace(most, joined=joined)
        else:
            self.pace = Pace(most, joined=joined, depth=max(prediction.latency_s * prediction.throughput_per_s, 1.0))
        self._of_client: Counter[Hashable] = Counter()
        self._service_s = 0.0  # running mean
        self._refused = 0  # since a request last ended

    def enter(self, client: Hashable) -> None:
        """Raises Overloaded at a bound."""
        if self.in_flight >= self.limit:
            self._refuse(
                f"{self.in_flight} requests are in flight, which is the limit",
                remedy="try again a little later, or deploy the plan with a larger max_in_flight",
            )
        own = self._of_client[client] + 1
        others = sum(min(own, count) for other, count in self._of_client.items() if other != client)
        if not self.pace.allows(others):
            self._refuse(
                f"{self.in_flight} requests of {len(self._of_client)} clients are in flight, which is as much as the pipeline can answer soon",
                remedy="try again a little later, with fewer clients at once, or deploy the plan to faster nodes",
            )
        self._of_client[client] = own
        self.in_flight += 1

    def take_over(self, client: Hashable) -> None:
        """A request that was admitted elsewhere: never refused."""
        self._of_client[client] += 1
        self.in_flight += 1

    def leave(self, client: Hashable, service_s: float | None) -> None:
        """`service_s`: from admission to the answer; None for a request that failed, which says nothing about the speed."""
        self.in_flight -= 1
        self._of_client[client] -= 1
        if not self._of_client[client]:
            del self._of_client[client]
        self._refused = 0
        if service_s is None:
            self.unanswered += 1
        else:
            self.answered += 1
            self._service_s += (service_s - self._service_s) * (_WEIGHT if self._service_s else 1.0)

    def retry_after_s(self) -> float:
        """As long as it takes until there is a place for everybody who was refused: those who came earlier come first."""
        each_s = self.pace.call_s
        if each_s is None:  # with L in flight that take S seconds each, one place is free every S/L seconds
            each_s = self._service_s / self.limit
        return min(max(self._refused * each_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _refuse(self, message: str, *, remedy: str) -> None:
        self._refused += 1
        self.pace.press()
        raise Overloaded(message, remedy=remedy, retry_after_s=self.retry_after_s())


class Buffers:
    """The bytes of requests' tensors that this node holds, at most `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Raises Overloaded when there is no room."""
        if self.used_bytes + size_bytes > self.limit_bytes:
            raise Overloaded(
                f"a tensor of {size_bytes} bytes does not fit: {self.used_bytes} of {self.limit_bytes} bytes of tensors are held",
                remedy="try again a little later, send smaller batches, or raise the node's --buffer",
                retry_after_s=0.1,
            )
        self.used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
