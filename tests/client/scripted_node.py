"""A node that does what a test tells it, for faults of the protocol that a real node does not commit.

It speaks through a real gRPC server and the library's own wire. Unless told otherwise it answers y = x + 1.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np

from splitnet import channel, wire
from splitnet.errors import SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec

X = TensorSpec("x", "float32", ("batch", 4))
Y = TensorSpec("y", "float32", ("batch", 4))
DESCRIBE = "/splitnet.rpc.v1.Node/Describe"


def deployment(name: str = "model", **changes: Any) -> pb.DeploymentStatus:
    fields: dict[str, Any] = {
        "name": name, "node": "a", "ingress": True, "max_in_flight": 4, "model": "test", "plan_sha256": "0" * 64,
        "inputs": [wire.spec_to_message(X)], "outputs": [wire.spec_to_message(Y)],
    }  # fmt: skip
    return pb.DeploymentStatus(**(fields | changes))


class ScriptedNode:
    """`compute` answers one request (or raises); `talk`, where given, replaces the whole conversation on a Run stream."""

    def __init__(
        self,
        compute: Callable[[dict[str, np.ndarray]], Awaitable[dict[str, np.ndarray]]] | None = None,
        talk: Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext], Awaitable[None]] | None = None,
        deployments: list[pb.DeploymentStatus] | None = None,
    ) -> None:
        self.compute = compute or add_one
        self.talk = talk or self.answer_all
        self.reply = pb.DescribeReply(name="a", deployments=[deployment()] if deployments is None else deployments)
        self.describes = self.streams = self.under_way = self.peak = 0
        self.frames: list[pb.Frame] = []
        self.cancelled: list[str] = []
        self.address = ""
        self.writing = asyncio.Lock()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> str:
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
            ),
            "Run": grpc.stream_stream_rpc_method_handler(self._run, None, None),
        }
        self._server = grpc.aio.server(options=channel.SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("splitnet.rpc.v1.Node", handlers),))
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self, grace: float | None = None) -> None:
        if self._server is not None:
            await self._server.stop(grace)

    async def __aenter__(self) -> ScriptedNode:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeReply:
        self.describes += 1
        return self.reply

    async def _run(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        self.streams += 1
        await self.talk(requests, context)

    async def answer_all(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        arriving: dict[str, dict[str, wire.TensorAssembler]] = {}
        tasks: dict[str, asyncio.Task[None]] = {}

        async def answer(request: str, inputs: dict[str, np.ndarray]) -> None:
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
            try:
                outputs = await self.compute(inputs)
                messages = frames(request, outputs)
            except SplitnetError as error:
                messages = [wire.Message(pb.Frame(request=request, failure=channel.to_failure(error)))]
            finally:
                self.under_way -= 1
            for message in messages:
                async with self.writing:  # gRPC takes one write at a time
                    await context.write(wire.encode_frame(message))

        async for data in requests:
            message = wire.decode_frame(data)
            frame = message.frame
            self.frames.append(frame)
            if frame.HasField("cancel"):
                self.cancelled.append(frame.request)
                arriving.pop(frame.request, None)
                if frame.request in tasks:
                    tasks[frame.request].cancel()
                continue
            tensors = arriving.setdefault(frame.request, {})
            if frame.tensor.name not in tensors:
                tensors[frame.tensor.name] = wire.TensorAssembler(frame.tensor)
            tensors[frame.tensor.name].add(frame.tensor, message.payload)
            if frame.end:
                arrays = {name: tensor.array() for name, tensor in arriving.pop(frame.request).items()}
                tasks[frame.request] = asyncio.create_task(answer(frame.request, arrays))
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def add_one(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": inputs["x"] + 1}


def frames(request: str, outputs: dict[str, np.ndarray], codec: str = "raw") -> list[wire.Message]:
    messages = []
    for name, array in outputs.items():
        for chunk, payload in wire.tensor_chunks(name, array, codec):
            message = wire.Message(pb.Frame(request=request), payload)
            message.frame.tensor.CopyFrom(chunk)
            messages.append(message)
    messages[-1].frame.end = True
    return messages


class ThreadedNode:
    """The same in a thread of its own, for the blocking client."""

    def __init__(self, node: ScriptedNode) -> None:
        self.node = node
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="scripted node")

    def __enter__(self) -> ThreadedNode:
        self.thread.start()
        self.run(self.node.start())
        return self

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def __exit__(self, *_: object) -> None:
        self.run(self.node.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
