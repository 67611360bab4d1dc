"""Frames: the same bytes as protobuf's, both ways, and nothing but ProtocolError for what is not one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet import wire
from splitnet.errors import ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb

names = st.text(max_size=20)
sizes = st.integers(0, (1 << 63) - 1)
tensors = st.builds(
    pb.TensorChunk,
    name=names,
    dtype=names,
    shape=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=4),
    strides=st.lists(sizes, max_size=4),
    stored_bytes=st.integers(0, (1 << 64) - 1),
    codec=names,
    offset=st.integers(0, (1 << 64) - 1),
    length=st.integers(0, (1 << 32) - 1),
)
failures = st.builds(
    pb.Failure, code=st.integers(-(1 << 31), (1 << 31) - 1), message=names, kind=names, retry_after_s=st.floats(allow_nan=False)
)
heads = st.builds(
    pb.Frame,
    request=names,
    deployment=names,
    stage=names,
    ingress=names,
    timeout_s=st.floats(allow_nan=False),
    end=st.booleans(),
    tensor=st.none() | tensors,
    failure=st.none() | failures,
    cancel=st.none() | st.builds(pb.Cancel, reason=names),
)
payloads = st.binary(max_size=300)


@given(heads, payloads)
@settings(max_examples=300, deadline=None)
def test_it_is_protobufs_own_encoding(head: pb.Frame, payload: bytes) -> None:
    plain = pb.Frame()
    plain.CopyFrom(head)
    plain.payload = payload
    ours = wire.encode_frame(wire.Message(head, payload))
    assert pb.Frame.FromString(ours) == plain, "a plain client reads what we write"
    message = wire.decode_frame(plain.SerializeToString())
    assert (message.frame, bytes(message.payload)) == (head, payload), "we read what a plain client writes"
    message = wire.decode_frame(ours)
    assert (message.frame, bytes(message.payload)) == (head, payload)
    assert not message.frame.payload


@given(st.lists(st.tuples(heads, payloads), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_fields_in_any_order_and_repeated(parts: list[tuple[pb.Frame, bytes]]) -> None:
    """Encodings joined end to end are the encoding of their merger: the payload stands in the middle, twice, or empty."""
    data = b""
    for head, payload in parts:
        head.payload = payload
        data += head.SerializeToString() + (b"\x7a\x00" if not payload else b"")
    expected = pb.Frame.FromString(data)
    message = wire.decode_frame(data)
    assert bytes(message.payload) == expected.payload
    expected.ClearField("payload")
    assert message.frame == expected


def test_fields_of_a_later_version_are_kept_out_of_the_way() -> None:
    later = (
        b"\xa0\x06\x07" + b"\xa5\x06abcd" + b"\xa1\x06abcdefgh" + b"\xa2\x06\x03xyz" + b"\xa3\x06\xa4\x06"
    )  # field 100 of every wire type
    data = later + wire.encode_frame(wire.Message(pb.Frame(request="r"), b"payload"))
    for encoded in (data, data + later):
        message = wire.decode_frame(encoded)
        assert (message.frame.request, bytes(message.payload)) == ("r", b"payload")


def test_the_payload_is_not_copied() -> None:
    data = wire.encode_frame(wire.Message(pb.Frame(request="r"), bytes(1000)))
    payload = wire.decode_frame(data).payload
    assert isinstance(payload, memoryview)
    assert payload.obj is data


def test_a_payload_of_wider_elements_is_measured_in_bytes() -> None:
    payload = memoryview(bytes(range(16))).cast("I")
    message = wire.decode_frame(wire.encode_frame(wire.Message(pb.Frame(), payload)))
    assert bytes(message.payload) == bytes(range(16))


def decode_or_refuse(data: bytes) -> wire.Message | None:
    """Nothing else may come out; and what is accepted, protobuf accepts, with the same meaning."""
    try:
        message = wire.decode_frame(data)
    except ProtocolError:
        return None
    expected = pb.Frame.FromString(data)
    assert bytes(message.payload) == expected.payload
    expected.ClearField("payload")
    assert message.frame.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    return message


def test_truncation_at_every_byte() -> None:
    frame = pb.Frame(request="r" * 64, deployment="model", stage="s1", ingress="a", timeout_s=1.5, end=True)
    frame.tensor.CopyFrom(pb.TensorChunk(name="x", dtype="float32", shape=[2, 3], strides=[1, 2], stored_bytes=24, codec="raw", length=24))
    frame.failure.CopyFrom(pb.Failure(code=13, message="m", node="n", retry_after_s=0.5))
    whole = wire.encode_frame(wire.Message(frame, bytes(range(200))))
    shorter = [decode_or_refuse(whole[:size]) for size in range(len(whole))]
    assert sum(message is None for message in shorter) > len(whole) // 2
    assert all(not message.payload for message in shorter if message is not None), "a payload is whole or refused"


@given(st.binary(max_size=400))
@settings(max_examples=3000, deadline=None)
def test_random_bytes(data: bytes) -> None:
    decode_or_refuse(data)


@given(heads, payloads, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5))
@settings(max_examples=500, deadline=None)
def test_flipped_bytes(head: pb.Frame, payload: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(wire.encode_frame(wire.Message(head, payload)))
    for place, byte in changes:
        if data:
            data[place % len(data)] = byte
    decode_or_refuse(bytes(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7a", "cut off inside a number"),
        (b"\x7a\xff", "cut off inside a number"),
        (b"\x7a\x05abc", "needs 2 more bytes"),
        (b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\x7fabc", "more bytes"),
        (b"\xff" * 11, "more than 64 bits"),
        (b"\x0a\x02\xff\xff", "not a valid message"),  # not UTF-8
        (b"\x00\x00", "not a valid message"),  # field number 0
        (b"\x0b" * 10_000, "not a valid message"),  # groups in groups
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        wire.decode_frame(data)
