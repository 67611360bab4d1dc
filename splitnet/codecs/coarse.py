"""Clip, quantise coarsely, and leave the rest to the entropy coder: about one bit per number and less for activations after ReLU.

After Cohen, Choi, Bajic, "Lightweight compression of intermediate neural network features for collaborative intelligence" (2021), with
one step for the chunk. The step is a multiple of the root mean square of the numbers that are not zero: on activations after ReLU the
task's score falls later at a step that is too wide for the least square error than at one that is too narrow, because large values matter.
"""

from __future__ import annotations

import struct
from typing import ClassVar

import numpy as np

from splitnet.codecs import outliers
from splitnet.codecs.codes import blocks, pack_codes, packed_bytes, unpack_codes
from splitnet.codecs.lossy import Lossy
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["Clip2", "Clip3", "Clip4", "Step4", "Wide2"]

_STEP = struct.Struct("<Bf")


class _Coarse(Lossy):
    """code = round(x / step), clipped. One byte (1: no negative numbers), the step as float32, the codes, several to a byte: so that a
    frequent run of them may cost less than one bit each."""

    entropy: ClassVar[bool] = True
    bits: ClassVar[int]
    positive_step: ClassVar[float]  #: times the root mean square of what is not zero
    signed_step: ClassVar[float]
    zone: ClassVar[float] = (
        0.5  #: what lies closer to zero than so many steps becomes zero; beyond it too, numbers are rounded up only above this
    )

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        self._write(values, *self._step(values), writer)

    def _write(self, values: np.ndarray, positive: bool, step: float, writer: SectionWriter) -> None:
        most, offset = self._range(positive)
        codes = np.empty(values.size, np.uint8)
        for block in blocks(values.size):
            scaled = values[block] * np.float32(1 / step)
            np.clip(scaled, -offset, most, out=scaled)
            scaled += np.float32(offset + 0.5)
            codes[block] = scaled  # it is positive: to cut off is to round
        writer.plain(_STEP.pack(positive, step))
        writer.add(pack_codes(codes, self.bits))

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        positive, step = _STEP.unpack(reader.plain(_STEP.size))
        if positive > 1:
            raise reader.wrong(f"a sign byte of {positive}")
        _, offset = self._range(bool(positive))
        table = (np.arange(2**self.bits, dtype=np.float32) - np.float32(offset)) * np.float32(step)
        codes = unpack_codes(reader.take(packed_bytes(values.size, self.bits)), self.bits, values.size)
        np.take(table, codes, out=values, mode="clip")

    def _bound(self, values: np.ndarray) -> np.ndarray:
        positive, step = self._step(values)
        clip = self._range(positive)[0] * step
        bound: np.ndarray = np.maximum(step * (0.5 + 2.0**-18), np.abs(values).astype(np.float64) - clip * (1 - 2.0**-18))
        return bound

    def _range(self, positive: bool) -> tuple[int, int]:
        """(the largest code before the offset, the offset); there are as many below zero as above, so that zero stays zero."""
        most = 2 ** (self.bits - 1) - 1
        return (2 * most + 1, 0) if positive else (most, most)

    def _step(self, values: np.ndarray) -> tuple[bool, float]:
        """(whether there are no negative numbers, the step), as the decoder sees them."""
        lowest, highest = float(values.min()), float(values.max())
        peak = max(highest, -lowest)
        if peak < 2.0**-120:
            return lowest >= 0, 2.0**-120
        squares, count = 0.0, 0
        for block in blocks(values.size):
            part = values[block] * np.float32(1 / peak)
            squares += float(np.einsum("i,i->", part, part))
            count += int(np.count_nonzero(part))
        step = (self.positive_step if lowest >= 0 else self.signed_step) * peak * (squares / count) ** 0.5
        return lowest >= 0, float(np.float32(max(step, 2.0**-120)))


_BOUND = (
    "max(step / 2, |x| - {} step), step = {} r ({} steps of {} r where there are negative numbers), r the root mean square of what is not 0"
)


class Clip2(_Coarse):
    name: ClassVar[str] = "clip2"
    bits: ClassVar[int] = 2
    positive_step: ClassVar[float] = 1.8
    signed_step: ClassVar[float] = 1.224
    bound: ClassVar[str] = _BOUND.format(3, positive_step, 1, signed_step)


class Wide2(_Coarse):
    """The levels of `clip2` further apart: fewer of the numbers are anything but zero. For activations of which few are zeros already, as after pooling."""

    name: ClassVar[str] = "wide2"
    bits: ClassVar[int] = 2
    positive_step: ClassVar[float] = 2.3
    signed_step: ClassVar[float] = 1.6
    bound: ClassVar[str] = _BOUND.format(3, positive_step, 1, signed_step)


class Clip3(_Coarse):
    name: ClassVar[str] = "clip3"
    bits: ClassVar[int] = 3
    positive_step: ClassVar[float] = 0.9
    signed_step: ClassVar[float] = 0.8
    bound: ClassVar[str] = _BOUND.format(7, positive_step, 3, signed_step)


class Clip4(_Coarse):
    name: ClassVar[str] = "clip4"
    bits: ClassVar[int] = 4
    positive_step: ClassVar[float] = 0.4
    signed_step: ClassVar[float] = 0.5
    bound: ClassVar[str] = _BOUND.format(15, positive_step, 7, signed_step)


class Step4(_Coarse):
    """One step for the chunk and the entropy coder: what is sent is about as many bits as a number's place takes, four for a transformer's
    hidden state. Nothing is clipped: what is beyond the largest code stands beside (`splitnet.codecs.outliers`)."""

    name: ClassVar[str] = "step4"
    bits: ClassVar[int] = 8
    positive_step: ClassVar[float] = 0.24
    signed_step: ClassVar[float] = 0.24
    bound: ClassVar[str] = "0.121 r, r the root mean square of what is neither 0 nor an outlier; outliers 2**-8 * |x|"

    def _write(self, values: np.ndarray, positive: bool, step: float, writer: SectionWriter) -> None:
        super()._write(values, positive, step, writer)
        outliers.write(values, self._beyond(values, positive, step), writer)

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        super()._unpack(reader, values)
        places, kept = outliers.read(reader, values.size)
        values[places] = kept

    def _bound(self, values: np.ndarray) -> np.ndarray:
        positive, step = self._step(values)
        bound = np.full(values.size, step * (0.5 + 2.0**-14))
        places = self._beyond(values, positive, step)
        bound[places] = np.abs(values[places].astype(np.float64)) * 2.0**-8
        return bound

    def _beyond(self, values: np.ndarray, positive: bool, step: float) -> np.ndarray:
        most = np.float32(self._range(positive)[0] * step)
        return np.flatnonzero(np.abs(values) > most) if max(values.max(), -values.min()) > most else np.empty(0, np.int64)

    def _step(self, values: np.ndarray) -> tuple[bool, float]:
        return bool(values.min() >= 0), float(np.float32(max(self.signed_step * outliers.spread(values), 2.0**-120)))
