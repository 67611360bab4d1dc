"""How fast a pipeline takes what its ingress sends: how many batches keep it busy, and how many requests may be ahead of a new one.

Two figures are measured. `empty_s`: how long a batch takes through an empty pipeline. `interval_s`: how far apart batches come out while
the pipeline is given as much as is ever given, which is the slowest stage's (or link's) time. Their ratio is how many batches fill it (Little's law); more
only wait. This is how BBR looks at a network path (Cardwell et al., "BBR: congestion-based congestion control", 2016), with its way
to see the first figure again under constant load: now and then the pipeline is let run empty for one batch.

The clock is the caller's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median_low

__all__ = ["Pace", "Passage"]

_FIRST_DEPTH = 2.0  # until something has been measured, where the plan predicts nothing
_SURPLUS = 1.5  # times what fills the pipeline is sent: stages are not as even as clocks
_TIMES = 2.25  # how much longer than alone a request may take on account of others, to the nearest request
_SAMPLES = 5  # of `empty_s`; the median, because the first are cold
_FLIGHTS = (
    32  # of `interval_s`; the lower quartile, because pauses of whoever sends make some too long, and a jam that clears some too short
)
_ENOUGH = 8  # flights before they are believed
_WEIGHT = 0.1  # of the newest batch's size in the running means
_SOON, _LATER, _SHORTEST_S = 10, 300, 5.0  # how many times `empty_s` lie between two looks at an empty pipeline, at first and later


@dataclass(slots=True)
class Passage:
    """One batch on its way."""

    entered_s: float
    alone: bool  #: the pipeline was empty
    left: int  #: batches that had come out before it went in, the last of them at `left_s`
    left_s: float
    pressed: int


class Pace:
    """`most`: how many batches may be under way, whatever is measured. `joined`: how many rows may be joined to one batch. `depth`: how many
    batches are expected to fill the pipeline."""

    def __init__(self, most: int, *, joined: int = 1, depth: float = _FIRST_DEPTH) -> None:
        self.under_way = 0
        self._most = most
        self._joined = joined
        self._expected = depth
        self._empty = deque[float](maxlen=_SAMPLES)
        self._looks = 0  # at an empty pipeline
        self._look_at_s = -math.inf  # from then on, the pipeline is to be let run empty
        self._intervals = deque[float](maxlen=_FLIGHTS)  # between batches, each on average over one batch's flight
        self._pressed = 0  # how often there was more to send than could be
        self._left = 0  # batches that came out
        self._left_s = -math.inf  # the last of them
        self._calls = 1.0  # requests per batch; less than one where a request is divided
        self._rows = 1.0  # per batch

    # --------------------------------------------------------------------------------------------------------- batches

    @property
    def window(self) -> int:
        """How many batches to keep under way."""
        return min(self._most, math.ceil(_SURPLUS * (self.depth or self._expected)) + 1)

    @property
    def depth(self) -> float | None:
        """How many batches fill the pipeline; None until that has been seen."""
        if not self._empty or len(self._intervals) < _ENOUGH:
            return None
        return max(median_low(self._empty) / self._interval_s, 1.0)

    @property
    def _interval_s(self) -> float:
        return sorted(self._intervals)[len(self._intervals) // 4]

    def has_room(self, now_s: float) -> bool:
        """Whether to send another batch now."""
        if self.under_way and now_s >= self._look_at_s and len(self._intervals) >= _ENOUGH:
            return False  # it runs empty, for the next to see it so
        if self.under_way >= self.window:
            self.press()
            return False
        return True

    def press(self) -> None:
        """There is more to send than is sent."""
        self._pressed += 1

    def enter(self, now_s: float) -> Passage:
        passage = Passage(now_s, not self.under_way, self._left, self._left_s, self._pressed)
        self.under_way += 1
        if passage.alone:
            self._look_at_s = math.inf  # this one looks
        return passage

    def leave(self, passage: Passage, now_s: float, calls: float, rows: int, *, answered: bool) -> None:
        """`calls`: how many requests that was (a part of one: less than 1). Without an answer nothing is learnt of the speed."""
        self.under_way -= 1
        self._left, self._left_s = self._left + 1, now_s
        if answered and not passage.alone and passage.pressed != self._pressed:
            self._intervals.append((now_s - passage.left_s) / (self._left - passage.left))
            self._calls += _WEIGHT * (calls - self._calls)
            self._rows += _WEIGHT * (rows - self._rows)
        if passage.alone:
            if answered:
                self._looks += 1
                self._empty.append(now_s - passage.entered_s)
            empty_s = median_low(self._empty) if self._empty else 0.0
            self._look_at_s = now_s + (_SOON * empty_s if self._looks < _SAMPLES else max(_LATER * empty_s, _SHORTEST_S))

    # -------------------------------------------------------------------------------------------------------- requests

    @property
    def call_s(self) -> float | None:
        """How far apart requests come out of a full pipeline; None until that has been seen."""
        return None if len(self._intervals) < _ENOUGH else self._interval_s / self._calls

    def allows(self, others: int) -> bool:
        """Whether a request may come in when `others` requests of other clients will be served before it: whether they make it wait so little
        that it takes at most `_TIMES` as long as in an empty pipeline (what its own client has put before it, aside). Until that can be
        told, yes."""
        depth = self.depth
        if depth is None:
            return True
        if self._calls < 1:  # in requests: the pieces of a divided one follow each other
            depth = max(depth * self._calls + 1 - self._calls, 1.0)
        company = max(self._joined * self._calls / self._rows, 1.0)  # as many as a full batch holds: fewer would never fill one
        return others + 1 <= round(_TIMES * depth * company)
