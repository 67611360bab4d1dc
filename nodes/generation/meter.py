"""How long passes take, learnt from those that came back: what keeps the pipeline full without a queue in it. Pure: the caller reads the clock.

Each stage writes down how long it computed, and how long the pass waited there. A pass of n tokens keeps the slowest stage busy for `busy_s(n)`, and takes `trip_s(n)` through an empty pipeline: the stages'
times and what lies between them. Both are taken to be straight lines in n, fitted to recent passes (least squares with weights that fade). With S sessions in groups of n, the slowest
stage is always busy when (S / n) busy_s(n) >= trip_s(n): the largest such groups are the best, because a pass costs something whatever is in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Line", "Meter"]

_FADE = 0.97  # of a pass's weight with each later one
_SURPLUS = 1.15  # times a round trip is kept under way: clocks and stages are not even
_TELLING = 500.0  # squares of tokens, about their mean: less tells nothing of a slope
_LEARNING = 0.1  # of what lies between the stages


@dataclass(slots=True)
class Line:
    """y = offset + slope x, through points that fade; neither is negative."""

    offset: float
    slope: float
    _known: float = field(init=False)  # the slope, from points that tell it
    _n: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def __post_init__(self) -> None:
        self._known = self.slope

    def add(self, x: float, y: float) -> None:
        self._n = self._n * _FADE + 1
        self._x = self._x * _FADE + x
        self._y = self._y * _FADE + y
        self._xx = self._xx * _FADE + x * x
        self._xy = self._xy * _FADE + x * y
        spread = self._xx - self._x * self._x / self._n
        rise = self._xy - self._x * self._y / self._n
        if spread > _TELLING:
            self.slope = self._known = max(rise / spread, 0.0)
        else:  # all of about one size: what is known of the slope still holds, as far as it can
            self.slope = min(max((rise + _TELLING * self._known) / (spread + _TELLING), 0.0), self._y / self._x)
        self.offset = max((self._y - self.slope * self._x) / self._n, 0.0)
        if not self.offset and self._xx:
            self.slope = self._xy / self._xx

    def at(self, x: float) -> float:
        return self.offset + self.slope * x


@dataclass(slots=True)
class Meter:
    """`stages`: of the pipeline. The first figures are guesses that only decide how the first passes are made."""

    stages: int
    _busy: Line = field(default_factory=lambda: Line(0.005, 0.0002))
    _compute: Line = field(init=False)
    _net_s: float = 0.0  # what a trip takes beyond computing
    _extra_s: float = 0.0  # what a pass keeps the slowest part busy beyond computing
    seen: int = 0
    largest: float = 0.0  # pass that has come back, lately

    def __post_init__(self) -> None:
        self._compute = Line(self._busy.offset * self.stages, self._busy.slope * self.stages)

    def returned(self, tokens: int, timings: Sequence[tuple[float, float]], trip_s: float) -> None:
        """A pass has come back. `timings`: of each stage, the seconds of computing and of waiting."""
        if not timings:
            return
        compute_s = [computed for computed, _ in timings]
        self.largest = max(float(tokens), self.largest * _FADE)
        self._busy.add(tokens, max(compute_s))
        self._compute.add(tokens, sum(compute_s))
        between_s = max(trip_s - math.fsum(itertools.chain(*timings)), 0.0)
        self._net_s += (between_s - self._net_s) * (_LEARNING if self.seen else 1.0)
        self.seen += 1

    def followed(self, tokens: int, interval_s: float) -> None:
        """A pass has come back so long after the one before it, while there was more to send than was sent: what it cost besides computing, on the nodes and
        between them. Were fewer under way than fill the pipeline, they came apart by less than is believed, for a surplus is sent: so this finds its level."""
        self._extra_s += _LEARNING * (interval_s - self._busy.at(tokens) - self._extra_s)

    def busy_s(self, tokens: int) -> float:
        """How long a pass keeps the slowest stage, or link, busy."""
        return max(self._busy.at(tokens) + max(self._extra_s, 0.0), 1e-5)

    def trip_s(self, tokens: int) -> float:
        """How long a pass takes through an empty pipeline."""
        return self._compute.at(tokens) + self._net_s

    def token_s(self, *, full: bool) -> float:
        """What one more token in a pass costs: in time of the slowest stage where the pipeline is full, else in the trip's."""
        return self._busy.slope if full else self._compute.slope

    def has_room(self, under_way_s: float, tokens: int) -> bool:
        """Whether to send another pass, with so much of the slowest stage's time under way."""
        return under_way_s < _SURPLUS * self.trip_s(tokens)

    def full(self, sessions: int) -> bool:
        """Whether so many sessions keep the slowest stage busy, one in each pass."""
        return sessions * self.busy_s(1) >= self.trip_s(1)

    def group(self, sessions: int) -> int:
        """How many sessions to put in a pass."""
        for groups in range(1, sessions + 1):
            size = -(-sessions // groups)
            if sessions / size * self.busy_s(size) >= _SURPLUS * self.trip_s(size):
                return size
        return 1
