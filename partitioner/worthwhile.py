"""When a split is chosen over one machine alone: only where it is predicted to be clearly better. A prediction errs by some per cent
(docs/benchmarks.md), and one machine is simpler to run, so near the break-even the one machine is the better choice."""

from __future__ import annotations

from splitnet.errors import BadInput
from splitnet.explain import seconds_text

__all__ = ["MARGIN", "why_alone", "worth_splitting"]

MARGIN = 0.1  #: by how much a split must be predicted to be better; the mean error of predictions is to stay below it


def worth_splitting(split_s: float, alone_s: float, margin: float = MARGIN) -> bool:
    """Whether a split of `split_s` predicted seconds (latency, or time per batch) is to be chosen over the best machine alone. Raises BadInput
    for a margin outside of [0, 1)."""
    if not 0 <= margin < 1:
        raise BadInput(f"margin must be within [0, 1), got {margin}")
    return split_s < (1 - margin) * alone_s


def why_alone(node: str, split_s: float, alone_s: float, margin: float = MARGIN) -> str:
    """What to say where `worth_splitting` denied it."""
    gain = 1 - split_s / alone_s
    better = f"only {gain:.1%} better" if gain > 0 else "no better"
    return (
        f"the best split is predicted to be {better} than node {node!r} alone ({seconds_text(split_s)} against {seconds_text(alone_s)}); "
        f"one is chosen from {margin:.0%} on, because predictions err"
    )
