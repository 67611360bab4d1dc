"""What bounds a node: requests in flight per deployment, and the bytes of all their tensors. Over a bound the answer is Overloaded,
at once, with the time after which to try again: nothing waits in line here."""

from __future__ import annotations

from splitnet.errors import Overloaded

__all__ = ["Admission", "Buffers"]

_SHORTEST_RETRY_S = 0.01
_LONGEST_RETRY_S = 30.0
_WEIGHT = 0.2  # of the newest service time in the running mean


class Admission:
    """Requests in flight of one deployment, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._service_s = 0.0  # running mean
        self._refused = 0  # since a request last ended

    def enter(self) -> None:
        """Raises Overloaded at the bound."""
        if self.in_flight >= self.limit:
            self._refused += 1
            raise Overloaded(
                f"{self.in_flight} requests are in flight, which is the limit",
                remedy="try again a little later, or deploy the plan with a larger max_in_flight",
                retry_after_s=self.retry_after_s(),
            )
        self.in_flight += 1

    def leave(self, service_s: float | None) -> None:
        """`service_s`: from admission to the answer; None for a request that failed, which says nothing about the speed."""
        self.in_flight -= 1
        self._refused = 0
        if service_s is not None:
            self._service_s += (service_s - self._service_s) * (_WEIGHT if self._service_s else 1.0)

    def retry_after_s(self) -> float:
        """With L in flight that take S seconds each, one place is free every S/L seconds; those refused earlier come first."""
        return min(max(self._refused * self._service_s / self.limit, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)


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
