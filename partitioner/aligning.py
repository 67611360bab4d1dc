"""Where weights begin in memory. torch's matrix kernels read it (MKL and oneDNN take another path, and round otherwise, where rows begin
off a boundary), so that the same numbers at another address may give another last bit. A node starts every weight on a 64-byte
boundary, as torch's own allocator does; a memory-mapped safetensors file starts them anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ALIGNMENT", "align_module", "aligned", "is_aligned"]

ALIGNMENT = 64  # bytes; c10/core/alignment.h: gAlignment


def is_aligned(weight: torch.Tensor) -> bool:
    return weight.data_ptr() % ALIGNMENT == 0


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself where it starts on a boundary, else a copy that does: with its strides (packed, where they leave gaps), and a
    leaf that asks for a gradient as it does."""
    if is_aligned(weight):
        return weight
    return weight.detach().clone(memory_format=torch.preserve_format).requires_grad_(weight.requires_grad)


def align_module(module: torch.nn.Module) -> None:
    """Moves the weights and buffers of a module that nobody else holds, in place. Names that shared one tensor share one still."""
    moved: dict[Any, torch.Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if not is_aligned(tensor):
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            tensor.data = moved.setdefault(key, aligned(tensor.detach()))
