"""Tensors: the same bits and the same layout on the far side, whatever the codec and the chunks; hostile headers cost nothing."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from splitnet import wire
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput, ProtocolError, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import DTYPES, TensorSpec

LOSSLESS = [name for name in codec_names() if get_codec(name).lossless]


def through_the_wire(array: np.ndarray, codec: str = "raw", chunk_bytes: int = wire.CHUNK_BYTES) -> np.ndarray:
    assembler: wire.TensorAssembler | None = None
    done = False
    for chunk, payload in wire.tensor_chunks("t", array, codec, chunk_bytes):
        message = wire.Message(pb.Frame(tensor=chunk), payload)
        message = wire.decode_frame(wire.encode_frame(message))
        if assembler is None:
            assembler = wire.TensorAssembler(message.frame.tensor)
        assert not done, "nothing follows a complete tensor"
        done = assembler.add(message.frame.tensor, message.payload)
    assert done
    assert assembler is not None
    return assembler.array()


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()  # in C order, whatever the layout


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Every bit pattern, NaN payloads and subnormals included; bool stays 0 or 1."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = rng.integers(0, 256, size, np.uint8)
    return (raw & 1 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


def unaligned(array: np.ndarray) -> np.ndarray:
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    there = buffer[1:].view(array.dtype).reshape(array.shape)
    there[...] = array
    return there


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda a: a,
    "transposed": lambda a: a.T,
    "fortran": np.asfortranarray,
    "last axis to the front": lambda a: np.moveaxis(a, -1, 0) if a.ndim else a,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 1 else a,
    "sliced": lambda a: a[::2] if a.ndim else a,
    "sliced inside": lambda a: a[..., 1:] if a.ndim else a,
    "negative": lambda a: np.flip(a),
    "expanded in front": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "expanded inside": lambda a: np.broadcast_to(a[..., None], (*a.shape, 3)),
    "expanded and transposed": lambda a: np.broadcast_to(a, (3, *a.shape)).T,
    "expanded and sliced": lambda a: np.broadcast_to(a[..., None], (*a.shape, 3))[::2],
    "axes of size one": lambda a: a.T[None, ..., None],
    "one of a large": lambda a: a[:1, None] if a.ndim else a,
    "unaligned": unaligned,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}
KEEPS_STRIDES = {"plain", "transposed", "fortran", "last axis to the front", "channels last", "expanded in front", "expanded inside", "expanded and transposed", "axes of size one", "unaligned", "read-only"}  # fmt: skip


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 6), max_size=5).map(tuple),
    layout=st.sampled_from(sorted(LAYOUTS)),
    codec=st.sampled_from(LOSSLESS),
    chunk_bytes=st.sampled_from([1, 7, 8, 16, 24, 100, 1 << 20]),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=700, deadline=None)
def test_round_trip(dtype: str, shape: tuple[int, ...], layout: str, codec: str, chunk_bytes: int, seed: int) -> None:
    array = LAYOUTS[layout](random_bits(np.random.default_rng(seed), shape, DTYPES[dtype]))
    came = through_the_wire(array, codec, chunk_bytes)
    assert (came.dtype, came.shape) == (array.dtype, array.shape)
    assert bits(came) == bits(array)
    if layout in KEEPS_STRIDES and array.size:
        assert came.strides == array.strides
    if came.size:
        assert came.ctypes.data % 64 == 0
        assert came.flags.writeable


@given(shape=st.lists(st.integers(1, 4), max_size=4).map(tuple), steps=st.lists(st.integers(0, 9), min_size=4, max_size=4))
@settings(max_examples=500, deadline=None)
def test_any_view_at_all(shape: tuple[int, ...], steps: list[int]) -> None:
    """Windows that overlap, gaps, axes in any order: the elements are the same; only what the view shows is sent."""
    memory = np.arange(200, dtype=np.int16)
    view = as_strided(memory, shape, [2 * step for step in steps[: len(shape)]])
    chunks = [(pb.TensorChunk.FromString(chunk.SerializeToString()), bytes(payload)) for chunk, payload in wire.tensor_chunks("t", view)]
    shown = set(view.ravel().tolist())
    sent = np.frombuffer(b"".join(payload for _, payload in chunks), np.int16)
    assert set(sent.tolist()) == shown
    assert sent.size <= view.size
    assert bits(through_the_wire(view)) == bits(view)


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("size", [1, wire.CHUNK_BYTES // 4 - 1, wire.CHUNK_BYTES // 4, wire.CHUNK_BYTES // 4 + 1, wire.CHUNK_BYTES])
def test_chunk_boundaries(codec: str, size: int) -> None:
    array = random_bits(np.random.default_rng(size), (size,), DTYPES["float32"])
    assert bits(through_the_wire(array, codec)) == bits(array)
    assert sum(1 for _ in wire.tensor_chunks("t", array, codec)) == -(-array.nbytes // wire.CHUNK_BYTES)


def test_a_broadcast_axis_is_sent_once() -> None:
    array = np.broadcast_to(np.arange(1000, dtype=np.float32), (500, 1000))
    assert sum(len(payload) for _, payload in wire.tensor_chunks("t", array)) == 4000


def test_an_empty_tensor_and_a_scalar() -> None:
    assert through_the_wire(np.empty((0, 3, 0), np.float32)).shape == (0, 3, 0)
    assert through_the_wire(np.array(7, np.int64)) == 7


def test_what_cannot_be_sent() -> None:
    for array in (np.array(["a"]), np.array([object()]), np.zeros(1, ">f4"), np.zeros(1, "M8[s]"), np.zeros(1, np.float128)):
        with pytest.raises(BadInput, match="cannot be sent"):
            next(wire.tensor_chunks("t", array))
    with pytest.raises(BadInput, match="codec 'lzma' is not one of raw"):
        next(wire.tensor_chunks("t", np.zeros(1), "lzma"))


@given(st.lists(st.integers(0, 10**30) | st.text(max_size=5), max_size=4))
def test_specs(shape: list[int | str]) -> None:
    message = pb.TensorSpec(name="x", dtype="int8", shape=[str(size) for size in shape])
    spec = wire.spec_from_message(message)
    assert wire.spec_to_message(spec) == message
    known = TensorSpec("x", "int8", ("batch", 3, "2*batch"))
    assert wire.spec_from_message(wire.spec_to_message(known)) == known


# --------------------------------------------------------------------------------------------------------------- hostile peers


def header(**changes: Any) -> pb.TensorChunk:
    fields: dict[str, Any] = {"name": "t", "dtype": "float32", "shape": [2, 3], "stored_bytes": 24, "codec": "raw", "length": 24}
    return pb.TensorChunk(**(fields | changes))


HUGE = 1 << 62
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "huge shape": ({"shape": [HUGE, HUGE], "stored_bytes": 24}, "more than the limit"),
    "huge shape, hidden by an empty axis": ({"shape": [0, HUGE, HUGE], "stored_bytes": 0, "length": 0}, "more than the limit"),
    "huge stored_bytes": ({"stored_bytes": (1 << 64) - 1}, "more than the limit"),
    "just over the limit": (
        {"shape": [1 + (wire.MAX_TENSOR_BYTES >> 2)], "stored_bytes": wire.MAX_TENSOR_BYTES + 4},
        "more than the limit",
    ),
    "huge by broadcasting": ({"shape": [1 << 40, 3], "strides": [0, 1], "stored_bytes": 12}, "more than the limit"),
    "negative axis": ({"shape": [-2, -3]}, "shape .* is not valid"),
    "many axes": ({"shape": [1] * 33, "stored_bytes": 4}, "shape .* is not valid"),
    "stored_bytes too small": ({"stored_bytes": 20}, "needs 24 bytes, 20 were declared"),
    "stored_bytes too large": ({"stored_bytes": 28}, "needs 24 bytes, 28 were declared"),
    "negative strides": ({"strides": [-3, 1]}, "strides .* do not fit"),
    "strides with a gap": ({"strides": [4, 1], "stored_bytes": 28}, "strides .* do not fit"),
    "overlapping strides": ({"shape": [2, 2], "strides": [1, 1], "stored_bytes": 12}, "strides .* do not fit"),
    "overlap that adds up": ({"shape": [2, 2, 2], "strides": [1, 1, 5], "stored_bytes": 32}, "strides .* do not fit"),
    "too few strides": ({"strides": [1]}, "strides .* do not fit"),
    "too many strides": ({"strides": [3, 1, 1]}, "strides .* do not fit"),
    "strides of an empty tensor": ({"shape": [0, 3], "strides": [3, 1], "stored_bytes": 0, "length": 0}, "strides .* do not fit"),
    "strides that overflow": ({"shape": [1, 6], "strides": [HUGE, 1]}, "strides .* do not fit"),
    "unknown dtype": ({"dtype": "float8"}, "element type 'float8' is not one of"),
    "python's own dtype": ({"dtype": "object"}, "element type 'object' is not one of"),
    "unknown codec": ({"codec": "pickle"}, "codec 'pickle' is not one of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_before_anything_is_allocated(case: str) -> None:
    changes, message = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises((ProtocolError, BadInput), match=message):
            wire.TensorAssembler(header(**changes))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


ANY = st.sampled_from([0, 1, 2, 3, 4, 6, 7, 24, 100, 1 << 31, 1 << 40, HUGE])


@given(
    shape=st.lists(ANY | ANY.map(lambda n: -n), max_size=4),
    strides=st.lists(ANY | ANY.map(lambda n: -n), max_size=4),
    stored=ANY,
    dtype=st.sampled_from(sorted(DTYPES)),
    chunks=st.lists(st.tuples(ANY, ANY.map(lambda n: n & 0xFFFFFFFF), st.binary(max_size=64)), max_size=3),
    codec=st.sampled_from(codec_names()),
)
@settings(max_examples=1000, deadline=None)
def test_any_header_and_chunks(shape: Any, strides: Any, stored: int, dtype: str, chunks: Any, codec: str) -> None:
    first = pb.TensorChunk(name="t", dtype=dtype, shape=shape, strides=strides, stored_bytes=stored, codec=codec)
    try:
        assembler = wire.TensorAssembler(first, max_bytes=1000)
        assert assembler.size_bytes == stored <= 1000
        array = assembler.array()  # the layout is sound even before it is filled
        assert list(array.shape) == shape
        for offset, length, payload in chunks:
            assembler.add(pb.TensorChunk(name="t", offset=offset, length=length), payload)
    except (ProtocolError, BadInput):
        pass


@pytest.mark.parametrize("order", [p for p in itertools.permutations(range(3)) if p != (0, 1, 2)])
def test_chunks_in_another_order(order: tuple[int, ...]) -> None:
    sent = [
        (pb.TensorChunk.FromString(c.SerializeToString()), bytes(p))
        for c, p in wire.tensor_chunks("t", np.arange(6, dtype=np.float32), "raw", 8)
    ]
    assembler = wire.TensorAssembler(sent[0][0])

    def add_all() -> None:
        for place in order:
            assembler.add(*sent[place])

    with pytest.raises(ProtocolError, match="does not follow byte"):
        add_all()


def test_chunks_that_do_not_fit() -> None:
    for chunk, payload, message in (
        (header(length=23), bytes(23), "does not follow"),  # half an element
        (header(length=28), bytes(28), "does not follow"),  # past the end
        (header(length=0), b"", "does not follow"),  # nothing, for ever
        (header(offset=4, length=20), bytes(20), "does not follow"),
        (header(length=24), bytes(20), "expected 24 bytes, got 20"),
        (header(length=20), bytes(24), "expected 20 bytes, got 24"),
        (header(length=(1 << 32) - 4), b"", "the limit is"),
    ):
        with pytest.raises(ProtocolError, match=message):
            wire.TensorAssembler(header()).add(chunk, payload)
    empty = wire.TensorAssembler(header(shape=[0], stored_bytes=0))
    with pytest.raises(ProtocolError, match="5 bytes for an empty chunk"):
        empty.add(header(shape=[0], stored_bytes=0, length=0), bytes(5))


def section(frame: bytes) -> bytes:
    """The first plane of a chunk in the codec "zstd"; 1024 bytes must come out of it."""
    return b"\0" + (len(frame) << 1 | 1).to_bytes(4, "little") + frame


def bomb(size: int, declare: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=19, write_content_size=declare).compress(bytes(size))


BOMBS: dict[str, bytes] = {
    "declares more than the chunk": bomb(256 << 20),
    "does not say how much it holds": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20)),
    "two frames": bomb(1024) + bomb(64 << 20),
    "a frame and a half": bomb(1024) + bomb(1024)[:5],
    "a skippable frame in front": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + bomb(1024),
    "declares less": bomb(1023),
    "cut off": bomb(1024)[:-1],
    "not zstd": b"\x28\xb5\x2f\xfd" + b"\xff" * 50,
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_costs_no_more_than_its_chunk(case: str) -> None:
    assembler = wire.TensorAssembler(header(shape=[1024], stored_bytes=4096, codec="zstd"))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="zstd chunk"):
            assembler.add(header(length=4096), section(BOMBS[case]))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_declaring_the_chunks_size_and_holding_more() -> None:
    """The content size in the frame's header is a claim of the sender's."""
    frame = bytearray(bomb(1 << 20))
    honest = zstandard.frame_content_size(bytes(frame))
    at = bytes(frame).index(honest.to_bytes(4, "little"))
    frame[at : at + 4] = (1024).to_bytes(4, "little")
    assert zstandard.frame_content_size(bytes(frame)) == 1024
    with pytest.raises(SplitnetError, match="zstd chunk"):
        wire.TensorAssembler(header(shape=[1024], stored_bytes=4096, codec="zstd")).add(header(length=4096), section(bytes(frame)))
