"""The few numbers that stand so far out that a scale for them would leave nothing to the others: sent beside the codes, as bfloat16."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from splitnet.codecs import planes
from splitnet.codecs.codes import blocks
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["MOST", "read", "spread", "write"]

MOST = 1 / 5  #: of all numbers: each round of `spread`, and what is then called an outlier, is less than one in 25
_FAR = 5.0
_ROUNDS = 4


def write(values: np.ndarray, places: np.ndarray, writer: SectionWriter) -> None:
    """How many, how far each stands from the one before, and they."""
    writer.number(places.size)
    writer.add(np.diff(places, prepend=0).astype("<u4"))
    planes.pack(values[places].astype(ml_dtypes.bfloat16), writer)


def read(reader: SectionReader, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(the places, the numbers)."""
    count = reader.number(int(size * MOST))
    places = np.cumsum(reader.take(4 * count).view("<u4"), dtype=np.int64)
    if count and places[-1] >= size:
        raise reader.wrong(f"an outlier at {places[-1]} of {size}")
    kept = np.empty(count, ml_dtypes.bfloat16)
    planes.unpack(reader, kept)
    return places, kept


def spread(values: np.ndarray) -> float:
    """The root mean square of the numbers that are neither zero nor more than five times as far from zero (the largest, where all are below 2**-60).
    A handful of channels a thousand times as large as the rest would else decide it alone."""
    far = float(max(values.max(), -values.min()))
    if far < 2.0**-60:
        return far  # their squares would be zero
    found = 0.0
    for _ in range(_ROUNDS):
        squares, count = 0.0, 0
        for block in blocks(values.size):
            scaled = values[block] * np.float32(1 / far)
            if found:
                scaled[np.abs(scaled) > 1] = 0
            squares += float(np.einsum("i,i->", scaled, scaled))
            count += int(np.count_nonzero(scaled))
        if not squares:  # what is left is more than nineteen orders of magnitude below
            break
        found = far * (squares / count) ** 0.5
        if far <= _FAR * found * (1 + 2.0**-20) or found < 2.0**-60:
            break
        far = _FAR * found
    return found
