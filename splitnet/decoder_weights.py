"""Matrices in 8 and 4 bits, as a decoder shard stores them. Pure numpy: quantising needs no torch.

A matrix W [rows, columns] called NAME is stored as
  int8   NAME.int8 int8 [rows, columns], NAME.scale float32 [rows]; W = int8 * scale (symmetric, one scale per row)
  int4   NAME.int4 uint8 [rows, columns / 2] (the even column in the low half), NAME.scale and NAME.zero bfloat16 [rows, columns / group];
         W = (code - 8) * scale + zero, codes 0..15 (the arithmetic of torch's `_weight_int4pack_mm_for_cpu`)
and otherwise as NAME itself. `stored_format` says which matrices can be stored so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from splitnet.errors import BadInput

__all__ = ["dequantize", "plain_name", "quantize", "stored_bytes", "stored_format"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SUFFIX = re.compile(r"\.(int8|int4|scale|zero)\Z")
_ROUTER = re.compile(r"\.mlp\.gate\.weight\Z")  # of a mixture of experts: small, and which expert is chosen hangs on its last bits
_ROWS = 16  # what the 4-bit kernel asks of the rows, and of the columns beside their groups
_LEAST_SCALE = 1e-12


def stored_format(name: str, shape: Sequence[int], wanted: str, group_size: int, dtype: str) -> str:
    """The format in which a tensor of this canonical name is stored when its group has the format `wanted`. Vectors (norms, biases), the router of a mixture of experts
    and matrices that the kernels cannot take keep `dtype`, that of the computation; int4 falls back to int8 where only the groups do not fit."""
    if len(shape) != 2 or _ROUTER.search(name) or wanted not in ("int8", "int4"):
        return dtype if len(shape) != 2 or _ROUTER.search(name) else wanted
    rows, columns = shape
    if wanted == "int4" and rows % _ROWS == 0 and columns % group_size == 0:
        return "int4"
    return "int8" if columns % _ROWS == 0 and rows % _ROWS == 0 else dtype


def stored_bytes(shape: Sequence[int], form: str, group_size: int) -> int:
    """What a tensor of that format takes in a shard and in a node's memory."""
    count = int(np.prod(shape, dtype=np.int64))
    if form == "int8":
        return count + 4 * shape[0]
    if form == "int4":
        return count // 2 + count // group_size * 2 * 2
    return count * (4 if form == "float32" else 2)


def plain_name(stored: str) -> str:
    """The tensor that a stored one belongs to: without .int8, .scale and so on."""
    return _SUFFIX.sub("", stored)


def quantize(name: str, weight: np.ndarray, form: str, group_size: int) -> dict[str, np.ndarray]:
    """What is stored for the matrix: by name, as above. `form`: what `stored_format` says. Raises BadInput for weights that are not finite."""
    if form in ("float32", "bfloat16"):
        return {name: np.ascontiguousarray(weight.astype(_BFLOAT16 if form == "bfloat16" else np.float32))}
    matrix = weight.astype(np.float32)
    if not np.isfinite(matrix).all():
        raise BadInput(f"tensor {name!r} holds values that are not finite: it cannot be stored as {form}")
    if form == "int8":
        scale = np.maximum(np.abs(matrix).max(axis=1), _LEAST_SCALE) / np.float32(127)
        return {f"{name}.int8": np.rint(matrix / scale[:, None]).astype(np.int8), f"{name}.scale": scale.astype(np.float32)}
    if form != "int4":
        raise BadInput(f"format {form!r} is not one of float32, bfloat16, int8, int4")
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // group_size, group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    # scale and offset are rounded first, and the codes found for what they became
    scale = np.maximum((high - low) / 15, _LEAST_SCALE).astype(_BFLOAT16)
    zero = (low + 8 * scale.astype(np.float32)).astype(_BFLOAT16)
    codes = np.rint((groups - zero.astype(np.float32)[..., None]) / scale.astype(np.float32)[..., None] + 8)
    codes = np.clip(codes, 0, 15).astype(np.uint8).reshape(rows, columns)
    return {f"{name}.int4": codes[:, 0::2] | codes[:, 1::2] << 4, f"{name}.scale": scale, f"{name}.zero": zero}


def dequantize(name: str, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """The float32 matrix that a node computes with. `stored` holds what `quantize` made."""
    if name in stored:
        return stored[name].astype(np.float32)
    scale = stored[f"{name}.scale"].astype(np.float32)
    if f"{name}.int8" in stored:
        return np.asarray(stored[f"{name}.int8"].astype(np.float32) * scale[:, None])
    packed, zero = stored[f"{name}.int4"], stored[f"{name}.zero"].astype(np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1).astype(np.float32) - 8
    grouped = codes.reshape(packed.shape[0], scale.shape[1], -1)
    return np.asarray((grouped * scale[..., None] + zero[..., None]).reshape(packed.shape[0], -1))
