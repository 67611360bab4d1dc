"""Connections to nodes, and the one place where gRPC's errors become ours and ours become gRPC's.

Inside the Run and Forward streams an error travels as a `Failure` frame; elsewhere as a gRPC status whose trailing metadata hold the
same `Failure`, so that the same class comes out on the far side with its node, stage, request, remedy and retry hint.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from splitnet import errors, wire
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.rpc.v1.node_pb2_grpc import NodeStub
from splitnet.security.addresses import PLAINTEXT, Plaintext, known
from splitnet.security.credentials import Access, AccessLike, access_to, as_access, channel_options, check_plaintext, explain

if TYPE_CHECKING:
    from splitnet.rpc.v1.node_pb2_grpc import NodeAsyncStub  # stands in the type stubs only

__all__ = [
    "CHANNEL_OPTIONS",
    "FORWARD_METHOD",
    "RUN_METHOD",
    "SERVER_OPTIONS",
    "FrameCall",
    "FrameStream",
    "abort_with",
    "as_error",
    "forward_stream",
    "from_failure",
    "from_rpc_error",
    "open_channel",
    "read_frame",
    "run_stream",
    "stub",
    "to_failure",
    "translated",
]

FrameCall: TypeAlias = "grpc.aio.StreamStreamCall[wire.Message, bytes]"
FrameStream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[wire.Message, bytes]"

RUN_METHOD = "/splitnet.rpc.v1.Node/Run"
FORWARD_METHOD = "/splitnet.rpc.v1.Node/Forward"

_MESSAGE_LIMITS = (
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
)
_PING_EVERY_MS = 20_000

#: A dead peer is noticed within 30 s even when nothing is sent; a peer that comes back is found again within a second.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_MESSAGE_LIMITS,
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # 0: as many as needed
    ("grpc.enable_http_proxy", 0),  # nodes are neighbours; a proxy from the environment would only be in the way
    ("grpc.use_local_subchannel_pool", 1),  # one connection per channel, so that one's backoff is not another's
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # the time that an attempt may take, in fact
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # what may be sent again is decided above
)

#: What a server needs so that the channels above may ping it. A second process on the same port is an error, not a share.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_MESSAGE_LIMITS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
)

_FAILURE_KEY = "splitnet-failure-bin"
_MAX_DETAILS = 1000  # characters; gRPC refuses a peer whose metadata exceed 8 KiB
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})\Z")


# ------------------------------------------------------------------------------------------------------------- connections


def open_channel(address: str, *, node: str = "", credentials: AccessLike | None = None) -> grpc.aio.Channel:
    """A channel to the node at `address` (HOST:PORT, or [IPv6]:PORT). It connects when it is first used, and again after a break.
    To be called in a running event loop; the caller closes it. Whoever answers there must prove to be the node of the name `node`, where that is known here or
    by a cluster file, else to be made out to that host. `credentials`: else those that are found (see `splitnet.security.credentials`).

    Raises BadInput for what is not an address, NotPermitted for plaintext to another machine, and what is wrong with the credentials."""
    match = _ADDRESS.match(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise errors.BadInput(f"address {address!r} is not HOST:PORT", remedy="give a node's address, for example 10.0.0.5:7001")
    access = access_to(address) if credentials is None else as_access(credentials)
    _accesses[address] = access
    if len(_accesses) > _MOST_ADDRESSES:
        del _accesses[next(iter(_accesses))]
    if isinstance(access, Plaintext):
        check_plaintext(address, access)
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, *channel_options(node or known(address).node))
    return grpc.aio.secure_channel(address, access.channel_credentials(), options=options)


def stub(channel: grpc.aio.Channel) -> NodeAsyncStub:
    """The generated calls: Describe, Load, Activate, Unload, Release, Probe, Measure. For Run and Forward see below."""
    made: NodeAsyncStub = NodeStub(channel)
    return made


def run_stream(channel: grpc.aio.Channel) -> FrameStream:
    """Run, with frames encoded by `wire.encode_frame`. The answers come undecoded: take them with `read_frame` (gRPC would log an
    error of a decoder and hand out None)."""
    return channel.stream_stream(RUN_METHOD, request_serializer=wire.encode_frame, response_deserializer=None)


def forward_stream(channel: grpc.aio.Channel) -> FrameStream:
    """Forward, in the same way."""
    return channel.stream_stream(FORWARD_METHOD, request_serializer=wire.encode_frame, response_deserializer=None)


async def read_frame(call: FrameCall, address: str) -> wire.Message | None:
    """The next frame, or None when the peer has ended the stream in good order. Raises ProtocolError for what is not a frame, and
    whatever `from_rpc_error` makes of a break. Cancelling it cancels the whole call (so does gRPC)."""
    with translated(address):
        data = await call.read()
        return wire.decode_frame(data) if isinstance(data, bytes) else None  # grpc.aio.EOF


# ------------------------------------------------------------------------------------------------- ours, as a message or status


def to_failure(error: BaseException, request: str = "") -> pb.Failure:
    """The message that carries an error; what is not ours goes through `as_error` first. Long texts are cut."""
    error = as_error(error)
    return pb.Failure(
        code=error.grpc_code,
        message=_short(error.message),
        node=error.node[:100],
        stage=error.stage[:100],
        remedy=_short(error.remedy),
        retry_after_s=error.retry_after_s,
        kind=type(error).__name__,
        request=(request or error.request)[:64],
        address=error.address[:100] if isinstance(error, errors.Moved) else "",
    )


def from_failure(failure: pb.Failure, request: str = "") -> errors.SplitnetError:
    """The error that a message carries, of the class it had; of the class its status stands for where this version does not know it."""
    cls = errors.error_class(failure.kind)
    if cls.__name__ != failure.kind:
        cls = _CLASS_OF_CODE.get(failure.code, errors.ServiceError)
    error = cls(
        failure.message or "the peer gave no reason",
        remedy=failure.remedy,
        node=failure.node,
        stage=failure.stage,
        request=failure.request or request,
        retry_after_s=failure.retry_after_s if 0 < failure.retry_after_s < 3600 else 0.0,
    )
    if isinstance(error, errors.Moved):
        error.address = failure.address
    return error


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends a server's call with the status and the metadata from which `from_rpc_error` makes the same error again."""
    failure = to_failure(error)
    metadata = ((_FAILURE_KEY, failure.SerializeToString()),)
    await context.abort(_STATUS_OF_NUMBER[failure.code], failure.message, trailing_metadata=metadata)
    raise AssertionError("abort returned")


