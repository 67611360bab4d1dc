"""Calls whose messages are decoded here, and not by gRPC: what cannot be decoded is answered in words, where gRPC would log a traceback and say nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from splitnet.channel import abort_with
from splitnet.errors import BadInput

__all__ = ["decoding"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def decoding(call: Callable[..., Any], kind: type[ProtobufMessage], streams: tuple[bool, bool]) -> grpc.RpcMethodHandler[Any, Any]:
    """`streams`: whether requests and whether answers come one after the other. Raises KeyError for a kind of call that there is none of."""

    def decoded(data: bytes) -> ProtobufMessage:
        try:
            return kind.FromString(data)
        except DecodeError:
            raise BadInput(
                f"{len(data)} bytes are not a {kind.DESCRIPTOR.name}", remedy="run the same version of splitnet on both sides"
            ) from None

    async def one(data: bytes, context: Context) -> Any:
        try:
            request = decoded(data)
        except BadInput as error:
            await abort_with(context, error)
        return await call(request, context)

    async def answering(data: bytes, context: Context) -> AsyncIterator[Any]:
        try:
            request = decoded(data)
        except BadInput as error:
            await abort_with(context, error)
        async for reply in call(request, context):
            yield reply

    async def many(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            async for reply in call((decoded(data) async for data in requests), context):
                yield reply
        except BadInput as error:
            await abort_with(context, error)

    made: dict[tuple[bool, bool], tuple[Callable[..., Any], Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, one),
        (False, True): (grpc.unary_stream_rpc_method_handler, answering),
        (True, True): (grpc.stream_stream_rpc_method_handler, many),
    }
    make, handler = made[streams]
    result: grpc.RpcMethodHandler[Any, Any] = make(handler, response_serializer=_serialize)
    return result


def _serialize(message: ProtobufMessage) -> bytes:
    return message.SerializeToString()
