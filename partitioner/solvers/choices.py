"""Choices of devices, level by level: row r of a level is a count per kind; the level is how many devices are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Level", "Step", "next_level", "start"]

Ints = np.ndarray


@dataclass(frozen=True, eq=False)
class Level:
    """`counts` is (n, K), in the order of `codes`, which are their numbers in the mixed radix `radix`."""

    counts: Ints
    codes: Ints
    radix: Ints

    def rows(self, codes: Ints) -> tuple[Ints, Ints]:
        """(where in `codes`, row here) of those that are here."""
        at = np.searchsorted(self.codes, codes)
        at = np.minimum(at, len(self.codes) - 1)
        found = np.flatnonzero(self.codes[at] == codes)
        return found, at[found]


@dataclass(frozen=True, eq=False)
class Step:
    """From one level to the next: for each kind, rows there (`after`) whose choice without one of this kind is the row `before` here."""

    level: Level
    after: tuple[Ints, ...]
    before: tuple[Ints, ...]


def start(sizes: tuple[int, ...]) -> Level:
    """Level 0: nothing is chosen."""
    radix = np.concatenate([[1], np.cumprod([size + 1 for size in sizes[:-1]])]).astype(np.int64)
    return Level(np.zeros((1, len(sizes)), dtype=np.int64), np.zeros(1, dtype=np.int64), radix)


def next_level(level: Level, sizes: tuple[int, ...]) -> Step | None:
    """All choices of one device more; None where none is left."""
    more = [level.codes[level.counts[:, k] < size] + level.radix[k] for k, size in enumerate(sizes)]
    codes = np.unique(np.concatenate(more))
    if not codes.size:
        return None
    counts = codes[:, None] // level.radix[None] % (np.asarray(sizes) + 1)[None]
    wider = Level(counts, codes, level.radix)
    pairs = [level.rows(codes - level.radix[k]) for k in range(len(sizes))]
    after, before = [], []
    for k, (here, there) in enumerate(pairs):
        real = counts[here, k] > 0
        after.append(here[real])
        before.append(there[real])
    return Step(wider, tuple(after), tuple(before))
