"""A Run or Forward stream spoken frame by frame: for what the client SDK would never send."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import grpc.aio
import numpy as np

from splitnet.channel import RUN_METHOD, from_failure
from splitnet.errors import SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import Message, TensorAssembler, decode_frame, encode_frame, tensor_chunks

__all__ = ["RawStream"]

_PATIENCE_S = 10.0
_NO_LIMIT = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))


class RawStream:
    def __init__(self, address: str, method: str = RUN_METHOD, metadata: Mapping[str, str] | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_NO_LIMIT)
        self.call: Any = self._channel.stream_stream(method)(metadata=grpc.aio.Metadata(*(metadata or {}).items()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, payload: bytes = b"", **fields: Any) -> None:
        await self.call.write(encode_frame(Message(pb.Frame(**fields), payload)))

    async def send_inputs(self, request: str, inputs: Mapping[str, np.ndarray], *, end: bool = True, **fields: Any) -> None:
        """Whole tensors; the last frame ends the request."""
        frames = [(head, payload) for name, array in inputs.items() for head, payload in tensor_chunks(name, array)]
        for i, (head, payload) in enumerate(frames):
            frame = pb.Frame(request=request, tensor=head, end=end and i == len(frames) - 1, **fields)
            await self.call.write(encode_frame(Message(frame, payload)))

    async def read(self) -> Message | None:
        """The next frame; None at the end of the stream. Raises grpc.RpcError when the call failed."""
        async with asyncio.timeout(_PATIENCE_S):
            data = await self.call.read()
        return decode_frame(data) if isinstance(data, bytes) else None

    async def answer(self, request: str) -> dict[str, np.ndarray] | SplitnetError:
        """The outputs of a request, or what it failed with; frames of other requests are skipped."""
        whole: dict[str, np.ndarray] = {}
        arriving: dict[str, TensorAssembler] = {}
        while True:
            message = await self.read()
            assert message is not None, "the stream ended without an answer"
            frame = message.frame
            if frame.request != request:
                continue
            if frame.HasField("failure"):
                return from_failure(frame.failure, request)
            name = frame.tensor.name
            tensor = arriving.setdefault(name, TensorAssembler(frame.tensor)) if frame.tensor.dtype else arriving[name]
            if tensor.add(frame.tensor, message.payload):
                whole[name] = tensor.array()
            if frame.end:
                return whole
