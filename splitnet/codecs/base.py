"""What a codec is.

A tensor is cut into chunks of whole elements, and each chunk is encoded and decoded by itself, so that encoding, sending and
decoding overlap and a lost stream leaves no state behind. A codec is stateless and safe to call from several threads.

Numbers stand on the wire in little-endian order, as they do in memory wherever numpy has SIMD kernels.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeAlias

import ml_dtypes
import numpy as np

__all__ = ["Buffer", "Codec", "Lossless", "as_reals", "rounding_error"]

Buffer: TypeAlias = bytes | bytearray | memoryview
_FLOATS = frozenset((np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)))


class Codec(Protocol):
    """Encodes one chunk of an activation.

    `name` is the wire's name. `lossless` promises decode(encode(x)) == x bit for bit (NaN payloads included). `default`: may be chosen
    without a calibration, because it is lossless or rounds as bfloat16 does, and encodes at least 500 MB/s per core. `bound` says in a line
    how far a decoded value may be from the true one.

    A codec with loss encodes real and complex floats (those part by part) with loss and everything else (integers, bools) without. NaN
    stays NaN and an infinity stays that infinity."""

    name: ClassVar[str]
    lossless: ClassVar[bool]
    default: ClassVar[bool]
    bound: ClassVar[str]

    def encode(self, chunk: np.ndarray) -> Buffer:
        """`chunk` is one-dimensional, C-contiguous, not empty, of any dtype in `splitnet.tensors.DTYPES`, perhaps read-only. The result may share memory with it."""
        ...

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        """Fills `out` (one-dimensional, contiguous, of the chunk's dtype and length), and touches nothing outside.
        Raises ProtocolError when `payload` does not hold exactly that; never allocates more than a constant times `out`."""
        ...

    def error_bound(self, chunk: np.ndarray) -> np.ndarray:
        """float64: for each number of the chunk (a complex one counts as two) what |decoded - true| does not exceed, as `bound` says.
        0 where the number is not finite: those are kept as they are."""
        ...


class Lossless:
    """What is the same for all codecs without loss."""

    lossless: ClassVar[bool] = True
    bound: ClassVar[str] = "0"

    def error_bound(self, chunk: np.ndarray) -> np.ndarray:
        reals = as_reals(chunk)
        return np.zeros(chunk.size if reals is None else reals.size)


def as_reals(chunk: np.ndarray) -> np.ndarray | None:
    """The chunk's real numbers (a view; of complex ones both parts), or None where it has no floats."""
    if chunk.dtype == np.complex64:
        return chunk.view(np.float32)
    return chunk if chunk.dtype in _FLOATS else None


def rounding_error(reals: np.ndarray) -> tuple[float, float]:
    """(relative, absolute) error of rounding a float32 to this dtype, or of rounding this dtype to float32: the larger one."""
    if reals.dtype == np.float16:
        return 2.0**-11, 2.0**-25
    return (2.0**-8 if reals.dtype == ml_dtypes.bfloat16 else 2.0**-24), 2.0**-126
