"""The torch engine without the promise of equal bits: inference mode, weights that are not trainable, images channels-last.

Within rounding of the reference: torch takes other kernels for these, which add up in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from nodes.engines.torch_graph import TorchGraphEngine
from splitnet.graph import GraphDocument
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.tensors import TensorSpec

__all__ = ["TorchFastEngine"]

_CONVOLUTIONS = ("aten.conv2d.default", "aten.conv2d.padding")
_VIEWS = {"aten.view.default", "aten._unsafe_view.default"}  # of what was contiguous in the original, and is channels-last here
_IMAGE = 4  # dimensions


class TorchFastEngine(TorchGraphEngine):
    """See `nodes.engines.base.Engine`."""

    name: ClassVar[str] = "torch-fast"

    def __init__(
        self,
        document: GraphDocument,
        weights: Mapping[str, torch.Tensor],
        inputs: Sequence[TensorSpec],
        max_value_bytes: int = MAX_VALUE_BYTES,
    ) -> None:
        self._images = any(op.op in _CONVOLUTIONS for op in document.operators)
        if self._images:
            operators = tuple(dataclasses.replace(op, op="aten.reshape.default") if op.op in _VIEWS else op for op in document.operators)
            document = dataclasses.replace(document, operators=operators)
        with torch.inference_mode():
            fixed = {name: self._laid_out(weight.detach()) for name, weight in weights.items()}
        super().__init__(document, fixed, inputs, max_value_bytes)

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if self._images and tensor.ndim == _IMAGE else tensor

    def _mode(self) -> AbstractContextManager[None]:
        return torch.inference_mode()
