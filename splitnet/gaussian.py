"""The Gaussian mechanism's arithmetic, exact: how much noise an (epsilon, delta) takes, and what several releases come to. Pure.

Balle & Wang, Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration, ICML 2018 (Theorem 8): with sensitivity D and noise of
deviation s, let m = D / s. Then the mechanism is (epsilon, delta)-differentially private if and only if

    delta >= N(m / 2 - epsilon / m) - e^epsilon N(-m / 2 - epsilon / m),      N: the normal distribution function.

k releases, also where each is chosen after the ones before, are together what one with m sqrt(k) is (Dong, Roth & Su, Gaussian Differential Privacy,
2019, Corollary 3.3). Everything is computed in logarithms, because e^epsilon overflows where the result is an ordinary number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["delta_of", "epsilon_of", "ratio_of"]

_FAR = -20.0  # below it erfc loses digits, and the tail's series has them all
_HALVINGS = 200


def delta_of(epsilon: float, ratio: float) -> float:
    """The least delta for this epsilon, where the sensitivity is `ratio` times the noise's deviation."""
    if ratio <= 0:
        return 0.0
    near, far = _log_normal(ratio / 2 - epsilon / ratio), _log_normal(-ratio / 2 - epsilon / ratio)
    rest = epsilon + far - near  # the logarithm of the second term over the first
    return math.exp(near) * -math.expm1(rest) if rest < 0 else 0.0


def ratio_of(epsilon: float, delta: float) -> float:
    """The largest ratio of sensitivity to deviation that keeps (epsilon, delta), rounded down."""
    return _last(lambda ratio: delta_of(epsilon, ratio) <= delta)


def epsilon_of(ratio: float, delta: float) -> float:
    """The least epsilon for this delta, rounded up; 0 where delta alone suffices."""
    if delta_of(0.0, ratio) <= delta:
        return 0.0
    low = _last(lambda epsilon: delta_of(epsilon, ratio) > delta)
    return low * (1 + 1e-12)


def _last(holds: Callable[[float], bool]) -> float:
    """The largest positive figure for which it holds, where it holds below some figure and not above."""
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _log_normal(x: float) -> float:
    """The logarithm of the normal distribution function."""
    if x > _FAR:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    over = 1 / (x * x)
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-over * (1 - 3 * over * (1 - 5 * over * (1 - 7 * over))))
