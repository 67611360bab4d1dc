"""What a node spends besides computing: on a stage, on a message, on a request, and in its codecs.

Measured with the real thing: two private servers on loopback, in this process, serve a model that does nothing, first on one of them,
then over both; the client is `splitnet.AsyncClient`. What stays when the known parts are taken away is what is looked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from nodes.admission import Admission
from nodes.config import NodeConfig
from nodes.deployment import Deployment, Stage, routes
from nodes.logs import get_log
from splitnet.channel import open_channel, stub
from splitnet.client import AsyncClient
from splitnet.codecs import codec_names
from splitnet.linkprobe import measure_link
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec
from splitnet.wire import CHUNK_BYTES, Message, TensorAssembler, decode_frame, encode_frame, tensor_chunks

if TYPE_CHECKING:
    from nodes.server import NodeServer
    from splitnet.shard import Shard

__all__ = ["measure_overhead"]

_WARM_UP = 10
_MOST_ROUNDS = 200
_FASTEST_BYTES_PER_S = 1e12  # where a codec does nothing


async def measure_overhead(budget_s: float) -> pb.Overhead:
    """Takes about `budget_s`."""
    each_s = budget_s / 5
    with tempfile.TemporaryDirectory(prefix="splitnet-overhead-") as folder:
        async with _server("one", Path(folder)) as one, _server("two", Path(folder)) as two:
            stage_s = await _typical(lambda: one.compute.call(lambda: None), each_s)
            await _deploy("alone", (one,))
            alone_s = await _request_s(one.address, "alone", each_s)
            await _deploy("apart", (one, two))
            apart_s = await _request_s(one.address, "apart", each_s)
            async with open_channel(two.address) as channel:
                link = await measure_link(stub(channel), each_s)
    hop_s = (apart_s - alone_s - stage_s) / 2  # there, and back to the ingress
    codecs = [await asyncio.to_thread(_codec_speed, name, each_s / len(codec_names())) for name in codec_names()]
    return pb.Overhead(
        stage_s=stage_s,
        message_s=max(hop_s - _quartile([s.seconds for s in link.samples if s.bytes == 1]) / 2, 0.0) / 2,  # at either end
        request_s=max(alone_s - stage_s, 0.0),
        codecs=codecs,
    )


class _Nothing:
    """An engine that hands on what it gets."""

    name: ClassVar[str] = "nothing"

    @classmethod
    def load(cls, shard: Shard, *, threads: int) -> Self:
        raise NotImplementedError("this engine has no shards")

    def __init__(self, output: str) -> None:
        self._output = output

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {self._output: next(iter(inputs.values()))}

    def memory_bytes(self) -> int:
        return 0


@contextlib.asynccontextmanager
async def _server(name: str, folder: Path) -> AsyncIterator[NodeServer]:
    from nodes.server import NodeServer  # it serves what this module is a part of

    server = NodeServer(NodeConfig(listen="127.0.0.1:0", name=name, data_dir=folder / name, threads=1), get_log(name, quiet=True))
    await server.start()
    try:
        yield server
    finally:
        await server.abandon()


async def _deploy(name: str, servers: tuple[NodeServer, ...]) -> None:
    specs = [TensorSpec(f"v{i}", "float32", (16,)) for i in range(len(servers) + 1)]
    stages = tuple(StageSpec(f"s{i}", s.config.name, (), (specs[i],), (specs[i + 1],)) for i, s in enumerate(servers))
    ends = [CLIENT, *(stage.name for stage in stages), CLIENT]
    transfers = tuple(Transfer(a, b, (spec.name,), bytes=64) for a, b, spec in zip(ends, ends[1:], specs, strict=False))
    plan = Plan(
        model="nothing",
        model_sha256="0" * 64,
        objective="latency",
        nodes=tuple(NodeRef(s.config.name, s.address) for s in servers),
        stages=stages,
        transfers=transfers,
        inputs=(specs[0],),
        outputs=(OutputSpec(specs[-1].name, dataclasses.replace(specs[-1], name="out")),),
    )
    for server, spec in reversed(list(zip(servers, stages, strict=True))):
        stage = Stage(spec, _Nothing(spec.outputs[0].name), "", {t.name: t for t in spec.inputs}, routes(plan, spec.name), 0)
        server.serve_directly(Deployment(name, plan, plan.sha256, plan.node(spec.node), {spec.name: stage}, Admission(4)))


async def _request_s(address: str, name: str, budget_s: float) -> float:
    async with AsyncClient(address, name) as client:
        zeros = np.zeros(16, np.float32)
        return await _typical(lambda: client.infer({"v0": zeros}, retry=True), budget_s)


async def _typical(act: Callable[[], Awaitable[object]], budget_s: float) -> float:
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    for done in range(_WARM_UP + _MOST_ROUNDS):
        if done > 2 * _WARM_UP and time.perf_counter() > end:
            break
        started = time.perf_counter()
        await act()
        seconds.append(time.perf_counter() - started)
    return _quartile(seconds[_WARM_UP:])


def _quartile(seconds: list[float]) -> float:
    """The lower one: what disturbs a fixed cost only ever adds to it, and these figures are subtracted from one another."""
    return statistics.quantiles(seconds, n=4)[0]


def _codec_speed(name: str, budget_s: float) -> pb.CodecSpeed:
    """A chunk of normal deviates, from the array to the message and back: everything that is done per byte in this process."""
    array = np.random.default_rng(0).standard_normal(CHUNK_BYTES // 4, dtype=np.float32)
    encoding: list[float] = []
    decoding: list[float] = []
    size = 0
    end = time.perf_counter() + budget_s
    while len(encoding) < 4 or (time.perf_counter() < end and len(encoding) < _MOST_ROUNDS):
        started = time.perf_counter()
        (head, payload) = next(tensor_chunks("x", array, name))
        data = encode_frame(Message(pb.Frame(tensor=head), payload))
        between = time.perf_counter()
        message = decode_frame(data)
        TensorAssembler(message.frame.tensor, array.nbytes).add(message.frame.tensor, message.payload)
        decoding.append(time.perf_counter() - between)
        encoding.append(between - started)
        size = len(message.payload)
    encode_s, decode_s = _quartile(encoding[1:]), _quartile(decoding[1:])
    return pb.CodecSpeed(
        name=name,
        encode_bytes_per_s=min(array.nbytes / max(encode_s, 1e-12), _FASTEST_BYTES_PER_S),
        decode_bytes_per_s=min(array.nbytes / max(decode_s, 1e-12), _FASTEST_BYTES_PER_S),
        ratio=size / array.nbytes,
    )
