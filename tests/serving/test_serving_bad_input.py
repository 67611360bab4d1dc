"""What a client may get wrong: each is refused by name, and neither the stream nor the other requests on it notice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from raw_stream import RawStream
from small_models import Split, at_rest, diamond, split, stages_by

from nodes.testing import LocalCluster
from splitnet.channel import FORWARD_METHOD
from splitnet.errors import AlreadyExists, BadInput, DeadlineExceeded, NotFound, Overloaded, ProtocolError, SplitnetError
from splitnet.install import deploy
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import tensor_chunks

MAX_TENSOR = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3, max_tensor_bytes=MAX_TENSOR, buffer_bytes=4 * MAX_TENSOR) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    cut = split(diamond(), cluster.cluster(), tmp_path_factory.mktemp("shards"), stages_by(a="linear relu", b="linear_1 tanh", c="*"))
    deploy(cut.plan, cut.shards, name="diamond")
    return cut


@pytest.fixture
async def stream(cluster: LocalCluster, served: Split) -> AsyncIterator[RawStream]:
    """A stream that must still work after the test, on nodes that must hold nothing then."""
    async with RawStream(served.address) as opened:
        yield opened
        inputs = served.inputs(3)
        await opened.send_inputs("afterwards", inputs)
        answer = await opened.answer("afterwards")
        assert isinstance(answer, dict), answer
        assert all(np.array_equal(answer[name], value) for name, value in served.whole(inputs).items())
    at_rest(cluster)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


WRONG = {
    "name": ({"x": floats(2, 16), "z": floats(2, 16)}, "no input 'z'", "x, y"),
    "dtype": ({"x": floats(2, 16).astype(np.float64)}, "input 'x': expected float32, got float64", "astype"),
    "rank": ({"x": floats(2, 16, 1)}, "expected 2 dimensions", ""),
    "size": ({"x": floats(2, 17)}, "dimension 1 must be 16, got 17", ""),
    "different batches": ({"x": floats(2, 16), "y": floats(3, 16)}, "'batch' is 2 in another input", "same batch"),
    "empty batch": ({"x": floats(0, 16)}, "dimension 0 is empty", "at least one"),
    "missing": ({"y": floats(2, 16)}, "input 'x' is missing", "every input"),
    "twice": ({"x": floats(2, 16)}, "input 'x' was sent twice", ""),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_inputs_are_named(stream: RawStream, case: str) -> None:
    inputs, message, remedy = WRONG[case]
    if case == "twice":
        await stream.send_inputs("wrong", inputs, end=False)
    await stream.send_inputs("wrong", inputs)
    error = await stream.answer("wrong")
    assert isinstance(error, BadInput)
    assert message in error.message
    assert remedy in error.remedy
    assert (error.node, error.request) == ("a", "wrong")


async def test_a_tensor_larger_than_the_limit(stream: RawStream) -> None:
    await stream.send_inputs("large", {"x": floats(MAX_TENSOR // 64 + 1, 16)})
    error = await stream.answer("large")
    assert isinstance(error, ProtocolError)
    assert f"{MAX_TENSOR + 64} bytes are more than the limit of {MAX_TENSOR}" in error.message
    assert "--max-tensor" in error.remedy


async def test_more_tensors_than_the_node_has_room_for(stream: RawStream) -> None:
    """Each request leaves its last input out, so nothing is run and nothing is freed: the fifth finds no room."""
    for i in range(4):
        await stream.send_inputs(f"held-{i}", {"x": floats(MAX_TENSOR // 64, 16)}, end=False)
    await stream.send_inputs("fifth", {"x": floats(MAX_TENSOR // 64, 16)}, end=False)
    error = await stream.answer("fifth")
    assert isinstance(error, Overloaded)
    assert error.retry_after_s > 0
    assert "does not fit" in error.message
    for i in range(4):
        await stream.send(request=f"held-{i}", cancel=pb.Cancel())


def header(**changes: Any) -> pb.TensorChunk:
    head, _ = next(tensor_chunks("x", floats(2, 16)))
    for name, value in changes.items():
        if isinstance(value, list):
            head.ClearField(name)
            getattr(head, name).extend(value)
        else:
            setattr(head, name, value)
    return head


HOSTILE = {
    "no header": (pb.TensorChunk(name="x", offset=0, length=128), bytes(128), "first chunk is missing"),
    "an unknown dtype": (header(dtype="object"), bytes(128), "'object' is not one of"),
    "an unknown codec": (header(codec="pickle"), bytes(128), "'pickle' is not one of"),
    "another size than its shape's": (header(stored_bytes=1 << 19), bytes(128), "needs 128 bytes"),
    "a shape of more than memory": (header(shape=[1 << 40, 1 << 40], stored_bytes=1 << 19), bytes(128), "more than the limit"),
    "a negative shape": (header(shape=[-2, -16]), bytes(128), "not valid"),
    "strides that reach outside": (header(strides=[1000, 1]), bytes(128), "do not fit"),
    "a chunk that starts elsewhere": (header(offset=64), bytes(128), "does not follow"),
    "a chunk that goes too far": (header(length=256), bytes(256), "does not follow"),
    "fewer bytes than it says": (header(), bytes(127), "expected 128 bytes, got 127"),
    "bytes that are not of its codec": (header(codec="zstd"), b"\x28\xb5\x2f\xfd" + bytes(40), "zstd chunk"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_chunks_fail_their_request_only(stream: RawStream, case: str) -> None:
    head, payload, message = HOSTILE[case]
    await stream.send(payload, request="hostile", tensor=head, end=True)
    error = await stream.answer("hostile")
    assert isinstance(error, SplitnetError)
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "expected", "message"),
    [
        ({"deployment": "nowhere"}, NotFound, "no deployment 'nowhere' here; this node takes requests for: diamond"),
        ({"timeout_s": -1.0}, DeadlineExceeded, "had run out"),
        ({"timeout_s": float("nan")}, BadInput, "timeout_s is nan"),
        ({"timeout_s": float("inf")}, BadInput, "timeout_s is inf"),
        ({"timeout_s": 1e-9}, DeadlineExceeded, "time ran out"),
        ({"end": True}, BadInput, "input 'x' is missing"),
    ],
)
async def test_wrong_frames_are_answered(stream: RawStream, fields: dict[str, Any], expected: type[SplitnetError], message: str) -> None:
    await stream.send(request="wrong", **fields)
    error = await stream.answer("wrong")
    assert isinstance(error, expected)
    assert message in error.message


async def test_an_id_that_is_in_use(stream: RawStream) -> None:
    await stream.send_inputs("same", {"x": floats(2, 16)}, end=False)
    await stream.send_inputs("same", {"y": floats(2, 16)})
    await stream.send_inputs("same", {"x": floats(2, 16)})
    first = await stream.answer("same")
    if isinstance(first, dict):  # it was answered before the second one came, whose id was free again then
        first = await stream.answer("same")
        assert isinstance(first, BadInput)
    else:
        assert isinstance(first, AlreadyExists)


async def test_a_client_at_the_wrong_node_is_told_the_right_one(cluster: LocalCluster, served: Split) -> None:
    async with RawStream(cluster.addresses["b"]) as stream:
        await stream.send(request="lost", deployment="diamond")
        error = await stream.answer("lost")
    assert isinstance(error, NotFound)
    assert served.address in error.remedy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\xff", "cut off"),
        (b"\x0a\x04\xff\xff\xff\xff", "not a valid message"),
        (bytes(200), "wire type|not a valid|is not 1 to 64"),
        (pb.Frame(request="../etc").SerializeToString(), "is not 1 to 64 characters"),
        (pb.Frame(request="x" * 65).SerializeToString(), "is not 1 to 64 characters"),
    ],
)
async def test_bytes_that_are_no_frame_end_their_stream_only(
    cluster: LocalCluster, served: Split, stream: RawStream, data: bytes, message: str
) -> None:
    async with RawStream(served.address) as bad:
        await bad.call.write(data)
        with pytest.raises(grpc.RpcError, match=message) as caught:
            await bad.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_over_the_limit_ends_its_stream_only(stream: RawStream, served: Split) -> None:
    async def send_too_much(bad: RawStream) -> None:
        await bad.call.write(bytes((8 << 20) + 1))
        await bad.read()

    async with RawStream(served.address) as bad:
        with pytest.raises(grpc.RpcError) as caught:
            await send_too_much(bad)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


FORWARDED = {
    "an unknown deployment": ({"deployment": "nowhere", "ingress": "a", "stage": "stage1"}, "does not serve deployment 'nowhere'"),
    "another ingress": ({"deployment": "diamond", "ingress": "c", "stage": "stage1"}, "the ingress of 'diamond' is 'a'"),
    "no ingress": ({"deployment": "diamond", "stage": "stage1"}, "the ingress of 'diamond' is 'a'"),
}


@pytest.mark.parametrize("case", FORWARDED)
async def test_forwarded_frames_that_no_ingress_can_be_told_of_are_answered(cluster: LocalCluster, stream: RawStream, case: str) -> None:
    fields, message = FORWARDED[case]
    async with RawStream(cluster.addresses["b"], FORWARD_METHOD) as link:
        greeting = await link.read()
        assert greeting is not None
        assert [field.name for field, _ in greeting.frame.ListFields()] == ["received"]
        await link.send(bytes(128), request="r", tensor=header(), acknowledge=True, **fields)
        receipt = await link.read()
        reply = await link.read()
    assert receipt is not None
    assert receipt.frame.received.frames == 1
    assert reply is not None
    assert message in reply.frame.failure.message
    assert reply.frame.request == "r"


@pytest.mark.parametrize("stage", ["", "stage0", "no such stage"])
async def test_forwarded_frames_for_a_stage_that_is_not_here_leave_nothing(cluster: LocalCluster, stream: RawStream, stage: str) -> None:
    async with RawStream(cluster.addresses["b"], FORWARD_METHOD, {"splitnet-node": "a"}) as link:
        await link.read()
        for i in range(100):
            await link.send(bytes(128), request=f"r{i}", deployment="diamond", ingress="a", stage=stage, tensor=header())
        await link.call.done_writing()
        assert await link.read() is None
    at_rest(cluster)


async def test_forwarded_requests_that_never_become_whole_are_bounded_and_end_with_their_sender(
    cluster: LocalCluster, served: Split, stream: RawStream
) -> None:
    limit = 2 * served.plan.max_in_flight + 8
    node = served.plan.ingress
    async with RawStream(cluster.addresses["b"], FORWARD_METHOD, {"splitnet-node": node.name, "splitnet-address": node.address}) as link:
        await link.read()
        part = header(name="y", shape=[16, 16], stored_bytes=1024, length=512)
        for i in range(2 * limit):
            await link.send(bytes(512), request=f"part{i}", deployment="diamond", ingress="a", stage="stage1", tensor=part)
        await link.send(request="r", deployment="nowhere", ingress="a", tensor=part)
        await link.read()  # the refusal of the last one: all before it have been taken
        assert len(cluster.server("b").ledger.requests) == limit
        assert cluster.server("b").ledger.buffers.used_bytes == limit * 1024
    at_rest(cluster)
