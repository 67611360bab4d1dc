"""What is the same for all codecs with loss.

Payload: one byte that says the form, then
    0  the chunk's bytes
    1  its planes (`splitnet.codecs.planes`), without loss
    2  how many numbers, and these as the codec encodes floats
    3  the same, then the exceptions: how many, how far each stands from the one before, and their bits.

Exceptions are numbers that the codec cannot carry (not finite, or too large): to it they are zeros, and they are put back afterwards.
Where a chunk is not of floats, has more exceptions than one in eight, or would not become smaller, it goes without loss.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from splitnet.codecs import planes
from splitnet.codecs.base import Buffer, as_reals, rounding_error
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["Lossy"]

_BYTES, _PLANES, _CODED, _CODED_WITH_EXCEPTIONS = range(4)
_MOST_EXCEPTIONS = 1 / 8
_MOST_NUMBERS = 0xFFFFFFFF
_LARGEST_HALF = 65504.0


class Lossy:
    """Subclasses say how floats are encoded; they see float32 without exceptions."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    default: ClassVar[bool] = False
    entropy: ClassVar[bool] = False  #: whether what is encoded goes through an entropy coder
    limit: ClassVar[float] = 2.0**100  #: larger numbers are exceptions
    carries_infinities: ClassVar[bool] = False  #: and NaN

    def encode(self, chunk: np.ndarray) -> Buffer:
        reals = as_reals(chunk)
        if reals is not None and self._smaller(reals):
            with np.errstate(all="ignore"):
                values, places = self._carried(reals)
                if places.size <= reals.size * _MOST_EXCEPTIONS:
                    writer = SectionWriter(bytes((_CODED_WITH_EXCEPTIONS if places.size else _CODED,)))
                    writer.number(values.size)
                    self._pack(values, writer)
                    if places.size:
                        writer.number(places.size)
                        writer.add(np.diff(places, prepend=0).astype("<u4"))
                        writer.add(planes.bits_of(reals)[places])
                    if writer.size_bytes < chunk.nbytes:
                        return writer.payload()
        if self.entropy:
            writer = SectionWriter(bytes((_PLANES,)))
            planes.pack(chunk, writer)
            return writer.payload()
        return b"".join((bytes((_BYTES,)), chunk.view(np.uint8).data))

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        reader = SectionReader(self.name, payload)
        form, reals = reader.byte(), as_reals(out)
        if form == _BYTES:
            out.view(np.uint8)[:] = reader.rest(out.nbytes)
        elif form == _PLANES:
            planes.unpack(reader, out)
        elif reals is not None and form in (_CODED, _CODED_WITH_EXCEPTIONS):
            if (size := reader.number(_MOST_NUMBERS)) != reals.size:
                raise reader.wrong(f"{size} numbers, expected {reals.size}")
            with np.errstate(all="ignore"):
                self._decode(reader, reals)
            if form == _CODED_WITH_EXCEPTIONS:
                self._put_back(reader, reals)
        else:
            raise reader.wrong(f"the form {form} is not one for {out.dtype}")
        reader.end()

    def error_bound(self, chunk: np.ndarray) -> np.ndarray:
        reals = as_reals(chunk)
        if reals is None or not self._smaller(reals):
            return np.zeros(chunk.size if reals is None else reals.size)
        with np.errstate(all="ignore"):
            values, places = self._carried(reals)
            bound = np.broadcast_to(self._bound(values), values.shape).astype(np.float64)
            relative, absolute = rounding_error(reals)
            bound += relative * (np.abs(values) + bound) + absolute
        bound[places] = 0.0
        bound[~np.isfinite(values)] = 0.0
        return bound

    def _smaller(self, reals: np.ndarray) -> bool:
        """Whether numbers of this type can become smaller at all."""
        return True

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        raise NotImplementedError

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        """Fills float32 `values`."""
        raise NotImplementedError

    def _bound(self, values: np.ndarray) -> np.ndarray | float:
        """Without the rounding from and to the chunk's own type."""
        raise NotImplementedError

    def _carried(self, reals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the numbers as float32, zeros where the exceptions are; the places of these)."""
        wide = reals if reals.itemsize >= 4 else reals.astype(np.float32)
        exceptions = np.empty(0, np.int64)
        if not (wide.min() >= -self.limit and wide.max() <= self.limit):  # NaN answers no
            too_large = ~(np.abs(wide) <= self.limit)
            if self.carries_infinities:
                too_large &= np.isfinite(wide)
            exceptions = np.flatnonzero(too_large)
        values = wide.astype(np.float32, copy=bool(exceptions.size))
        if exceptions.size:
            values[exceptions] = 0
        return values, exceptions

    def _decode(self, reader: SectionReader, reals: np.ndarray) -> None:
        if reals.dtype == np.float32:
            self._unpack(reader, reals)
            return
        values = np.empty(reals.size, np.float32)
        self._unpack(reader, values)
        if reals.dtype == np.float16 and not self.carries_infinities:
            np.clip(values, -_LARGEST_HALF, _LARGEST_HALF, out=values)  # a peak must not be rounded up to infinity
        np.copyto(reals, values, casting="same_kind")

    def _put_back(self, reader: SectionReader, reals: np.ndarray) -> None:
        bits = planes.bits_of(reals)
        count = reader.number(int(reals.size * _MOST_EXCEPTIONS))
        places = np.cumsum(reader.take(4 * count).view("<u4"), dtype=np.int64)
        found = reader.take(bits.itemsize * count).view(bits.dtype)
        if count and places[-1] >= bits.size:
            raise reader.wrong(f"an exception at {places[-1]} of {bits.size}")
        bits[places] = found
