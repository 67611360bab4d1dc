"""Which positions of an order are worth cutting at. What is left out without loss, and what is left out where there are too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from partitioner.solvers.problem import Codecs, Floats

__all__ = ["narrowed"]


def narrowed(
    cut_bytes: Floats, seconds: Floats, candidates: Sequence[int], most: int, *, known_s: float = math.inf, bandwidth: Floats | None = None,
    codecs: Codecs | None = None,
) -> tuple[tuple[int, ...], bool]:  # fmt: skip
    """(positions from 0 to n, whether some that might matter were left out).

    Without loss: a position whose bytes would keep even the fastest link busy for longer than a plan that is known (`known_s`: its latency, or
    its bottleneck) is in no better plan. Beyond `most`: of each stretch of equal time the one with the fewest bytes; a plan loses at
    most one stretch's time per cut by it. `seconds` (n,) of the operators.
    """
    count = len(cut_bytes) - 1
    kept = [i for i in candidates if 0 < i < count]
    if bandwidth is not None and codecs is not None and len(bandwidth) > 1:
        away = ~np.eye(len(bandwidth), dtype=bool)
        fastest = float((bandwidth[None] * codecs.ratio[:, None, None])[:, away].max())
        kept = [i for i in kept if cut_bytes[i] / fastest <= known_s]
    if len(kept) <= most:
        return (0, *kept, count), False
    elapsed = np.concatenate([[0.0], np.cumsum(seconds)])
    stretches: dict[int, list[int]] = {}
    for i in kept:
        stretches.setdefault(int(elapsed[i] / max(elapsed[-1], 1e-30) * most), []).append(i)
    return (0, *(min(stretch, key=lambda i: (cut_bytes[i], i)) for stretch in stretches.values()), count), True