def _short(text: str) -> str:
    return text if len(text) <= _MAX_DETAILS else text[: _MAX_DETAILS - 1] + "…"


# -------------------------------------------------------------------------------------------------------- foreign errors, as ours


def as_error(error: BaseException, address: str = "") -> errors.SplitnetError:
    """Any exception as one of ours: ours unchanged, gRPC's and asyncio's translated, a bug named as such."""
    if isinstance(error, errors.SplitnetError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error, address)
    if isinstance(error, asyncio.CancelledError):
        return errors.Cancelled("the request was cancelled")
    if isinstance(error, TimeoutError):
        return errors.DeadlineExceeded("the time ran out")
    if isinstance(error, MemoryError):
        return errors.InsufficientMemory(f"out of memory: {error}", remedy="send smaller batches, or put fewer stages on this node")
    return errors.ServiceError(f"internal error: {type(error).__name__}: {error}", remedy="see the node's log; this is a bug in splitnet")


def from_rpc_error(error: grpc.RpcError, address: str) -> errors.SplitnetError:
    """What a call to `address` failed with: the node's own error where it sent one, else what its status stands for."""
    if (failure := _failure_in(error)) is not None:
        return from_failure(failure)
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    details = _short((error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else str(error)) or "no details")
    number = code.value[0]
    if code is grpc.StatusCode.UNAVAILABLE and (refusal := _handshake_failure(address, details)) is not None:
        return refusal
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.NodeUnavailable(
            f"no node answers at {address}: {details}",
            remedy=f"check that `splitnet node` runs there and that {address} can be reached from here",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(
            f"{address} did not answer in time", remedy="raise the timeout, or see `splitnet status` for what it does"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.ProtocolError(
            f"{address} does not offer this call: {details}", remedy="check that it is a splitnet node, of the same version"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return errors.ProtocolError(
            f"{address}: a message is too large: {details}", remedy="run the same version of splitnet on both sides"
        )
    return _CLASS_OF_CODE.get(number, errors.ServiceError)(f"{address} answered {code.name}: {details}")


def _handshake_failure(address: str, details: str) -> errors.SplitnetError | None:
    """Why two sides did not come together, from gRPC's words for it; None where it was something else."""
    access = _accesses.get(address, PLAINTEXT)
    remedy = f"`splitnet certs check {address}` shows both sides' certificates"
    for sign, meaning in _HANDSHAKE_FAILURES.items():
        if sign in details:
            return errors.NodeUnavailable(f"{address}: {meaning}; {explain(access)}", remedy=remedy)
    if "Socket closed" not in details or "failed to connect" not in details:
        return None
    if isinstance(access, Plaintext):  # the far side says nothing, and may also have died just then
        return errors.NodeUnavailable(
            f"no node answers at {address}: {details}",
            remedy=f"check that `splitnet node` runs there; if it does, it may want certificates, and this side has shown none: {remedy}",
        )
    return errors.NodeUnavailable(
        f"{address} ended the connection during the handshake: it may not trust this side's certificate, or its clock may be wrong, or it has just gone away; {explain(access)}",
        remedy=remedy,
    )


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Runs calls to `address`; what gRPC raises there comes out as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address) from None
    except asyncio.CancelledError:  # gRPC's way to say that the call, and not this task, was cancelled
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise errors.Cancelled(f"the call to {address} was cancelled, there or by closing the connection") from None
    except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as error:  # a call used after its end
        raise errors.NodeUnavailable(f"the connection to {address} is closed: {error}", remedy="call again: it connects anew") from None


def _failure_in(error: grpc.RpcError) -> pb.Failure | None:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return None
    metadata: Any = error.trailing_metadata()  # grpc-stubs calls the pairs something else
    for key, value in metadata or ():
        if key == _FAILURE_KEY and isinstance(value, bytes):
            try:
                return pb.Failure.FromString(value)
            except DecodeError:
                return None  # from a stranger; its status still stands
    return None


_accesses: dict[str, Access] = {}  # by which each address was called last
_MOST_ADDRESSES = 4096

_HANDSHAKE_FAILURES = {
    "Hostname Verification Check failed": "the certificate that it shows is another node's, or is not made out to this address",
    "certificate has expired": "its certificate has expired, or this machine's clock is wrong",
    "certificate is not yet valid": "its certificate is not valid yet, or this machine's clock is wrong",
    "unsupported certificate purpose": "the certificate that it shows is not a node's",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not by an authority that this side trusts",
    "WRONG_VERSION_NUMBER": "it speaks plaintext, and this side has certificates: start the node with --certs",
}

_STATUS_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

#: For a status that came without a Failure: from gRPC itself, from a proxy, or from a server that is not ours.
_CLASS_OF_CODE: dict[int, type[errors.SplitnetError]] = {
    1: errors.Cancelled,
    2: errors.ServiceError,  # UNKNOWN
    3: errors.BadInput,  # INVALID_ARGUMENT
    4: errors.DeadlineExceeded,
    5: errors.NotFound,
    6: errors.AlreadyExists,
    7: errors.NotPermitted,
    8: errors.Overloaded,  # RESOURCE_EXHAUSTED
    9: errors.ServiceError,  # FAILED_PRECONDITION
    10: errors.ServiceError,  # ABORTED
    11: errors.BadInput,  # OUT_OF_RANGE
    12: errors.ProtocolError,  # UNIMPLEMENTED
    13: errors.ServiceError,  # INTERNAL
    14: errors.NodeUnavailable,
    15: errors.ProtocolError,  # DATA_LOSS
    16: errors.NotPermitted,  # UNAUTHENTICATED
}
