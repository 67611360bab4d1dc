"""The wire format of protocol buffers, by hand: enough to write a message canonically and to read one that a stranger wrote.

See https://protobuf.dev/programming-guides/encoding/. Fields are (number, value): a value is an int (a varint), a float (32 bits) or bytes
(texts, messages, packed lists).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["fields", "packed_floats", "packed_varints", "put", "unpacked_floats", "unpacked_varints"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WORD = (1 << 64) - 1


def put(number: int, value: int | float | bytes | str) -> bytes:
    """One field; a negative int as its two's complement of 64 bits."""
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    return _varint(number << 3 | _VARINT) + _varint(value)


def fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields in their order; an int comes back signed. Raises ValueError where the bytes are no message."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            yield number, value - (1 << 64) if value >> 63 else value
        elif kind == _BYTES:
            length, position = _read_varint(data, position)
            if length > len(data) - position:
                raise ValueError(f"field {number} claims {length} bytes, {len(data) - position} are left")
            yield number, data[position : position + length]
            position += length
        elif kind == _FIXED32:
            if len(data) - position < 4:
                raise ValueError(f"field {number} is cut short")
            yield number, float(struct.unpack_from("<f", data, position)[0])
            position += 4
        else:
            raise ValueError(f"field {number} has the wire type {kind}")


def packed_varints(numbers: tuple[int, ...]) -> bytes:
    return b"".join(_varint(number) for number in numbers)


def unpacked_varints(data: bytes) -> tuple[int, ...]:
    """Raises ValueError."""
    numbers, position = [], 0
    while position < len(data):
        value, position = _read_varint(data, position)
        numbers.append(value - (1 << 64) if value >> 63 else value)
    return tuple(numbers)


def packed_floats(numbers: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def unpacked_floats(data: bytes) -> tuple[float, ...]:
    """Raises ValueError."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no list of floats")
    return struct.unpack(f"<{len(data) // 4}f", data)


def _varint(value: int) -> bytes:
    value &= _WORD
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("a number is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _WORD:
                break
            return value, position
    raise ValueError("a number of more than 64 bits")
