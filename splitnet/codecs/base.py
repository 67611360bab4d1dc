"""What a codec is.

A tensor is cut into chunks of whole elements, and each chunk is encoded and decoded by itself, so that encoding, sending and
decoding overlap and a lost stream leaves no state behind. A codec is stateless and safe to call from several threads.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeAlias

import numpy as np

__all__ = ["Buffer", "Codec"]

Buffer: TypeAlias = bytes | bytearray | memoryview


class Codec(Protocol):
    """Encodes one chunk of an activation.

    `name` is the wire's name. `lossless` promises decode(encode(x)) == x bit for bit (NaN payloads included).
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    def encode(self, chunk: np.ndarray) -> Buffer:
        """`chunk` is one-dimensional, C-contiguous, not empty, of any dtype in `splitnet.tensors.DTYPES`, perhaps read-only. The result may share memory with it."""
        ...

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        """Fills `out` (one-dimensional, contiguous, of the chunk's dtype and length), and touches nothing outside.
        Raises ProtocolError when `payload` does not hold exactly that; never allocates more than a constant times `out`."""
        ...
