"""Matrices of a model in the format in which they are stored, behind one call: y = W x (+ b)."""

from __future__ import annotations

import abc
import functools
import itertools
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
_PACKED_PIECE = 1 << 19  # the same, while codes are packed
_UNPACKED_ROWS = 256  # so that what is in the making stays in the processor's caches


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
            rows = self.scales.shape[1]
            found = torch.cat([_in_order(flat @ self._dense(first, min(first + step, rows))) for first in range(0, rows, step)], dim=1)
        return self._biased(found.view(*x.shape[:-1], -1).to(x.dtype))

    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def _dense(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of the matrix, as columns in the order of `_codes`: bfloat16 [columns, rows]."""
        groups, size = self.scales.shape[0], self.group_size
        dense = torch.empty(groups * size, last - first, dtype=torch.bfloat16)
        for start in range(first, last, _UNPACKED_ROWS):
            end = min(start + _UNPACKED_ROWS, last)
            codes = _codes(self.packed[start:end], groups * size)
            blocks = len(codes)
            scales = (
                self.scales[:, start:end]
                .reshape(groups, blocks, 2, 16, 2, 2)
                .permute(5, 1, 0, 2, 4, 3)
                .reshape(2, blocks, groups, 1, _BLOCK)
            )
            target = dense[:, start - first : end - first].view(groups, size, blocks, _BLOCK).permute(2, 0, 1, 3)
            torch.addcmul(scales[1], codes.view(blocks, groups, size, _BLOCK), scales[0], out=target)
        return dense


def _codes(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """What `_convert_weight_to_int4pack_for_cpu` packed, less 8: bfloat16 [blocks of 64 rows, columns, 64]. With AVX-512 it lays each 64 rows down column by column, row i
    in the low half of a byte and row i + 32 in the high one (aten/src/ATen/native/cpu/int4mm_kernel.cpp). Here two bytes are taken at once, so that of each block the rows come
    as `_in_order` finds them. 0x4300 is 128 in bfloat16, whose last four bits count by ones."""
    pairs = packed.view(torch.int16).view(-1, columns, 16)
    bits = torch.empty(len(pairs), columns, 4, 16, dtype=torch.int16)
    for i, shift in enumerate((0, 8, 4, 12)):
        torch.bitwise_and(pairs >> shift if shift else pairs, 15, out=bits[:, :, i])
    return bits.bitwise_or_(0x4300).view(torch.bfloat16).sub_(136).view(-1, columns, _BLOCK)


def _in_order(found: torch.Tensor) -> torch.Tensor:
    """Values [..., rows] in the order of `_codes`, as they belong."""
    blocks = found.view(*found.shape[:-1], -1, 2, 2, 16)
    return blocks.transpose(-1, -2).reshape(found.shape)


@functools.cache
def _layout_is_known() -> bool:
    """Whether this processor's kernel packs as `_codes` reads."""
    codes = torch.arange(_BLOCK * 32 * 2, dtype=torch.int32).view(2 * _BLOCK, 32).mul(7).remainder(13)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    unpacked = _in_order(_codes(packed, 32)).transpose(1, 2).reshape(2 * _BLOCK, 32)
    return bool((unpacked + 8 == codes).all())


def _rows_at_once(columns: int, elements: int = _PIECE) -> int:
    """Of a matrix that is made piece by piece."""
    return max(elements // columns // _BLOCK, 1) * _BLOCK


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
    columns = shapes[0][1]
    if all(f"{name}.int8" in tensors for name in names):
        scale = [tensors.read(f"{name}.scale", shape[:1], (torch.float32,)) for name, shape in zip(names, shapes, strict=True)]
        return Int8(_one_under_another(tensors, names, ".int8", shapes, torch.int8), torch.cat(scale), bias)
    if all(f"{name}.int4" in tensors for name in names):
        scales = torch.empty(columns // group_size, sum(shape[0] for shape in shapes), 2, dtype=torch.bfloat16)
        grouped = [(shape[0], columns // group_size) for shape in shapes]
        for i, part in enumerate((".scale", ".zero")):
            scales[:, :, i] = _one_under_another(tensors, names, part, grouped, torch.bfloat16).t()
        return Int4(_packed(tensors, names, shapes), scales, group_size, bias)
    if len(names) > 1 and any(f"{name}.{form}" in tensors for name in names for form in ("int8", "int4")):
        parts = [read_matrix(tensors, [name], [shape], dtype, group_size) for name, shape in zip(names, shapes, strict=True)]
        return Stacked(parts, bias)
    return Dense(_one_under_another(tensors, names, "", shapes, dtype), bias)


def _one_under_another(
    tensors: StoredTensors, names: Sequence[str], suffix: str, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> torch.Tensor:
    """Each read to its place: two copies of a large matrix at once would be the peak of what a node takes."""
    whole = torch.empty(sum(shape[0] for shape in shapes), shapes[0][1], dtype=dtype)
    first = 0
    for name, shape in zip(names, shapes, strict=True):
        tensors.read_into(name + suffix, whole[first : first + shape[0]])
        first += shape[0]
    return whole


def _packed(tensors: StoredTensors, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Piece by piece: the kernel wants four bytes for each code of 4 bits while it packs. It packs 64 rows together, so that a piece may hold the end of one matrix and the
    beginning of the next."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    step = _rows_at_once(columns, _PACKED_PIECE)
    codes = torch.empty(min(step, rows), columns // 2, dtype=torch.uint8)
    whole = torch.empty(min(step, rows), columns, dtype=torch.int32)
    starts = list(itertools.accumulate((shape[0] for shape in shapes), initial=0))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        for name, start, shape in zip(names, starts, shapes, strict=False):
            a, b = max(first, start), min(last, start + shape[0])
            if a < b:
                tensors.read_into(f"{name}.int4", codes[a - first : b - first], row=a - start, rows=shape[0])
        piece, target = codes[: last - first], whole[: last - first]
        torch.bitwise_and(piece, 15, out=target[:, 0::2])
        torch.bitwise_right_shift(piece, 4, out=target[:, 1::2])
        packed[first:last] = torch._convert_weight_to_int4pack_for_cpu(target, 1)
    return packed
