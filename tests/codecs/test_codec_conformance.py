"""What every codec must do. A new codec in the registry is tested by this file without a change to it."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet import wire
from splitnet.codecs import Codec, codec_names, get_codec
from splitnet.codecs.base import as_reals
from splitnet.errors import BadInput, ProtocolError, ReferenceLost
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import DTYPES

CODECS = [get_codec(name) for name in codec_names()]
SIZES = [1, 2, 3, 63, 64, 1000]
LARGE = wire.CHUNK_BYTES // 8  # of many blocks, whatever a codec's blocks are
SEVERAL_LAYOUTS = ["float32", "bfloat16", "int8"]  # what a codec is given has one axis: the layout is `wire`'s business, of whatever type

each_codec = pytest.mark.parametrize("codec", CODECS, ids=codec_names())
each_lossless = pytest.mark.parametrize("codec", [c for c in CODECS if c.lossless], ids=[c.name for c in CODECS if c.lossless])
each_dtype = pytest.mark.parametrize("dtype", sorted(DTYPES))


def takes(codec: Codec, dtype: str) -> bool:
    """A lossless codec takes every element type; another may refuse one, with BadInput."""
    try:
        codec.encode(np.zeros(1, DTYPES[dtype]))
    except BadInput:
        assert not codec.lossless
        return False
    return True


def chunk_of(dtype: str, size: int, seed: int = 0) -> np.ndarray:
    """Values of a normal distribution, as activations have them."""
    values = np.random.default_rng(seed).standard_normal(size) * 3
    return values.astype(DTYPES[dtype]) if dtype != "bool" else values > 0


def decoded(codec: Codec, payload: bytes | bytearray | memoryview, like: np.ndarray) -> np.ndarray:
    out = np.empty_like(like)
    codec.decode(memoryview(payload), out)
    return out


@each_codec
def test_it_is_known_by_its_name(codec: Codec) -> None:
    assert get_codec(codec.name) is codec
    assert codec.name == codec.name.lower()


@each_codec
@each_dtype
def test_round_trip(codec: Codec, dtype: str) -> None:
    if not takes(codec, dtype):
        return
    for size in [*SIZES, LARGE] if dtype in ("float64", "float32", "float16", "bfloat16", "int8") else SIZES:
        chunk = chunk_of(dtype, size)
        before = chunk.tobytes()
        out = decoded(codec, codec.encode(chunk), chunk)
        assert chunk.tobytes() == before, f"encoding leaves a chunk of {size} alone"
        if codec.lossless:
            assert out.tobytes() == before, size
        else:
            assert np.isfinite(out).all(), size


@each_lossless
@given(dtype=st.sampled_from(sorted(DTYPES)), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_lossless_codec_keeps_every_bit(codec: Codec, dtype: str, data: st.DataObject) -> None:
    item = DTYPES[dtype].itemsize
    count = data.draw(st.integers(1, 50))
    raw = np.frombuffer(data.draw(st.binary(min_size=count * item, max_size=count * item)), np.uint8)
    chunk = (raw & 1 if dtype == "bool" else raw).view(DTYPES[dtype])
    assert decoded(codec, codec.encode(chunk), chunk).tobytes() == chunk.tobytes()


@st.composite
def float_chunks(draw: st.DrawFn) -> np.ndarray:
    """Floats with everything that a float may be, in runs, near one another and far apart."""
    dtype = draw(st.sampled_from(["float64", "float32", "float16", "bfloat16", "complex64"]))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 150))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        scale = draw(st.sampled_from([0.0, 1e-320, 1e-44, 1e-39, 1e-7, 1.0, 300.0, 6e4, 3e38, 1e200]))
        shape = draw(st.sampled_from(["normal", "relu", "one value", "few odd"]))
        values = rng.standard_normal(size) if shape != "one value" else np.ones(size)
        values = np.maximum(values, 0) if shape == "relu" else values
        values *= scale
        if shape == "few odd":
            odd = draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 1e300, 3.4e38, -65504.0, 5e-324]), min_size=1, max_size=5))
            values[rng.integers(0, size, len(odd))] = odd
        parts.append(values)
    with np.errstate(all="ignore"):
        chunk = np.concatenate(parts).astype(np.float32 if dtype in ("complex64", "bfloat16") else DTYPES[dtype])
        return chunk.repeat(2).view(DTYPES[dtype]) if dtype == "complex64" else chunk.astype(DTYPES[dtype])


@each_codec
@given(chunk=float_chunks())
@settings(max_examples=40, deadline=None)
def test_the_error_bound_holds_and_what_is_not_finite_stays_so(codec: Codec, chunk: np.ndarray) -> None:
    out = decoded(codec, codec.encode(chunk), chunk)
    true, found = as_reals(chunk), as_reals(out)
    assert true is not None
    assert found is not None
    bound = codec.error_bound(chunk)
    assert bound.shape == true.shape
    assert bound.dtype == np.float64
    finite = np.isfinite(true)
    np.testing.assert_array_equal(found[~finite].astype(np.float64), true[~finite].astype(np.float64))
    error = np.abs(found[finite].astype(np.float64) - true[finite].astype(np.float64))
    assert (error <= bound[finite]).all()
    assert not bound[~finite].any()


@each_codec
@each_dtype
def test_what_is_not_a_float_goes_without_loss(codec: Codec, dtype: str) -> None:
    chunk = chunk_of(dtype, 1000)
    if as_reals(chunk) is None:
        assert decoded(codec, codec.encode(chunk), chunk).tobytes() == chunk.tobytes()
        assert not codec.error_bound(chunk).any()


@each_codec
@pytest.mark.parametrize("dtype", SEVERAL_LAYOUTS)
def test_tensors_of_any_layout_cross_the_wire(codec: Codec, dtype: str) -> None:
    whole = chunk_of(dtype, 4 * 6 * 10).reshape(4, 6, 10)
    for array in (
        whole,
        whole.transpose(2, 0, 1),
        whole[:, ::2, ::3],
        np.broadcast_to(whole[:, :1], (4, 5, 10)),
        whole[:0],
        whole[1, 2, 3],
    ):
        first, *rest = [(pb.TensorChunk.FromString(h.SerializeToString()), p) for h, p in wire.tensor_chunks("x", array, codec.name, 256)]
        assembler = wire.TensorAssembler(first[0])
        for head, payload in (first, *rest):
            assembler.add(head, payload)
        found = assembler.array()
        assert found.shape == array.shape
        assert found.dtype == array.dtype
        if codec.lossless:
            np.testing.assert_array_equal(found, array)


@each_codec
@pytest.mark.parametrize("fill", ["zeros", "one value", "noise"])
def test_what_is_hard_or_easy_to_compress(codec: Codec, fill: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8).view(np.float32)
    chunk = {"zeros": np.zeros(1 << 16, np.float32), "one value": np.full(1 << 16, 1.5, np.float32), "noise": noise}[fill]
    payload = memoryview(codec.encode(chunk))
    assert payload.nbytes <= chunk.nbytes + chunk.nbytes // 64 + 64, "it never blows a chunk up"
    if codec.lossless:
        assert decoded(codec, payload, chunk).tobytes() == chunk.tobytes()


@each_codec
def test_inputs_may_be_read_only_and_anywhere_in_memory(codec: Codec) -> None:
    chunk = chunk_of("float32", 100)
    read_only = np.frombuffer(chunk.tobytes(), np.float32)
    shifted = np.frombuffer(b"x" + chunk.tobytes(), np.uint8)[1:].view(np.float32)
    expected = bytes(codec.encode(chunk))
    assert bytes(codec.encode(read_only)) == expected
    assert bytes(codec.encode(shifted)) == expected


@each_codec
def test_nothing_outside_the_chunk_is_touched(codec: Codec) -> None:
    chunk = chunk_of("float32", 100)
    memory = np.full(300, 7, np.float32)
    codec.decode(memoryview(codec.encode(chunk)), memory[100:200])
    assert (memory[:100] == 7).all()
    assert (memory[200:] == 7).all()


@each_codec
@pytest.mark.parametrize("change", ["cut off", "longer", "empty", "for a smaller chunk", "for a larger chunk"])
def test_a_payload_that_is_not_the_chunks_is_refused(codec: Codec, change: str) -> None:
    payload = bytes(codec.encode(chunk_of("float32", 1000)))
    changed = {
        "cut off": payload[:-1],
        "longer": payload + b"\0",
        "empty": b"",
        "for a smaller chunk": bytes(codec.encode(chunk_of("float32", 999))),
        "for a larger chunk": bytes(codec.encode(chunk_of("float32", 1001))),
    }[change]
    with pytest.raises(ProtocolError, match=codec.name):
        codec.decode(memoryview(changed), np.empty(1000, np.float32))


@each_codec
@given(payload=st.binary(max_size=200), size=st.integers(1, 50), dtype=st.sampled_from(sorted(DTYPES)))
@settings(max_examples=50, deadline=None)
def test_garbage_decodes_or_is_refused(codec: Codec, payload: bytes, size: int, dtype: str) -> None:
    guarded = np.full(size + 2, 1, DTYPES[dtype])
    try:
        codec.decode(memoryview(payload), guarded[1:-1])
    except (ProtocolError, ReferenceLost):
        pass
    except BadInput:
        assert not takes(codec, dtype)
    assert guarded[0] == guarded[-1] == 1


@each_codec
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_flipped_bytes_decode_or_are_refused(codec: Codec, flips: list[tuple[int, int]]) -> None:
    payload = bytearray(codec.encode(chunk_of("float32", 300)))
    for place, change in flips:
        payload[place % len(payload)] ^= change
    guarded = np.full(302, 1, np.float32)
    with contextlib.suppress(ProtocolError, ReferenceLost):
        codec.decode(memoryview(payload), guarded[1:-1])
    assert guarded[0] == guarded[-1] == 1


@each_codec
def test_from_several_threads_at_once(codec: Codec) -> None:
    def use(seed: int) -> bool:
        chunk = chunk_of("float32", 20_000, seed)
        payload = bytes(codec.encode(chunk))
        first = decoded(codec, payload, chunk)
        return all(bytes(codec.encode(chunk)) == payload and np.array_equal(decoded(codec, payload, chunk), first) for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(16)))


def test_an_unknown_codec() -> None:
    with pytest.raises(BadInput, match="codec 'lzma' is not one of raw, zstd"):
        get_codec("lzma")


@each_codec
def test_numbers_of_many_magnitudes(codec: Codec) -> None:
    """Each magnitude stands out from those below it, and is rarer: as many outliers as there can be."""
    rng = np.random.default_rng(0)
    levels = rng.choice(6, 20_000, p=[0.8, 0.04, 0.04, 0.04, 0.04, 0.04])
    chunk = (rng.choice([-1, 1], 20_000) * 50.0**levels).astype(np.float32)
    error = np.abs(decoded(codec, codec.encode(chunk), chunk).astype(np.float64) - chunk)
    assert (error <= codec.error_bound(chunk)).all()


@each_codec
@pytest.mark.parametrize("small", [1e-3, 1e-25, 1e-30, 1e-38, 1e-44])
@pytest.mark.parametrize("large", [1e30, 1e-20])
def test_one_number_far_above_all_others(codec: Codec, small: float, large: float) -> None:
    chunk = np.full(1000, small, np.float32)
    chunk[[3, 700]] = large, -large / 1e5
    error = np.abs(decoded(codec, codec.encode(chunk), chunk).astype(np.float64) - chunk)
    assert (error <= codec.error_bound(chunk)).all()
