"""Guesses at what comes next, to be verified in one pass: what followed the last time that the text read as it does now.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"; in the manner of Yang et al. 2023, "Inference with Reference"): no second model. How many tokens are guessed follows how
often guesses have been right, and what a guess costs beside a pass.
"""

from __future__ import annotations

import numpy as np

__all__ = ["MAX_DRAFT", "PromptLookup"]

MAX_DRAFT = 24
_LONGEST, _SHORTEST = 4, 2  # tokens that must read the same
_REACH = 1 << 14  # tokens back
_BELIEF = 0.6  # at first: how often the first token of a guess is right
_LEARNING = 0.15
_FLOOR = 0.02  # below, a guess is tried only now and then
_PAUSE = 16  # passes


class PromptLookup:
    """Of one session."""

    def __init__(self) -> None:
        self.right = _BELIEF  #: how often a guessed token, whose predecessors were right, is right
        self._pause = 0

    def propose(self, tokens: np.ndarray, most: int, pass_s: float, token_s: float) -> np.ndarray:
        """At most `most` tokens to follow `tokens` (int32, the whole text), none where nothing is similar or where it would not pay: a pass takes `pass_s`, and
        `token_s` more for each token that is guessed."""
        if most < 1:
            return tokens[:0]
        if self._pause:
            self._pause -= 1
            return tokens[:0]
        count = min(self._worth(pass_s, token_s), most, MAX_DRAFT)
        if count < 1:
            self._pause, count = _PAUSE, 1  # and look whether things have changed
        start = _recurrence(tokens[-_REACH:])
        if start is None:
            return tokens[:0]
        follow = tokens[-_REACH:][start:]
        return np.resize(follow, count) if len(follow) < count else follow[:count]  # beyond the end it repeats itself

    def learn(self, guessed: int, right: int) -> None:
        """`right` of the guessed tokens, from the first on."""
        if guessed:
            share = right / min(guessed, right + 1)  # of those that were looked at
            weight = 1 - (1 - _LEARNING) ** min(guessed, right + 1)
            self.right += weight * (share - self.right)
            if self.right > _BELIEF:
                self._pause = 0

    def _worth(self, pass_s: float, token_s: float) -> int:
        """The number of guesses that gives the most tokens a second."""
        if self.right < _FLOOR:
            return 0
        best, best_rate = 0, 1 / pass_s
        expected, chance = 1.0, 1.0
        for count in range(1, MAX_DRAFT + 1):
            chance *= min(self.right, 0.99)
            expected += chance
            rate = expected / (pass_s + count * token_s)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


def _recurrence(tokens: np.ndarray) -> int | None:
    """Where that begins which followed the last time that the text read as at its end; of several lengths the longest."""
    count = len(tokens)
    for size in range(min(_LONGEST, count - 1), _SHORTEST - 1, -1):
        ends = np.flatnonzero(tokens[size - 1 : count - 1] == tokens[count - 1]) + size - 1  # each the last of `size` tokens
        for back in range(1, size):
            ends = ends[tokens[ends - back] == tokens[count - 1 - back]]
        if len(ends):
            return int(ends[-1]) + 1
    return None
