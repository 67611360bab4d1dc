"""Arrays on the wire: tensors to chunks and back, and the frames that carry them.

Copies per hop of a raw tensor, of each byte: one into the message (`encode_frame`), one into the receiver's tensor
(`TensorAssembler.add`); gRPC makes its own two between these and the socket. Nothing is copied when a frame is parsed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from splitnet.codecs import Buffer, get_codec
from splitnet.errors import BadInput, ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec, aligned_empty, dtype_name, numpy_dtype

__all__ = [
    "CHUNK_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_TENSOR_BYTES",
    "Message",
    "TensorAssembler",
    "decode_frame",
    "encode_frame",
    "spec_from_message",
    "spec_to_message",
    "tensor_chunks",
]

CHUNK_BYTES = 1 << 20  # a multiple of every element size; large enough to hide the cost of a message, small enough to overlap
MAX_MESSAGE_BYTES = 8 << 20
MAX_TENSOR_BYTES = 1 << 30
_MAX_DIMENSIONS = 32
_MAX_STEP = 1 << 59  # in elements; in bytes it fits 64 bits with a sign
_PAYLOAD_TAG = pb.Frame.PAYLOAD_FIELD_NUMBER << 3 | 2  # length-delimited
_PAYLOAD_TAG_BYTES = bytes([_PAYLOAD_TAG])


@dataclass(slots=True)
class Message:
    """A Frame with its payload beside it instead of inside. `frame.payload` is always empty."""

    frame: pb.Frame
    payload: Buffer = b""


# ------------------------------------------------------------------------------------------------------------------ frames


def encode_frame(message: Message) -> bytes:
    """The protobuf encoding of the frame with its payload as the last field: one copy of the payload."""
    head = message.frame.SerializeToString()
    payload = memoryview(message.payload)
    return b"".join((head, _PAYLOAD_TAG_BYTES, _varint(payload.nbytes), payload)) if payload.nbytes else head


def decode_frame(data: bytes) -> Message:
    """The reverse; takes any valid protobuf encoding of a Frame. Where the payload stands last, as it should, it is a view of `data`.
    Raises ProtocolError."""
    start, payload_at = _find_payload(data)
    try:
        frame = pb.Frame.FromString(data[:start] if start >= 0 else data)
    except DecodeError as error:
        raise ProtocolError(f"a frame of {len(data)} bytes is not a valid message: {error}") from None
    payload = memoryview(data)[payload_at:] if start >= 0 else memoryview(frame.payload)
    frame.ClearField("payload")
    return Message(frame, payload)


def _find_payload(data: bytes) -> tuple[int, int]:
    """(start of the payload field, start of its bytes) where the payload is the last field, else (-1, 0). What is odd is left to protobuf."""
    position, size = 0, len(data)
    while position < size:
        start = position
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == 2:
            length, position = _read_varint(data, position)
            if position + length > size:
                raise ProtocolError(f"a frame was cut off: a field needs {position + length - size} more bytes")
            if tag == _PAYLOAD_TAG and position + length == size:
                return start, position
            position += length
        elif kind == 0:
            _, position = _read_varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            break
    return -1, 0


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if position >= len(data):
            raise ProtocolError("a frame was cut off inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ProtocolError("a frame has a number of more than 64 bits")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# ----------------------------------------------------------------------------------------------------------------- tensors


def spec_to_message(spec: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(name=spec.name, dtype=spec.dtype, shape=[str(size) for size in spec.shape])


def spec_from_message(message: pb.TensorSpec) -> TensorSpec:
    """Raises ProtocolError for an element type that this version does not know."""
    shape = tuple(int(size) if size.isascii() and size.isdigit() and len(size) < 19 else size for size in message.shape)
    try:
        return TensorSpec(message.name, message.dtype, shape)
    except BadInput as error:
        raise ProtocolError(error.message, remedy="run the same version of splitnet on both sides") from None


def tensor_chunks(
    name: str, array: np.ndarray, codec: str = "raw", chunk_bytes: int = CHUNK_BYTES, encode: Callable[[np.ndarray], Buffer] | None = None
) -> Iterator[tuple[pb.TensorChunk, Buffer]]:
    """The chunks of a tensor in order, each encoded when it is asked for. At least one chunk, even for an empty tensor.
    `encode`: what the codec does within a stream of frames (`codecs.delta.FrameEncoder.encode`), instead of what it does alone.

    Raises BadInput for a dtype that cannot be sent or an unknown codec. With the raw codec the payloads are views of the array.
    """
    dtype = dtype_name(array.dtype)
    encode = encode or get_codec(codec).encode
    stored, strides = _stored(array)
    per_chunk = max(1, chunk_bytes // array.itemsize)
    head = pb.TensorChunk(name=name, dtype=dtype, shape=array.shape, strides=strides, stored_bytes=stored.nbytes, codec=codec)
    for first in range(0, max(1, stored.size), per_chunk):
        part = stored[first : first + per_chunk]
        head.offset, head.length = first * array.itemsize, part.nbytes
        yield head, encode(part) if part.size else b""
        head = pb.TensorChunk(name=name)


def _stored(array: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The elements in memory order, one-dimensional, and the element strides that rebuild the array from them (() for C order).

    Dense arrays in any order of axes, and broadcast axes (stride 0), keep their layout; others are packed first.
    """
    if array.flags.c_contiguous and array.strides == _c_strides(array.shape, array.itemsize):
        return array.reshape(-1), ()
    if array.size == 0:
        return np.empty(0, array.dtype), ()
    if any(step < 0 or step % array.itemsize for step in array.strides):
        return np.ascontiguousarray(array).reshape(-1), ()
    once = array[tuple(slice(0, 1) if step == 0 else slice(None) for step in array.strides)]
    steps = array.strides
    if not _dense(once.shape, [step // array.itemsize for step in once.strides]):
        once = np.copy(once, order="K")  # gaps or overlaps: pack, in the order that the axes have in memory
        steps = tuple(0 if step == 0 else new for step, new in zip(steps, once.strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(once, (once.size,), (array.itemsize,), writeable=False)
    return flat, tuple(step // array.itemsize for step in steps)


def _dense(shape: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether the elements fill their memory without a gap and without sharing a place. Steps are in elements; of axes of size 1 they
    do not matter."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, steps, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class TensorAssembler:
    """Puts one tensor together from its chunks, which must come in order. Nothing is allocated beyond what the first chunk declares,
    and no more than `max_bytes`."""

    def __init__(
        self, first: pb.TensorChunk, max_bytes: int = MAX_TENSOR_BYTES, decode: Callable[[memoryview, np.ndarray], None] | None = None
    ) -> None:
        """`decode`: instead of what the codec does alone (`codecs.delta.FrameDecoder.decode`). Raises ProtocolError or BadInput for a
        header that is not sound."""
        self.name = first.name
        dtype = numpy_dtype(first.dtype)
        shape, strides = tuple(first.shape), tuple(first.strides)
        if len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
            raise ProtocolError(f"tensor {self.name!r}: shape {shape} is not valid")
        declared = dtype.itemsize * math.prod(max(size, 1) for size in shape)  # an axis of size 0 must not hide one that is absurd
        if max(declared, first.stored_bytes) > max_bytes:
            raise ProtocolError(
                f"tensor {self.name!r}: {max(declared, first.stored_bytes)} bytes are more than the limit of {max_bytes}",
                remedy="send smaller batches, or raise the node's --max-tensor",
            )
        if strides:
            once = [1 if step == 0 else size for size, step in zip(shape, strides, strict=False)]
            sound = len(strides) == len(shape) and all(0 <= step < _MAX_STEP for step in strides)
            if not sound or 0 in shape or not _dense(once, strides):
                raise ProtocolError(f"tensor {self.name!r}: strides {strides} do not fit shape {shape}")
            expected = dtype.itemsize * math.prod(once)
        else:
            expected = dtype.itemsize * math.prod(shape)
        if expected != first.stored_bytes:
            raise ProtocolError(f"tensor {self.name!r}: shape {shape} needs {expected} bytes, {first.stored_bytes} were declared")
        self._decode = decode or get_codec(first.codec).decode
        self._buffer = aligned_empty(first.stored_bytes)
        self._elements = self._buffer.view(dtype)
        self._shape = shape
        self._strides = tuple(step * dtype.itemsize for step in strides) or _c_strides(shape, dtype.itemsize)
        self._filled = 0

    @property
    def size_bytes(self) -> int:
        return self._buffer.nbytes

    def add(self, chunk: pb.TensorChunk, payload: Buffer) -> bool:
        """Decodes a chunk into its place. True once the tensor is complete. Raises ProtocolError."""
        start, end, itemsize = chunk.offset, chunk.offset + chunk.length, self._elements.itemsize
        if chunk.length > MAX_MESSAGE_BYTES:  # or a few bytes that decode to very many would hold up all others
            raise ProtocolError(f"tensor {self.name!r}: a chunk of {chunk.length} bytes; the limit is {MAX_MESSAGE_BYTES}")
        if start != self._filled or end > self._buffer.nbytes or chunk.length % itemsize or (not chunk.length and self._buffer.nbytes):
            raise ProtocolError(
                f"tensor {self.name!r}: chunk [{start}, {end}) does not follow byte {self._filled} of {self._buffer.nbytes}"
            )
        if chunk.length:
            self._decode(memoryview(payload), self._elements[start // itemsize : end // itemsize])
        elif len(payload):
            raise ProtocolError(f"tensor {self.name!r}: {len(payload)} bytes for an empty chunk")
        self._filled = end
        return self.complete

    @property
    def complete(self) -> bool:
        return self._filled == self._buffer.nbytes

    def array(self) -> np.ndarray:
        """The tensor, with the sender's strides, on a 64-byte boundary."""
        return np.ndarray(self._shape, self._elements.dtype, self._buffer, strides=self._strides)
