"""Small integers in few bits, and the scales that belong to them."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

__all__ = ["blocks", "from_scales", "pack_codes", "packed_bytes", "to_scales", "unpack_codes"]

_BLOCK = 1 << 15  # numbers: with what is made of them they stay in the second-level cache
_PER_BYTE = {2: 4, 3: 2, 4: 2, 8: 1}
_SMALLEST = np.float32(2.0**-126)


def blocks(size: int) -> Iterator[slice]:
    """Slices that together are [0, size)."""
    return (slice(first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK))


def packed_bytes(size: int, bits: int) -> int:
    return -(-size // _PER_BYTE[bits])


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes below 2**bits, several to a byte, the first in the lowest bits. 3 bits: two to a byte (an entropy coder follows)."""
    per = _PER_BYTE[bits]
    if per == 1:
        return codes
    padded = np.zeros(packed_bytes(codes.size, bits) * per, np.uint8) if codes.size % per else codes
    padded[: codes.size] = codes
    words = padded.view(f"<u{per}")
    packed = words.copy()
    for place in range(1, per):
        packed |= words >> place * (8 - bits)
    return packed.astype(np.uint8)


def unpack_codes(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The reverse; each code is below 2**bits, whatever the bytes are."""
    per = _PER_BYTE[bits]
    if per == 1:
        return packed
    words = packed.astype(f"<u{per}")
    for place in reversed(range(1, per)):
        words |= (words & (1 << bits) - 1 << place * bits) << place * (8 - bits)
    words &= int.from_bytes(bytes([(1 << bits) - 1]) * per, "little")
    codes: np.ndarray = words.view(np.uint8)[:size]
    return codes


def to_scales(least: np.ndarray) -> np.ndarray:
    """bfloat16, not below the float32 `least` (by up to 2**-7 of it above), and not below 2**-126, so that the inverse is finite."""
    bits = np.maximum(least, _SMALLEST).view(np.uint32)
    scales: np.ndarray = ((bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
    return scales


def from_scales(scales: np.ndarray) -> np.ndarray:
    """float32."""
    steps: np.ndarray = scales.view(ml_dtypes.bfloat16).astype(np.float32)
    return steps
