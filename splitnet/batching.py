"""How a deployment divides and joins requests along their batch, and where a model's tensors carry it.

Off unless asked for. A kernel may round differently for another batch size, and nothing in a graph's shapes proves that a model treats
the rows of a batch one by one (a mean over the batch does not): whoever turns it on says that the rows do not depend on each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitnet.errors import BadPlan
from splitnet.tensors import TensorSpec

__all__ = ["BatchAxes", "Batching", "find_batch_axes"]

_USUAL = "batch"  # what capture calls the size that it was given as the batch
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Batching:
    """`max_batch`: small requests with the same other sizes are joined until they have that many rows together (1: never). `max_delay_s`:
    how long one may wait for company when there is room for it at once; 0 joins only what waits anyway. `microbatch`: a request with
    more rows goes through the pipeline in pieces of that many (0: never). Raises BadPlan."""

    max_batch: int = 1
    max_delay_s: float = 0.0
    microbatch: int = 0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise BadPlan(f"max_batch must be at least 1, got {self.max_batch}", remedy="1 joins nothing")
        if self.microbatch < 0:
            raise BadPlan(f"microbatch must not be negative, got {self.microbatch}", remedy="0 divides nothing")
        if not (math.isfinite(self.max_delay_s) and 0 <= self.max_delay_s <= _LONGEST_DELAY_S):
            raise BadPlan(f"max_delay_s must be between 0 and {_LONGEST_DELAY_S:g}, got {self.max_delay_s}")
        if self.max_delay_s and self.max_batch == 1:
            raise BadPlan(
                "max_delay_s without max_batch: requests would wait for company that they never get", remedy="give --max-batch too"
            )

    @property
    def on(self) -> bool:
        return self.max_batch > 1 or self.microbatch > 0


@dataclass(frozen=True, slots=True)
class BatchAxes:
    """The size that is the batch, and which axis it is of each input and of each value that makes up the answer."""

    symbol: str
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


def find_batch_axes(inputs: Sequence[TensorSpec], outputs: Mapping[str, TensorSpec]) -> BatchAxes:
    """The batch is "batch" where the model has a size of that name, else the first axis of the first input. Raises BadPlan where it is
    not a size that every input and output has exactly once, by itself: such a model's requests can be neither joined nor divided."""
    named = {dimension for spec in inputs for dimension in spec.shape if dimension == _USUAL}
    symbol = _USUAL if named else (inputs[0].shape[0] if inputs and inputs[0].shape else "")
    if not (isinstance(symbol, str) and _SYMBOL.fullmatch(symbol)):
        raise BadPlan("the first axis of the first input is not a size that may vary", remedy=_REMEDY)
    return BatchAxes(
        symbol,
        {spec.name: _axis(spec, symbol, "input") for spec in inputs},
        {value: _axis(spec, symbol, "output") for value, spec in outputs.items()},
    )


_REMEDY = "deploy without max_batch and microbatch, or capture the model with its batch as the first axis of everything"


def _axis(spec: TensorSpec, symbol: str, what: str) -> int:
    holds = [axis for axis, size in enumerate(spec.shape) if isinstance(size, str) and symbol in _SYMBOL.findall(size)]
    if len(holds) != 1 or spec.shape[holds[0]] != symbol:
        shown = ", ".join(map(str, spec.shape))
        raise BadPlan(f"{what} {spec.name!r} of shape ({shown}) does not carry {symbol!r} in exactly one axis", remedy=_REMEDY)
    return holds[0]
