from __future__ import annotations

from typing import ClassVar

import numpy as np

from splitnet.codecs.base import Buffer, Lossless
from splitnet.errors import ProtocolError

__all__ = ["Raw"]


class Raw(Lossless):
    """The bytes as they are: no copy on the way out, one on the way in."""

    name: ClassVar[str] = "raw"
    default: ClassVar[bool] = True

    def encode(self, chunk: np.ndarray) -> Buffer:
        return memoryview(chunk.view(np.uint8))

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        if len(payload) != out.nbytes:
            raise ProtocolError(f"raw chunk: expected {out.nbytes} bytes, got {len(payload)}")
        out.view(np.uint8)[:] = np.frombuffer(payload, np.uint8)
