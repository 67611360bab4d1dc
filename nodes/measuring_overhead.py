"""What a node spends besides computing: on a stage, on a message, on a request, and in its codecs.

Measured with the real thing: two private servers on loopback, in this process, serve a model that does nothing, first on one of them,
then over both; the client is `splitnet.AsyncClient`. What stays when the known parts are taken away is what is looked for: once on the
clock (latency), and once in processor seconds of the whole process, beside a thread that computes (throughput).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from nodes.admission import Admission
from nodes.config import NodeConfig
from nodes.deployment import Deployment, Stage, routes
from nodes.logs import get_log
from nodes.measuring_work import PAUSE_S, SMALL, measure_work
from splitnet.channel import open_channel, stub
from splitnet.client import AsyncClient
from splitnet.codecs import codec_names
from splitnet.heartbeat import Heartbeat
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec
from splitnet.wire import CHUNK_BYTES, Message, TensorAssembler, decode_frame, encode_frame, tensor_chunks

if TYPE_CHECKING:
    from nodes.server import NodeServer
    from splitnet.shard import Shard

__all__ = ["measure_overhead"]

_PATIENT = Heartbeat(patience_s=60.0, most_s=60.0)  # both ends are in this process: silence says only that the box is busy
_WARM_UP = 5
_GRACE_S = 30.0
_MOST_ROUNDS = 200
_FASTEST_BYTES_PER_S = 1e12  # where a codec does nothing


async def measure_overhead(budget_s: float) -> pb.Overhead:
    """Takes about `budget_s`."""
    with tempfile.TemporaryDirectory(prefix="splitnet-overhead-") as folder:
        async with _server("one", Path(folder)) as one, _server("two", Path(folder)) as two:
            await _deploy("alone", (one,))
            deployments = await _deploy("apart", (one, two))
            turns = await _turns(one, two, budget_s * 0.5)
            busy = await measure_work(one, budget_s * 0.3)
            for link in (link for deployment in deployments for link in deployment.links.values()):
                await link.close()  # before the servers at their ends go
    stage_s, alone_s, apart_s, ping_s = (_quartile(seconds) for seconds in zip(*turns, strict=True))
    hop_s = (apart_s - alone_s - stage_s) / 2  # there, and back to the ingress
    codecs = [await asyncio.to_thread(_codec_speed, name, budget_s * 0.2 / len(codec_names())) for name in codec_names()]
    return pb.Overhead(
        stage_s=stage_s,
        message_s=max(hop_s - ping_s / 2, 0.0) / 2,  # at either end
        request_s=max(busy.request_cpu_s, 0.0),
        codecs=codecs,
        stage_cpu_s=max(busy.stage_cpu_s, 0.0),
        message_cpu_s=max(busy.message_cpu_s, 0.0),
        request_cpu_s=max(busy.request_cpu_s, 0.0),
        byte_cpu_s=max(busy.byte_cpu_s, 0.0),
    )


async def _turns(one: NodeServer, two: NodeServer, budget_s: float) -> list[tuple[float, float, float, float]]:
    """Seconds of a job of the compute thread, a request to one server, a request through both, and a Probe's round trip. They take
    turns, so that what disturbs the box disturbs all of them."""
    turns = []
    nothing = {"v0": np.zeros(SMALL, np.float32)}
    end = time.perf_counter() + budget_s
    async with AsyncClient(one.address, "alone") as alone, AsyncClient(one.address, "apart") as apart, open_channel(two.address) as channel:
        probe = stub(channel).Probe(timeout=budget_s + _GRACE_S)
        try:
            for done in range(_WARM_UP + _MOST_ROUNDS):
                if done > 2 * _WARM_UP and time.perf_counter() > end:
                    break
                turn = (
                    await _seconds(one.compute.call(lambda: None)),
                    await _seconds(alone.infer(nothing, retry=True)),
                    await _seconds(apart.infer(nothing, retry=True)),
                    await _seconds(_ping(probe)),
                )
                turns.append(turn)
        finally:
            probe.cancel()
    return turns[_WARM_UP:]


async def _ping(probe: Any) -> None:
    await probe.write(pb.ProbeRequest(payload=b"x"))
    await probe.read()


async def _seconds(work: Awaitable[object]) -> float:
    await asyncio.sleep(PAUSE_S)
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def _quartile(seconds: Sequence[float]) -> float:
    """The lower one: what disturbs a fixed cost only ever adds to it, and these figures are subtracted from one another."""
    return statistics.quantiles(seconds, n=4)[0]


class _Nothing:
    """An engine that hands on what it gets."""

    name: ClassVar[str] = "nothing"

    @classmethod
    def load(cls, shard: Shard, *, threads: int, max_value_bytes: int) -> Self:
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

    config = NodeConfig(listen="127.0.0.1:0", name=name, data_dir=folder / name, threads=1, heartbeat=_PATIENT)
    server = NodeServer(config, get_log(name, quiet=True))
    await server.start()
    try:
        yield server
    finally:
        await server.abandon()


async def _deploy(name: str, servers: tuple[NodeServer, ...]) -> list[Deployment]:
    specs = [TensorSpec(f"v{i}", "float32", ("n",)) for i in range(len(servers) + 1)]
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
    deployments = []
    for server, spec in reversed(list(zip(servers, stages, strict=True))):
        stage = Stage(spec, _Nothing(spec.outputs[0].name), "", {t.name: t for t in spec.inputs}, routes(plan, spec.name), 0)
        deployments.append(Deployment(name, plan, plan.sha256, plan.node(spec.node), {spec.name: stage}, Admission(4)))
        server.serve_directly(deployments[-1])
    return deployments


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
        ratio=array.nbytes / max(size, 1),
    )
