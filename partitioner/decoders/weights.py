"""Formats of a decoder model's weights: which may be chosen, by what was asked for and by what was measured of their loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partitioner.decoders.model import FORMATS
from splitnet.errors import BadInput

__all__ = ["Weights"]


@dataclass(frozen=True)
class Weights:
    """`wanted`: "auto" or a format. `perplexity`: by format, "" as the model is stored, where it was measured; `of`: on what. `max_loss`: by what share it may grow. Raises
    BadInput for a format that there is not."""

    wanted: str = "auto"
    perplexity: Mapping[str, float] | None = None
    of: str = ""
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if self.wanted != "auto" and self.wanted not in FORMATS:
            raise BadInput(f"weights: expected auto, {', '.join(FORMATS)}, got {self.wanted!r}")
        if self.max_loss is not None and not self.max_loss >= 0:
            raise BadInput(f"max_accuracy_loss must not be negative, got {self.max_loss}")
        if self.max_loss is not None and not self.perplexity and self.wanted == "auto":
            raise BadInput("what formats of weights lose was not measured", remedy="give a text to measure it on: --data FILE")

    def loss(self, form: str) -> float | None:
        """The relative increase of perplexity; None where it was not measured."""
        if not self.perplexity or form not in self.perplexity:
            return None
        return self.perplexity[form] / self.perplexity[""] - 1.0

    def rounds(self, stored: str) -> list[tuple[str, ...]]:
        """Sets of formats to plan with, one after the other until something fits. Without a measurement what is coarser than bfloat16 is for want of memory only."""
        if self.wanted != "auto":
            return [(self.wanted,)]
        fine = FORMATS[:2]
        if self.max_loss is None:
            return [fine, (*fine, "int8"), FORMATS]
        allowed = tuple(
            f for f in FORMATS if f == stored or f == "float32" or ((loss := self.loss(f)) is not None and loss <= self.max_loss)
        )
        return [allowed]
