"""A narrower float: bfloat16 (8 bits of precision, the range of float32) and float16 (11 bits, up to 65504)."""

from __future__ import annotations

from typing import ClassVar

import ml_dtypes
import numpy as np

from splitnet.codecs import planes
from splitnet.codecs.lossy import Lossy
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["BFloat16", "BFloat16Zstd", "Float16", "Float16Zstd"]


class _Cast(Lossy):
    """Rounds to the nearest. What has two bytes already goes without loss."""

    carries_infinities: ClassVar[bool] = True
    narrow: ClassVar[np.dtype]
    relative: ClassVar[float]
    absolute: ClassVar[float]

    def _smaller(self, reals: np.ndarray) -> bool:
        return reals.itemsize > self.narrow.itemsize

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        narrow = values.astype(self.narrow)
        if self.entropy:
            planes.pack(narrow, writer)
        else:
            writer.add(narrow, compress=False)

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        narrow = np.empty(values.size, self.narrow)
        if self.entropy:
            planes.unpack(reader, narrow)
        else:
            narrow.view(np.uint8)[:] = reader.take(narrow.nbytes)  # to an aligned address: casting from any other is slower than this copy
        np.copyto(values, narrow)

    def _bound(self, values: np.ndarray) -> np.ndarray:
        bound: np.ndarray = self.relative * np.abs(values.astype(np.float64)) + self.absolute
        return bound


class BFloat16(_Cast):
    name: ClassVar[str] = "bf16"
    default: ClassVar[bool] = True
    bound: ClassVar[str] = "2**-8 * |x| + 2**-134"
    narrow: ClassVar[np.dtype] = np.dtype(ml_dtypes.bfloat16)
    limit: ClassVar[float] = 2.0**127
    relative: ClassVar[float] = 2.0**-8
    absolute: ClassVar[float] = 2.0**-134


class BFloat16Zstd(BFloat16):
    name: ClassVar[str] = "bf16-zstd"
    entropy: ClassVar[bool] = True


class Float16(_Cast):
    name: ClassVar[str] = "fp16"
    default: ClassVar[bool] = True
    bound: ClassVar[str] = "2**-11 * |x| + 2**-25"
    narrow: ClassVar[np.dtype] = np.dtype(np.float16)
    limit: ClassVar[float] = 65504.0
    relative: ClassVar[float] = 2.0**-11
    absolute: ClassVar[float] = 2.0**-25


class Float16Zstd(Float16):
    name: ClassVar[str] = "fp16-zstd"
    default: ClassVar[bool] = False  # numpy's cast and the entropy coder together are below 500 MB/s on zeros
    entropy: ClassVar[bool] = True
