"""How quickly clients have lately got their tokens, as `splitnet status` tells it. Pure: the caller reads the clock."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Speeds"]

_ANSWERS = 64  # that medians are taken over
_WINDOW_S = 10.0  # that tokens are counted over
_SLICE_S = 0.5


class Speeds:
    """Of one deployment, at its ingress. Times of one object never go backwards."""

    def __init__(self) -> None:
        self.answers = 0  # that have come to their end
        self._ttft_s: deque[float] = deque(maxlen=_ANSWERS)
        self._tpot_s: deque[float] = deque(maxlen=_ANSWERS)
        self._slices: deque[tuple[float, int]] = deque()  # (since when, tokens)

    def came(self, tokens: int, now_s: float) -> None:
        """New ones, of whatever session."""
        if self._slices and now_s - self._slices[-1][0] < _SLICE_S:
            since_s, count = self._slices[-1]
            self._slices[-1] = since_s, count + tokens
        else:
            self._slices.append((now_s, tokens))
        self._forget(now_s)

    def began(self, ttft_s: float) -> None:
        """The first token of an answer was there so long after it was asked for."""
        self._ttft_s.append(ttft_s)

    def ended(self, seconds: float, tokens: int) -> None:
        """An answer is whole: its tokens after the first took so long."""
        self.answers += 1
        if tokens:
            self._tpot_s.append(seconds / tokens)

    @property
    def ttft_s(self) -> float:
        """The median of the latest answers; 0 where there were none."""
        return statistics.median(self._ttft_s) if self._ttft_s else 0.0

    @property
    def tpot_s(self) -> float:
        """Of each token after the first: the median of the latest answers; 0 where there were none."""
        return statistics.median(self._tpot_s) if self._tpot_s else 0.0

    def tokens_per_s(self, now_s: float) -> float:
        """Of all sessions together, over the last seconds."""
        self._forget(now_s)
        if not self._slices:
            return 0.0
        spent_s = max(now_s - self._slices[0][0], _SLICE_S)
        return sum(count for _, count in self._slices) / spent_s

    def _forget(self, now_s: float) -> None:
        while self._slices and now_s - self._slices[0][0] > _WINDOW_S:
            self._slices.popleft()
