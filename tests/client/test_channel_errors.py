"""Errors cross the network and come out as what they were; foreign errors are translated, every one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from splitnet import channel, errors
from splitnet.rpc.v1 import node_pb2 as pb

CLASSES = sorted(
    {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.SplitnetError)}, key=lambda cls: cls.__name__
)
FIELDS = {"remedy": "do this", "node": "a", "stage": "s1", "request": "r-1", "retry_after_s": 0.25}


def fields(error: errors.SplitnetError) -> dict[str, Any]:
    return {"message": error.message} | {name: getattr(error, name) for name in FIELDS}


async def through_a_server(
    error: BaseException | None = None, code: grpc.StatusCode | None = None, details: str = "", metadata: Any = ()
) -> Any:
    """What a caller of Describe gets to see."""

    async def describe(request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        if error is not None:
            await channel.abort_with(context, error)
        await context.abort(code, details, trailing_metadata=metadata)
        raise AssertionError

    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("splitnet.rpc.v1.Node", {"Describe": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with channel.open_channel(f"127.0.0.1:{port}") as connection:
            with channel.translated(f"127.0.0.1:{port}"):
                return await channel.stub(connection).Describe(pb.DescribeRequest())
    finally:
        await server.stop(None)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_travels_as_a_failure(cls: type[errors.SplitnetError]) -> None:
    sent = cls("what happened", **FIELDS)
    came = channel.from_failure(pb.Failure.FromString(channel.to_failure(sent).SerializeToString()))
    assert type(came) is cls
    assert fields(came) == fields(sent)


@pytest.mark.parametrize("cls", CLASSES)
async def test_every_class_travels_as_a_status(cls: type[errors.SplitnetError]) -> None:
    sent = cls("what happened", **FIELDS)
    with pytest.raises(errors.SplitnetError) as caught:
        await through_a_server(sent)
    assert type(caught.value) is cls
    assert fields(caught.value) == fields(sent)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_foreign_status_becomes_ours(code: grpc.StatusCode) -> None:
    with pytest.raises(errors.SplitnetError) as caught:
        await through_a_server(code=code, details="some details")
    assert "127.0.0.1" in caught.value.message
    expected = {
        "CANCELLED": errors.Cancelled, "UNKNOWN": errors.ServiceError, "INVALID_ARGUMENT": errors.BadInput,
        "DEADLINE_EXCEEDED": errors.DeadlineExceeded, "NOT_FOUND": errors.NotFound, "ALREADY_EXISTS": errors.AlreadyExists,
        "PERMISSION_DENIED": errors.NotPermitted, "RESOURCE_EXHAUSTED": errors.Overloaded, "FAILED_PRECONDITION": errors.ServiceError,
        "ABORTED": errors.ServiceError, "OUT_OF_RANGE": errors.BadInput, "UNIMPLEMENTED": errors.ProtocolError,
        "INTERNAL": errors.ServiceError, "UNAVAILABLE": errors.NodeUnavailable, "DATA_LOSS": errors.ProtocolError,
        "UNAUTHENTICATED": errors.NotPermitted,
    }  # fmt: skip
    assert type(caught.value) is expected[code.name]


def test_the_table_leaves_no_status_out() -> None:
    assert set(channel._CLASS_OF_CODE) == {code.value[0] for code in grpc.StatusCode} - {0}


async def test_a_long_message_still_arrives() -> None:
    with pytest.raises(errors.EngineFailure) as caught:
        await through_a_server(errors.EngineFailure("ä" * 100_000, remedy="ö" * 100_000, node="n" * 9999))
    assert caught.value.message.startswith("äää")
    assert caught.value.message.endswith("…")


async def test_metadata_of_a_stranger_do_no_harm() -> None:
    with pytest.raises(errors.NotFound, match="gone"):
        await through_a_server(code=grpc.StatusCode.NOT_FOUND, details="gone", metadata=(("splitnet-failure-bin", b"\xff\xff\xff"),))


async def test_a_bug_is_named_as_one() -> None:
    with pytest.raises(errors.ServiceError, match="internal error: ZeroDivisionError: by zero"):
        await through_a_server(ZeroDivisionError("by zero"))


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (asyncio.CancelledError(), errors.Cancelled),
        (TimeoutError(), errors.DeadlineExceeded),
        (MemoryError("4 GiB"), errors.InsufficientMemory),
        (KeyError("x"), errors.ServiceError),
        (grpc.RpcError("odd"), errors.ServiceError),
    ],
)
def test_other_errors(foreign: BaseException, ours: type[errors.SplitnetError]) -> None:
    assert type(channel.as_error(foreign, "a:1")) is ours
    assert channel.from_failure(channel.to_failure(foreign)).message


def test_a_class_of_a_later_version_falls_back_on_its_status() -> None:
    assert type(channel.from_failure(pb.Failure(kind="QuotaExceeded", code=8, message="m"))) is errors.Overloaded
    assert type(channel.from_failure(pb.Failure(kind="QuotaExceeded", code=999, message="m"))) is errors.ServiceError
    assert channel.from_failure(pb.Failure()).message


@pytest.mark.parametrize("hint", [float("nan"), float("inf"), -1.0, 1e9])
def test_a_retry_hint_must_be_sensible(hint: float) -> None:
    assert channel.from_failure(pb.Failure(kind="Overloaded", retry_after_s=hint)).retry_after_s == 0


async def test_cancelling_a_task_stays_a_cancellation() -> None:
    async def call() -> None:
        with channel.translated("a:1"):
            await asyncio.sleep(5)

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_closed_channel() -> None:
    connection = channel.open_channel("127.0.0.1:9")
    await connection.close()
    with pytest.raises(errors.NodeUnavailable, match="closed"), channel.translated("127.0.0.1:9"):
        await channel.stub(connection).Describe(pb.DescribeRequest())


def test_an_ipv6_address_is_one() -> None:
    assert channel._ADDRESS.match("[::1]:7001")
    assert channel._ADDRESS.match("node-a.local:7001")
