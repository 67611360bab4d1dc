"""What pictures call things: requests, or tokens where text is generated."""

from __future__ import annotations

from dataclasses import dataclass

from splitnet.plan import Plan

__all__ = ["Words", "words_of"]

_TIMES = {"ttft": "time to the first token", "latency": "time of a whole answer"}


@dataclass(frozen=True, slots=True)
class Words:
    """`one`: what passes the pipeline; `latency`: of what a plan's latency is the time; `quick`: the objective that makes it best."""

    one: str = "request"
    latency: str = "latency of one request"
    quick: str = "latency"


def words_of(plan: Plan) -> Words:
    """A plan of a model that generates is drawn by its steps of decoding, each of which brings a session's token."""
    if plan.generation is None:
        return Words()
    return Words(
        "token", _TIMES.get(plan.objective, "time per token of one session"), plan.objective if plan.objective in _TIMES else "tpot"
    )
