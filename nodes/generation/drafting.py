"""Guesses at what comes next, to be verified in one pass: what followed the last time that the text read as it does now.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"; in the manner of Yang et al. 2023, "Inference with Reference"): no second model. How many tokens are guessed follows how
often guesses have been right, and what a guess costs beside a pass.
"""

from __future__ import annotations

import numpy as np

__all__ = ["MAX_AHEAD", "MAX_DRAFT", "Belief", "PromptLookup"]

MAX_DRAFT = 24
_LONGEST, _SHORTEST = 4, 2  # tokens that must read the same
_REACH = 1 << 14  # tokens back
_BELIEF = 0.6  # at first: how often the first token of a guess is right
_LEARNING = 0.15
_SUREST = 0.99
_FLOOR = 0.02  # below, a guess is tried only now and then
_PAUSE = 16  # passes
_LIKELY = 0.5  # that all of what is guessed so far is right: then more is guessed behind it
MAX_AHEAD = 256  #: tokens that are guessed and not yet verified


class Belief:
    """How often a guess is right, and what follows from it: how many tokens to guess. Of one session and one way to guess."""

    def __init__(self) -> None:
        self.right = _BELIEF  #: how often a guessed token, whose predecessors were right, is right
        self._pause = 0

    def count(self, pass_s: float, token_s: float) -> int:
        """How many tokens to guess: so many that there are the most tokens a second, where a pass takes `pass_s`, and `token_s` more for each that is guessed."""
        if self._pause:
            self._pause -= 1
            return 0
        count = self._worth(pass_s, token_s)
        if count < 1:
            self._pause, count = _PAUSE, 1  # and look whether things have changed
        return count

    def count_more(self, guessed: int, pass_s: float, token_s: float) -> int:
        """How many behind the last `guessed`, which are guesses that are not verified yet: in a pass of their own, which costs nothing but time of stages that rest, and is lost
        with the first guess that is wrong. So only what is likely."""
        if guessed < 1 or self._pause or guessed >= MAX_AHEAD or self._chance() ** guessed < _LIKELY:
            return 0
        return self._worth(pass_s, token_s)

    def learn(self, looked: int, right: int) -> None:
        """So many guesses were looked at, and so many of them were right: all, or all but the last."""
        if looked:
            weight = 1 - (1 - _LEARNING) ** looked
            self.right += weight * (right / looked - self.right)
            if self.right > _BELIEF:
                self._pause = 0

    def _chance(self) -> float:
        return min(self.right, _SUREST)

    def _worth(self, pass_s: float, token_s: float) -> int:
        if self.right < _FLOOR:
            return 0
        best, best_rate = 0, 1 / pass_s
        expected, chance = 1.0, 1.0
        for count in range(1, MAX_DRAFT + 1):
            chance *= self._chance()
            expected += chance
            rate = expected / (pass_s + count * token_s)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


class PromptLookup(Belief):
    """What followed the last time."""

    def propose(self, tokens: np.ndarray, most: int, pass_s: float, token_s: float) -> np.ndarray:
        """At most `most` tokens to follow `tokens` (int32, the whole text), none where nothing is similar or where it would not pay: see `count`."""
        count = min(self.count(pass_s, token_s), most) if most > 0 else 0
        return _continued(tokens, count) if count > 0 else tokens[:0]

    def propose_more(self, tokens: np.ndarray, guessed: int, most: int, pass_s: float, token_s: float) -> np.ndarray:
        """The same while the last `guessed` of the tokens are guesses under way: see `count_more`."""
        count = min(self.count_more(guessed, pass_s, token_s), most)
        return _continued(tokens, count) if count > 0 else tokens[:0]

    @staticmethod
    def knows(tokens: np.ndarray) -> bool:
        """Whether the text reads as it did before."""
        return _recurrence(tokens[-_REACH:]) is not None


def _continued(tokens: np.ndarray, count: int) -> np.ndarray:
    start = _recurrence(tokens[-_REACH:])
    if start is None:
        return tokens[:0]
    follow = tokens[-_REACH:][start:]
    return np.resize(follow, count) if len(follow) < count else follow[:count]  # beyond the end it repeats itself


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
