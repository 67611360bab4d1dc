"""A payload of several sections, each of which is compressed where that makes it smaller.

Section: a little-endian uint32, the stored bytes * 2 + (1 if compressed), then the stored bytes: a Zstandard frame (RFC 8878) or the
bytes as they are. How many bytes come out is never taken from the payload alone: the reader says what it expects.
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import zstandard

from splitnet.codecs.base import Buffer
from splitnet.errors import ProtocolError

__all__ = ["SectionReader", "SectionWriter"]

_HEAD = struct.Struct("<I")
_MIN_BYTES = 32  # below it a frame's own bytes cost more than they save


class _Tools(threading.local):
    """Compressors hold tables that take longer to make than a small chunk to compress; they are not safe to share between threads."""

    def __init__(self) -> None:
        # What is left of floats after the planes are parted has no repetitions worth a search, only frequencies: with the smallest hash
        # table and long matches nearly all is left to the Huffman coder, and comes out smaller and two to four times as fast as at level 1.
        entropy = zstandard.ZstdCompressionParameters(
            window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=zstandard.STRATEGY_FAST
        )
        self.entropy = zstandard.ZstdCompressor(compression_params=entropy)
        self.repeats = zstandard.ZstdCompressor(level=1)  # level 3 gains under 2% and costs a third of the speed
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


class SectionWriter:
    def __init__(self, *first: bytes) -> None:
        self._parts: list[Buffer] = list(first)

    def add(self, values: np.ndarray, *, repeats: bool = False, compress: bool = True) -> None:
        """`values` is contiguous. `repeats`: look for repetitions as well as for frequencies (integers, masks)."""
        stored: Buffer = memoryview(values.reshape(-1).view(np.uint8))
        compressed = False
        if compress and values.nbytes >= _MIN_BYTES:
            tool = _tools.repeats if repeats else _tools.entropy
            smaller = tool.compress(stored)
            if compressed := len(smaller) < values.nbytes:
                stored = smaller
        self._parts += [_HEAD.pack(len(stored) << 1 | compressed), stored]

    def byte(self, value: int) -> None:
        self._parts.append(bytes((value,)))

    def plain(self, value: bytes) -> None:
        self._parts.append(value)

    def number(self, value: int) -> None:
        self._parts.append(_HEAD.pack(value))

    @property
    def size_bytes(self) -> int:
        return sum(len(part) for part in self._parts)

    def payload(self) -> bytes:
        return b"".join(self._parts)


class SectionReader:
    """Raises ProtocolError, which names the codec, for whatever is not as expected."""

    def __init__(self, codec: str, payload: memoryview) -> None:
        self._codec = codec
        self._rest = payload

    def take(self, size_bytes: int) -> np.ndarray:
        """The next section as uint8, which must hold that many bytes. It may be a view of the payload, at any address, and read-only."""
        stored, compressed = self._next()
        if not compressed:
            if len(stored) != size_bytes:
                raise self.wrong(f"a section has {len(stored)} bytes, expected {size_bytes}")
            return np.frombuffer(stored, np.uint8)
        try:
            declared = zstandard.frame_content_size(stored)
            if declared != size_bytes:
                raise self.wrong(f"a section declares {declared} bytes, expected {size_bytes}")
            found = _tools.decompressor.decompress(stored, max_output_size=size_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self.wrong(str(error)) from None
        if len(found) != size_bytes:
            raise self.wrong(f"a section holds {len(found)} bytes, expected {size_bytes}")
        return np.frombuffer(found, np.uint8)

    def byte(self) -> int:
        if not self._rest:
            raise self.wrong("cut off")
        value, self._rest = self._rest[0], self._rest[1:]
        return value

    def plain(self, size_bytes: int) -> bytes:
        if size_bytes > len(self._rest):
            raise self.wrong("cut off")
        value, self._rest = self._rest[:size_bytes].tobytes(), self._rest[size_bytes:]
        return value

    def number(self, most: int) -> int:
        """An uint32 that may be `most` at the most."""
        if len(self._rest) < _HEAD.size:
            raise self.wrong("cut off")
        (value,) = _HEAD.unpack_from(self._rest)
        self._rest = self._rest[_HEAD.size :]
        if value > most:
            raise self.wrong(f"a count of {value}; at most {most} are possible")
        return int(value)

    def rest(self, size_bytes: int) -> np.ndarray:
        """All that is left, which must be that many bytes."""
        if len(self._rest) != size_bytes:
            raise self.wrong(f"expected {size_bytes} bytes, got {len(self._rest)}")
        stored, self._rest = self._rest, self._rest[size_bytes:]
        return np.frombuffer(stored, np.uint8)

    def end(self) -> None:
        if len(self._rest):
            raise self.wrong(f"{len(self._rest)} bytes too many")

    def wrong(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self._codec} chunk: {what}")

    def _next(self) -> tuple[memoryview, bool]:
        head = self.number(0xFFFFFFFF)
        size = head >> 1
        if size > len(self._rest):
            raise self.wrong("cut off")
        stored, self._rest = self._rest[:size], self._rest[size:]
        return stored, bool(head & 1)
