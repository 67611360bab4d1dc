"""How a directed link delays bytes: pure arithmetic over a clock that the caller reads. All times are seconds of that clock."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

__all__ = ["UNSHAPED", "DelayLine", "LinkShape", "Shaper"]

_QUANTUM_S = 0.001  # a block is what the link sends in this time: a slow link delivers small blocks, as a real one delivers packets
_SMALLEST_BYTES, _LARGEST_BYTES = 1448, 1 << 18  # a TCP segment; a read that still fits into the processor's caches
_AHEAD_S = 0.004  # how much may wait for the transmitter: a late wake-up must not leave the link idle
_LINE_BYTES = 1 << 20  # what may be on the way beyond bandwidth x latency: the far side's turn to read


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What a directed link does. `bandwidth_bytes_per_s` counts the bytes of the TCP stream, without headers; inf and 0 s: unshaped.
    `jitter_s`: each block takes up to so much longer, evenly distributed; order is kept, as TCP keeps it. `burst_bytes` pass at once after
    a pause (a token bucket's depth); what follows them keeps to the bandwidth."""

    bandwidth_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    jitter_s: float = 0.0
    burst_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(f"a bandwidth must be positive, got {self.bandwidth_bytes_per_s}")
        for what, seconds in (("latency", self.latency_s), ("jitter", self.jitter_s)):
            if not (seconds >= 0 and math.isfinite(seconds)):
                raise ValueError(f"a {what} must be a time that is not negative, got {seconds}")
        if not (self.burst_bytes >= 0 and math.isfinite(self.burst_bytes)):
            raise ValueError(f"a burst must be a size that is not negative, got {self.burst_bytes}")


UNSHAPED = LinkShape()


class Shaper:
    """The transmitter of one directed link, shared by all connections over it.

    A token bucket: a block of n bytes keeps the transmitter busy for n / bandwidth, the next one starts when it is done, and an idle
    transmitter saves up `burst_bytes` and no more, nothing unless they are asked for. So over any busy time the rate is exact, however
    late the caller wakes up, as long as it hands blocks in before the transmitter falls idle: `opens_s` says from when on it takes one.
    `overhead_s` is what the way through the caller takes by itself; it is part of the latency.
    """

    def __init__(self, shape: LinkShape = UNSHAPED, overhead_s: float = 0.0, seed: int = 0) -> None:
        self.shape = shape
        self.overhead_s = overhead_s
        self.carried_bytes = 0
        self._free_s = 0.0
        self._random = random.Random(seed)

    @property
    def block_bytes(self) -> int:
        """The most to hand in at once."""
        fitting = self.shape.bandwidth_bytes_per_s * _QUANTUM_S
        return int(min(max(fitting, _SMALLEST_BYTES), _LARGEST_BYTES))

    @property
    def line_bytes(self) -> float:
        """The most that may be on the way in one direction of one connection."""
        shape = self.shape
        if math.isinf(shape.bandwidth_bytes_per_s):
            return 4 * _LINE_BYTES
        return shape.bandwidth_bytes_per_s * (shape.latency_s + shape.jitter_s + _AHEAD_S) + _LINE_BYTES

    @property
    def opens_s(self) -> float:
        """When the transmitter takes the next block."""
        return self._free_s - _AHEAD_S

    def send(self, now_s: float, size_bytes: int) -> float:
        """Takes a block, and returns when its last byte arrives at the far end."""
        shape = self.shape
        saved_s = shape.burst_bytes / shape.bandwidth_bytes_per_s
        self._free_s = max(self._free_s, now_s - saved_s) + size_bytes / shape.bandwidth_bytes_per_s
        self.carried_bytes += size_bytes
        jitter_s = self._random.uniform(0.0, shape.jitter_s) if shape.jitter_s else 0.0
        return max(max(self._free_s, now_s) + shape.latency_s + jitter_s - self.overhead_s, now_s)


class DelayLine:
    """What is on its way in one direction of one connection, in order. A block of no bytes is the end of the stream."""

    def __init__(self, shaper: Shaper) -> None:
        self.shaper = shaper
        self.held_bytes = 0
        self._blocks: deque[tuple[float, memoryview]] = deque()
        self._last_s = 0.0

    def put(self, now_s: float, data: bytes | memoryview) -> None:
        self._last_s = max(self.shaper.send(now_s, len(data)), self._last_s)
        self._blocks.append((self._last_s, memoryview(data)))
        self.held_bytes += len(data)

    @property
    def next_s(self) -> float:
        """When the next block arrives; inf where none is under way."""
        return self._blocks[0][0] if self._blocks else math.inf

    @property
    def empty(self) -> bool:
        return not self._blocks

    def takes_from_s(self) -> float:
        """From when on a block may be put in; inf while the far side does not read."""
        return self.shaper.opens_s if self.held_bytes < self.shaper.line_bytes else math.inf

    def arrived(self, now_s: float) -> memoryview | None:
        """The first block if it has arrived. It stays first until it is `taken`."""
        return self._blocks[0][1] if self._blocks and self._blocks[0][0] <= now_s else None

    def taken(self, count: int) -> None:
        """So many bytes of the first block have been handed on; 0 of the end of the stream."""
        due_s, block = self._blocks.popleft()
        self.held_bytes -= count
        if count < len(block):
            self._blocks.appendleft((due_s, block[count:]))
