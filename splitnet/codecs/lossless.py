from __future__ import annotations

from typing import ClassVar

import numpy as np

from splitnet.codecs import planes
from splitnet.codecs.base import Buffer, Lossless
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["ShuffleZstd", "ZeroMask"]


class ShuffleZstd(Lossless):
    """Byte planes, each through Zstandard's entropy coder; many exact zeros stand in a bitmask before (see `splitnet.codecs.planes`)."""

    name: ClassVar[str] = "zstd"
    default: ClassVar[bool] = True

    def encode(self, chunk: np.ndarray) -> Buffer:
        writer = SectionWriter()
        planes.pack(chunk, writer)
        return writer.payload()

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        reader = SectionReader(self.name, payload)
        planes.unpack(reader, out)
        reader.end()


class ZeroMask(Lossless):
    """A bitmask of the exact zeros, then the other numbers as they are: for activations after ReLU on links too fast for an entropy
    coder. -0.0 is not an exact zero. One byte (0: nothing but the bytes; 1: a mask), the mask, the numbers."""

    name: ClassVar[str] = "mask"
    default: ClassVar[bool] = True

    def encode(self, chunk: np.ndarray) -> Buffer:
        writer, bits = SectionWriter(), planes.bits_of(chunk)
        mask = bits != 0
        count = int(np.count_nonzero(mask))
        masked = (bits.size - count) * bits.itemsize > bits.size // 8 + 16
        writer.byte(masked)
        writer.add(planes.write_mask(bits, mask, count, writer) if masked else bits, compress=False)
        return writer.payload()

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        reader, bits = SectionReader(self.name, payload), planes.bits_of(out)
        masked = reader.byte()
        if masked > 1:
            raise reader.wrong(f"a first byte of {masked}")
        places = planes.read_mask(reader, bits.size) if masked else slice(None)
        found = reader.take((bits.size if isinstance(places, slice) else places.size) * bits.itemsize).view(bits.dtype)
        reader.end()
        bits[:] = 0
        bits[places] = found
