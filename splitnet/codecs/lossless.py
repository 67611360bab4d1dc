from __future__ import annotations

from typing import ClassVar

import numpy as np
import zstandard

from splitnet.codecs.base import Buffer
from splitnet.errors import ProtocolError

__all__ = ["ShuffleZstd"]

_LEVEL = 1  # level 3 gains under 2% on activations and costs a third of the speed


class ShuffleZstd:
    """Byte shuffle, then Zstandard: all first bytes of the elements, then all second bytes, and so on, so that the slowly varying
    exponents stand together (the shuffle filter of HDF5 and Blosc; Zstandard is RFC 8878)."""

    name: ClassVar[str] = "zstd"
    lossless: ClassVar[bool] = True

    def encode(self, chunk: np.ndarray) -> Buffer:
        planes = chunk.view(np.uint8).reshape(-1, chunk.itemsize).T
        return zstandard.ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(planes).data)

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        try:
            declared = zstandard.frame_content_size(payload)
            if declared != out.nbytes:
                raise ProtocolError(f"zstd chunk: the frame declares {declared} bytes, the tensor has room for {out.nbytes}")
            planes = zstandard.ZstdDecompressor().decompress(payload, max_output_size=out.nbytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"zstd chunk: {error}") from None
        if len(planes) != out.nbytes:
            raise ProtocolError(f"zstd chunk: expected {out.nbytes} bytes, got {len(planes)}")
        elements = out.view(np.uint8).reshape(-1, out.itemsize)
        for place, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(out.itemsize, -1)):
            elements[:, place] = plane  # plane by plane: five times as fast as one transposed copy
