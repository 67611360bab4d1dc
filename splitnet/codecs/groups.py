"""Integers with a scale for each 64 neighbours."""

from __future__ import annotations

from typing import ClassVar

import ml_dtypes
import numpy as np

from splitnet.codecs import planes
from splitnet.codecs.codes import blocks, from_scales, pack_codes, packed_bytes, to_scales, unpack_codes
from splitnet.codecs.lossy import Lossy
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["Int4", "Int4Zstd", "Int8", "Int8Zstd"]

_GROUP = 64


class _Groups(Lossy):
    """code = round(x / scale), scale = the group's largest |x| / the largest code, as bfloat16. Codes are offset to be positive; a chunk
    without negative numbers uses the whole range for the others. One byte (1: no negative numbers), the scales, the codes."""

    bits: ClassVar[int]

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        positive = bool(values.min() >= 0)
        most, offset = self._range(positive)
        codes = np.empty(values.size, np.uint8)
        scales = np.empty(-(-values.size // _GROUP), ml_dtypes.bfloat16)
        for block in blocks(values.size):
            groups = _grouped(values[block])
            ranges = slice(block.start // _GROUP, block.start // _GROUP + len(groups))
            scales[ranges] = to_scales(_peaks(groups, positive) / np.float32(most))
            scaled = groups * (np.float32(1) / from_scales(scales[ranges]))[:, None]
            np.rint(scaled, out=scaled)
            scaled += np.float32(offset)
            codes[block] = scaled.reshape(-1)[: block.stop - block.start]
        writer.byte(positive)
        if self.entropy:
            planes.pack(scales, writer)
        else:
            writer.add(scales, compress=False)
        writer.add(pack_codes(codes, self.bits), compress=self.entropy)

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        positive = reader.byte()
        if positive > 1:
            raise reader.wrong(f"a sign byte of {positive}")
        offset = np.float32(self._range(bool(positive))[1])
        scales = np.empty(-(-values.size // _GROUP), ml_dtypes.bfloat16)
        if self.entropy:
            planes.unpack(reader, scales)
        else:
            scales.view(np.uint8)[:] = reader.take(scales.nbytes)
        codes = unpack_codes(reader.take(packed_bytes(values.size, self.bits)), self.bits, values.size)
        steps = from_scales(scales)
        for block in blocks(values.size):
            np.subtract(codes[block], offset, out=values[block], dtype=np.float32)
            whole = values.size // _GROUP * _GROUP if block.stop == values.size else block.stop
            groups = values[block.start : whole].reshape(-1, _GROUP)
            first = block.start // _GROUP
            groups *= steps[first : first + len(groups), None]
            values[whole : block.stop] *= steps[-1]

    def _bound(self, values: np.ndarray) -> np.ndarray:
        positive = bool(values.min() >= 0)
        peaks = _peaks(_grouped(values), positive).astype(np.float64)
        steps = np.maximum(peaks / self._range(positive)[0] * (1 + 2.0**-7), 2.0**-126)
        bound: np.ndarray = np.repeat(steps * (0.5 + 2.0**-14), _GROUP)[: values.size]
        return bound

    def _range(self, positive: bool) -> tuple[int, int]:
        """(the largest code before the offset, the offset)."""
        most = 2 ** (self.bits - 1) - 1
        return (2 * most + 1, 0) if positive else (most, most + 1)


def _grouped(values: np.ndarray) -> np.ndarray:
    """(groups, 64); the last one filled up with zeros."""
    if not values.size % _GROUP:
        return values.reshape(-1, _GROUP)
    padded = np.zeros((-(-values.size // _GROUP), _GROUP), np.float32)
    padded.reshape(-1)[: values.size] = values
    return padded


def _peaks(groups: np.ndarray, positive: bool) -> np.ndarray:
    most: np.ndarray = groups.max(axis=1)
    return most if positive else np.maximum(most, -groups.min(axis=1))


class Int8(_Groups):
    name: ClassVar[str] = "int8"
    bound: ClassVar[str] = "max|x| of 64 neighbours / 252 (/ 506 where no number of the chunk is negative)"
    bits: ClassVar[int] = 8


class Int8Zstd(Int8):
    name: ClassVar[str] = "int8-zstd"
    entropy: ClassVar[bool] = True


class Int4(_Groups):
    name: ClassVar[str] = "int4"
    bound: ClassVar[str] = "max|x| of 64 neighbours / 13.8 (/ 29.7 where no number of the chunk is negative)"
    bits: ClassVar[int] = 4


class Int4Zstd(Int4):
    name: ClassVar[str] = "int4-zstd"
    entropy: ClassVar[bool] = True
