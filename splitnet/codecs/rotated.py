"""Four bits after a rotation, for the activations of transformers.

Blocks of 128 neighbours are multiplied with a Hadamard matrix: what stood out is spread over the block, whose numbers are then alike and
share one scale (QuaRot, Ashkboos et al. 2024, does so to weights and activations inside a model). A few channels of a transformer's hidden state are
ten times as large as the others: they would still be spread as noise over their block, so what exceeds five times the root mean square
is kept as it is, as bfloat16, and taken out before.
"""

from __future__ import annotations

from typing import ClassVar

import ml_dtypes
import numpy as np

from splitnet.codecs import outliers, planes
from splitnet.codecs.codes import from_scales, pack_codes, packed_bytes, to_scales, unpack_codes
from splitnet.codecs.lossy import Lossy
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["Hadamard4", "Hadamard4Zstd", "hadamard"]

_BLOCK = 128
_ROWS = 256  # blocks at a time: they stay in the second-level cache
_PRODUCT_ROWS = 16  # OpenBLAS keeps products of this size to one thread; with more, its threads spin and are in the engine's way
_OUTLIER = 5.0


def hadamard(size: int) -> np.ndarray:
    """The orthonormal symmetric Hadamard matrix (Sylvester's); `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    orthonormal: np.ndarray = (matrix / np.sqrt(size)).astype(np.float32)
    return orthonormal


_MATRIX = hadamard(_BLOCK)


class Hadamard4(Lossy):
    """How many outliers, how far each stands from the one before, and they as bfloat16; the blocks' scales as bfloat16; the codes."""

    name: ClassVar[str] = "had4"
    bound: ClassVar[str] = "for a block of 128 without its outliers: its 2-norm * 0.82, and usually a tenth of it; outliers 2**-8 * |x|"

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        places = _outliers(values)
        outliers.write(values, places, writer)
        blocks = _blocks_without(values, places)
        codes = np.empty(blocks.size, np.uint8)
        scales = np.empty(len(blocks), ml_dtypes.bfloat16)
        for first in range(0, len(blocks), _ROWS):
            turned = _turned(blocks[first : first + _ROWS])
            peaks = np.maximum(turned.max(axis=1), -turned.min(axis=1))
            scales[first : first + _ROWS] = to_scales(peaks / np.float32(7))
            turned *= (np.float32(1) / from_scales(scales[first : first + _ROWS]))[:, None]
            turned += np.float32(8.5)
            codes[first * _BLOCK : first * _BLOCK + turned.size] = turned.reshape(-1)  # it is positive: to cut off is to round
        writer.add(scales, compress=False) if not self.entropy else planes.pack(scales, writer)
        writer.add(pack_codes(codes, 4), compress=self.entropy)

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        places, kept = outliers.read(reader, values.size)
        rows = -(-values.size // _BLOCK)
        scales = np.empty(rows, ml_dtypes.bfloat16)
        if self.entropy:
            planes.unpack(reader, scales)
        else:
            scales.view(np.uint8)[:] = reader.take(scales.nbytes)
        codes = unpack_codes(reader.take(packed_bytes(rows * _BLOCK, 4)), 4, rows * _BLOCK).reshape(rows, _BLOCK)
        steps = from_scales(scales)
        for first in range(0, rows, _ROWS):
            turned = np.subtract(codes[first : first + _ROWS], np.float32(8), dtype=np.float32)
            turned *= steps[first : first + _ROWS, None]
            part = values[first * _BLOCK : (first + _ROWS) * _BLOCK]
            part[:] = _turned(turned).reshape(-1)[: part.size]
        values[places] = kept

    def _bound(self, values: np.ndarray) -> np.ndarray:
        places = _outliers(values)
        blocks = _blocks_without(values, places)
        turned = blocks.astype(np.float64) @ _MATRIX.astype(np.float64)
        steps = np.maximum(np.abs(turned).max(axis=1) / 7 * (1 + 2.0**-7), 2.0**-126)
        norm = _BLOCK**0.5 * steps / 2 * (1 + 2.0**-10) + 2.0**-18 * np.linalg.norm(blocks.astype(np.float64), axis=1)
        bound = np.repeat(norm, _BLOCK)[: values.size]
        bound[places] = 2.0**-8 * np.abs(values[places].astype(np.float64)) + 2.0**-134
        return bound


class Hadamard4Zstd(Hadamard4):
    name: ClassVar[str] = "had4-zstd"
    entropy: ClassVar[bool] = True


def _turned(blocks: np.ndarray) -> np.ndarray:
    """Each block times the matrix; twice is the block again."""
    turned = np.empty_like(blocks)
    for first in range(0, len(blocks), _PRODUCT_ROWS):
        np.matmul(blocks[first : first + _PRODUCT_ROWS], _MATRIX, out=turned[first : first + _PRODUCT_ROWS])
    return turned


def _outliers(values: np.ndarray) -> np.ndarray:
    limit = np.float32(_OUTLIER * outliers.spread(values))
    return np.flatnonzero(np.abs(values) > limit) if 0 < limit < max(values.max(), -values.min()) else np.empty(0, np.int64)


def _blocks_without(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(blocks, 128): a copy with zeros where the outliers are, and after the last number."""
    blocks = np.zeros((-(-values.size // _BLOCK), _BLOCK), np.float32)
    flat = blocks.reshape(-1)
    flat[: values.size] = values
    flat[places] = 0
    return blocks
