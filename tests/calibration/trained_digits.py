"""What the tests of calibration share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from partitioner.graph import ModelGraph

__all__ = ["Trained"]


@dataclass(frozen=True)
class Trained:
    """`spec` is a MODEL argument, `data` the file; `accuracy` of the whole network on it."""

    folder: Path
    spec: str
    data: Path
    net: torch.nn.Module
    graph: ModelGraph
    images: np.ndarray
    labels: np.ndarray

    @property
    def input(self) -> str:
        return self.graph.structure.inputs[0].name
