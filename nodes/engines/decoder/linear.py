"""Matrices of a model in the format in which they are stored, behind one call: y = W x (+ b)."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence

import torch
from torch import nn

from nodes.engines.decoder.loading import StoredTensors

__all__ = ["Dense", "Int4", "Int8", "Matrix", "Stacked", "read_matrix"]

_linear = torch.nn.functional.linear
# From how many rows on it pays to make bfloat16 of the codes first.
_MANY_INT8, _MANY_INT4 = 16, 48
_BLOCK = 64  # rows that torch's 4-bit kernel packs together
_PIECE = 4 << 20  # elements of such a matrix at a time


class Matrix(nn.Module, abc.ABC):
    """[..., columns] -> [..., rows], in the element type of what comes."""

    def __init__(self, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def nbytes(self) -> int:
        """Of the weights, the bias not counted."""

    def _biased(self, result: torch.Tensor) -> torch.Tensor:
        return result if self.bias is None else result + self.bias


class Dense(Matrix):
    """A single row in bfloat16 takes torch's own matrix-vector kernel: it reads the matrix once, as it stands, where oneDNN first brings it into another order for each
    product (1.6 to 2.3 times slower, measured)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self.weight = weight
        self._vector = weight.dtype == torch.bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self._vector and x.numel() == x.shape[-1]):
            return _linear(x, self.weight, self.bias)
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # there is no other way to ask for that kernel
        try:
            found = torch.mv(self.weight, x.view(-1))
        finally:
            torch._C._set_mkldnn_enabled(enabled)
        return self._biased(found.view(*x.shape[:-1], -1))

    def nbytes(self) -> int:
        return self.weight.nbytes


class Int8(Matrix):
    """`codes` int8 [rows, columns], `scale` [rows]. Many rows at once: the kernel for few is slower than making bfloat16 of the codes, a piece of the matrix at a time."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self.codes, self.scale = codes, scale.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if len(flat) < _MANY_INT8:
            found = torch._weight_int8pack_mm(flat, self.codes, self.scale)
        else:
            found = torch.cat([_linear(flat, piece.to(torch.bfloat16)) for piece in self.codes.split(_rows_at_once(flat.shape[1]))], dim=1)
            found *= self.scale
        return self._biased(found.view(*x.shape[:-1], -1).to(x.dtype))

    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


class Int4(Matrix):
    """`packed`: as torch's kernel of this processor wants it; `scales` [groups, rows, 2]: scale and offset. The kernel computes in bfloat16."""

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self.packed, self.scales, self.group_size = packed, scales, group_size
        rows, columns = scales.shape[1], scales.shape[0] * group_size
        self._unpacks = rows % _BLOCK == 0 and columns % 16 == 0 and _layout_is_known()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if len(flat) < _MANY_INT4 or not self._unpacks:
            found = torch._weight_int4pack_mm_for_cpu(flat, self.packed, self.group_size, self.scales)
        else:
            step = _rows_at_once(flat.shape[1])
            found = torch.cat([flat @ self._dense(first, first + step) for first in range(0, self.scales.shape[1], step)], dim=1)
        return self._biased(found.view(*x.shape[:-1], -1).to(x.dtype))

    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def _dense(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of the matrix, as columns: bfloat16 [columns, rows]."""
        scales = self.scales[:, first:last]
        groups, rows, _ = scales.shape
        codes = _codes(self.packed[first:last], rows, groups * self.group_size)
        scale, zero = scales[:, None, :, 0], scales[:, None, :, 1]
        return torch.addcmul(zero, codes.view(groups, self.group_size, rows), scale).view(-1, rows)


def _codes(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What `_convert_weight_to_int4pack_for_cpu` packed, less 8, as columns: bfloat16 [columns, rows]. With AVX-512 it lays each 64 rows down column by column, row i in the
    low half of a byte and row i + 32 in the high one (aten/src/ATen/native/cpu/int4mm_kernel.cpp)."""
    blocks = packed.view(rows // _BLOCK, columns, _BLOCK // 2)
    codes = torch.empty(columns, rows // _BLOCK, 2, _BLOCK // 2, dtype=torch.bfloat16)
    codes[:, :, 0] = (blocks & 15).transpose(0, 1)
    codes[:, :, 1] = (blocks >> 4).transpose(0, 1)
    return codes.view(columns, rows).sub_(8)


@functools.cache
def _layout_is_known() -> bool:
    """Whether this processor's kernel packs as `_codes` reads."""
    codes = torch.arange(_BLOCK * 32 * 2, dtype=torch.int32).view(2 * _BLOCK, 32).mul(7).remainder(13)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return bool((_codes(packed, 2 * _BLOCK, 32).t() + 8 == codes).all())


def _rows_at_once(columns: int) -> int:
    """Of a matrix that is made of codes: a few MiB."""
    return max(_PIECE // columns // _BLOCK, 1) * _BLOCK


class Stacked(Matrix):
    """Matrices one under another that are stored in different formats."""

    def __init__(self, parts: Sequence[Matrix], bias: torch.Tensor | None) -> None:
        super().__init__(bias)
        self._parts = tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._biased(torch.cat([part(x) for part in self._parts], dim=-1))

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self._parts)


def read_matrix(
    tensors: StoredTensors,
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> Matrix:
    """One matrix of the rows of all these tensors, one under another (they share the columns and the format). Raises BadShard as `StoredTensors.read` does."""
    if all(f"{name}.int8" in tensors for name in names):
        codes = [tensors.read(f"{name}.int8", shape, (torch.int8,)) for name, shape in zip(names, shapes, strict=True)]
        scale = [tensors.read(f"{name}.scale", shape[:1], (torch.float32,)) for name, shape in zip(names, shapes, strict=True)]
        return Int8(_joined(codes), _joined(scale), bias)
    if all(f"{name}.int4" in tensors for name in names):
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        codes = [tensors.read(f"{name}.int4", (shape[0], columns // 2), (torch.uint8,)) for name, shape in zip(names, shapes, strict=True)]
        packed = _packed(_joined(codes), rows, columns)
        scales = torch.empty(columns // group_size, rows, 2, dtype=torch.bfloat16)
        for i, part in enumerate(("scale", "zero")):
            stored = [
                tensors.read(f"{name}.{part}", (shape[0], columns // group_size), (torch.bfloat16,))
                for name, shape in zip(names, shapes, strict=True)
            ]
            scales[:, :, i] = _joined(stored).t()
        return Int4(packed, scales, group_size, bias)
    if len(names) > 1 and any(f"{name}.{form}" in tensors for name in names for form in ("int8", "int4")):
        parts = [read_matrix(tensors, [name], [shape], dtype, group_size) for name, shape in zip(names, shapes, strict=True)]
        return Stacked(parts, bias)
    return Dense(_joined([tensors.read(name, shape, (dtype,)) for name, shape in zip(names, shapes, strict=True)]), bias)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _packed(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Piece by piece: the kernel wants four bytes for each code of 4 bits while it packs."""
    step = max((4 << 20) // columns // 64 * 64, 64)
    pieces = []
    for start in range(0, rows, step):
        piece = codes[start : start + step]
        whole = torch.empty(piece.shape[0], columns, dtype=torch.int32)
        whole[:, 0::2], whole[:, 1::2] = piece & 15, piece >> 4
        pieces.append(torch._convert_weight_to_int4pack_for_cpu(whole, 1))
    return _joined(pieces)
