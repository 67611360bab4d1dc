"""When another plan is worth a switch. Pure: the caller reads the clock, and says what the present plan and the best one cost.

A switch costs loading, shipping over links that may be the trouble, and a pipeline that must fill again, so it wants a reason that lasts: the best plan
must be better by `margin` for `steady_s` without a break. After a switch nothing is switched for `pause_s`; each time that the way back is taken soon
(a link that swings), the pause doubles, and calm makes it short again. A plan that cannot serve at all is left at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from splitnet.errors import BadInput

__all__ = ["Judge", "Rules", "Verdict"]


@dataclass(frozen=True, slots=True)
class Rules:
    """`margin`: a share by which the present plan must take longer than the best. `longest_pause_s`: however often it went to and fro; after `calm_s`
    without a switch that is forgotten."""

    margin: float = 0.2
    steady_s: float = 5.0
    pause_s: float = 30.0
    longest_pause_s: float = 1800.0
    calm_s: float = 3600.0

    def __post_init__(self) -> None:
        for what in ("margin", "steady_s", "pause_s", "longest_pause_s", "calm_s"):
            if not 0 <= getattr(self, what) < math.inf:
                raise BadInput(f"{what} must be finite and not negative, got {getattr(self, what)}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`gain`: how much longer the present plan takes than the best, as a share; infinite where it cannot serve."""

    switch: bool
    gain: float
    why: str


class Judge:
    """Times of one judge never go backwards."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.switches = 0
        self._better_since: float | None = None
        self._switched_s = -math.inf
        self._left: Hashable = None  # the plan that was left by the last switch
        self._regrets = 0

    def consider(self, now_s: float, present: Hashable, present_s: float, best: Hashable, best_s: float) -> Verdict:
        """`present` and `best` say which plans they are: where stages are cut and where they run. Seconds are the objective's; infinite for a plan
        that cannot serve."""
        gain = math.inf if math.isinf(present_s) else present_s / best_s - 1 if best_s > 0 else 0.0
        if math.isinf(best_s):
            self._better_since = None
            return Verdict(False, 0.0, "nothing that could serve is known")
        if math.isinf(present_s):
            return Verdict(True, gain, "the present plan cannot serve")
        if best == present or gain < self.rules.margin:
            self._better_since = None
            return Verdict(False, max(gain, 0.0), "the present plan is as good" if best == present else f"{gain:.0%} is not worth a switch")
        if self._better_since is None:
            self._better_since = now_s
        steady_s, paused_s = now_s - self._better_since, now_s - self._switched_s
        if steady_s < self.rules.steady_s:
            return Verdict(False, gain, f"better by {gain:.0%} for {steady_s:.0f} of {self.rules.steady_s:.0f} s")
        if paused_s < self.pause_s:
            return Verdict(False, gain, f"better by {gain:.0%}, {self.pause_s - paused_s:.0f} s until the next switch may be")
        return Verdict(True, gain, f"better by {gain:.0%} for {steady_s:.0f} s")

    @property
    def pause_s(self) -> float:
        """After the last switch."""
        return float(min(self.rules.pause_s * 2**self._regrets, self.rules.longest_pause_s))

    def switched(self, now_s: float, left: Hashable, taken: Hashable) -> None:
        """It was done."""
        if now_s - self._switched_s > self.rules.calm_s:
            self._regrets = 0
        elif taken == self._left:
            self._regrets += 1
        self._left, self._switched_s, self._better_since = left, now_s, None
        self.switches += 1

    def failed(self, now_s: float) -> None:
        """It was tried, and the present plan stays: the pause holds all the same."""
        self._switched_s, self._better_since = now_s, None
