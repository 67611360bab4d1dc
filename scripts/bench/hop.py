"""One activation from one node's stage to the next, against the same bytes over raw asyncio TCP and over a bare grpc.aio stream.

    python scripts/bench/hop.py [--sizes 64KiB 1MiB 16MiB] [--rounds 7] [--repeats 20]

Real nodes in processes of their own, on loopback. A hop cannot be watched from outside, so its latency is a difference of medians
measured in turns: a model whose two stages are on two nodes, less the same model with both stages on one node, less the hop of the
answer (some bytes). TCP and gRPC: a send that is acknowledged, less half the round trip of some bytes. The gRPC stream carries the
bytes as messages of the wire's chunk size ("chunked"), and in one message where the limit allows it ("whole").
Throughput: many activations under way at once. Medians over the rounds; the ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster
from partitioner.layout import lay_out
from splitnet import AsyncClient, Cluster, NodeRef, Plan, Shard, StageSpec, wire
from splitnet.channel import CHANNEL_OPTIONS, SERVER_OPTIONS

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
TINY = 64
Once = Callable[[], Awaitable[object]]


# ----------------------------------------------------------------------------------------------------------- the nodes


class Hop(torch.nn.Module):
    """A large activation made on one side, and one element of it used on the other."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.make = torch.nn.Linear(1, elements)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.make(x)[:, 0]


def two_stages(elements: int, cluster: Cluster, nodes: tuple[str, str], folder: Path) -> tuple[Plan, dict[str, Shard]]:
    model = partitioner.capture(Hop(elements).eval(), (torch.ones(2, 1),), name="hop")
    vertices = [vertex.name for vertex in model.structure.vertices if vertex.op != "input"]
    layout = lay_out(model.structure, {name: int(name != vertices[0]) for name in vertices})
    names = {stage.index: f"stage{stage.index}" for stage in layout.stages}
    plan = Plan(
        model="hop",
        model_sha256=model.sha256,
        objective="latency",
        nodes=tuple(NodeRef(node.name, node.address) for node in cluster.nodes),
        stages=tuple(
            StageSpec(names[s.index], nodes[s.index], s.operators, s.inputs, s.outputs, s.param_bytes, s.activation_bytes)
            for s in layout.stages
        ),
        transfers=tuple(layout.transfers(names)),
        inputs=model.structure.inputs,
        outputs=model.structure.outputs,
    )
    crossing = sum(transfer.bytes for transfer in plan.transfers if transfer.source and transfer.target)
    assert crossing == 2 * 4 * elements, "the activation is what crosses"  # of the example's batch of two
    shards = partitioner.cut(model, plan, folder)
    return plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), shards


@asynccontextmanager
async def client_of(nodes: LocalCluster, elements: int, placement: tuple[str, str]) -> AsyncIterator[AsyncClient]:
    with tempfile.TemporaryDirectory() as folder:
        plan, shards = two_stages(elements, nodes.cluster(), placement, Path(folder))
        name = f"hop-{elements}-{''.join(placement)}"
        await splitnet.deploy_async(plan, shards, name=name)
        async with AsyncClient(plan.ingress.address, name) as client:
            yield client


# ------------------------------------------------------------------------------------------------ what it is held against


async def serve_tcp() -> None:
    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack("<Q", await reader.readexactly(8))
                await reader.readexactly(size)
                writer.write(b"\1")
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(receive, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def serve_grpc() -> None:
    async def receive(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async for message in requests:
            if message[-1:] == b"\1":
                await context.write(b"\1")

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(receive, None, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("hop", {"Send": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


@asynccontextmanager
async def tcp_to(port: int) -> AsyncIterator[Callable[[int], Once]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def sender(size: int) -> Once:
        data = bytes(size)

        async def once() -> None:
            writer.write(struct.pack("<Q", size))
            writer.write(data)
            await writer.drain()
            await reader.readexactly(1)

        return once

    yield sender
    writer.close()


@asynccontextmanager
async def grpc_to(port: int) -> AsyncIterator[Callable[[int, int], Once]]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream("/hop/Send", None, None)()

        def sender(size: int, message_bytes: int) -> Once:
            messages = [bytes(min(message_bytes, size - at)) for at in range(0, size, message_bytes)]
            messages[-1] = messages[-1][:-1] + b"\1"

            async def once() -> None:
                for message in messages:
                    await call.write(message)
                await call.read()

            return once

        yield sender
        call.cancel()


async def pipelined(call_write: Callable[[], Awaitable[object]], acknowledged: Callable[[], Awaitable[object]], count: int) -> float:
    """Seconds for `count` sends that do not wait for each other."""

    async def read_all() -> None:
        for _ in range(count):
            await acknowledged()

    started = time.perf_counter()
    reading = asyncio.create_task(read_all())
    for _ in range(count):
        await call_write()
    await reading
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------- measuring


async def median_s(once: Once, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        await once()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def rate(client: AsyncClient, count: int) -> float:
    x = np.ones((1, 1), np.float32)

    def requests() -> Iterator[np.ndarray]:
        for _ in range(count):
            yield x

    started = time.perf_counter()
    async for _ in client.stream(requests(), window=8):
        pass
    return count / (time.perf_counter() - started)


async def measure(arguments: argparse.Namespace, tcp_port: int, grpc_port: int, nodes: LocalCluster) -> None:
    x = np.ones((1, 1), np.float32)

    def ask(client: AsyncClient) -> Once:
        return lambda: client.infer(x)

    async with (
        tcp_to(tcp_port) as tcp,
        grpc_to(grpc_port) as stream,
        client_of(nodes, TINY // 4, ("a", "b")) as cross_tiny,
        client_of(nodes, TINY // 4, ("a", "a")) as local_tiny,
    ):
        for size in arguments.sizes:
            async with client_of(nodes, size // 4, ("a", "b")) as cross, client_of(nodes, size // 4, ("a", "a")) as local:
                whole = min(size, wire.MAX_MESSAGE_BYTES - 4096)
                timed: dict[str, Once] = {
                    "cross": ask(cross), "local": ask(local), "cross tiny": ask(cross_tiny), "local tiny": ask(local_tiny),
                    "tcp": tcp(size), "tcp tiny": tcp(TINY), "chunked": stream(size, wire.CHUNK_BYTES), "whole": stream(size, whole),
                    "grpc tiny": stream(TINY, TINY),
                }  # fmt: skip
                for once in timed.values():  # warm
                    await median_s(once, 5)
                seen: dict[str, list[float]] = {name: [] for name in timed}
                rates: dict[str, list[float]] = {"hop": [], "tcp": [], "chunked": [], "whole": []}
                count = max(20, min(300, (256 << 20) // size))
                for _ in range(arguments.rounds):
                    for name, once in timed.items():
                        seen[name].append(await median_s(once, arguments.repeats))
                    rates["hop"].append(await rate(cross, count) * size)
                    rates["tcp"].append(await stream_rate(tcp_port, size, count))
                    rates["chunked"].append(await grpc_rate(grpc_port, size, wire.CHUNK_BYTES, count))
                    rates["whole"].append(await grpc_rate(grpc_port, size, whole, count))
                report(
                    size,
                    {name: statistics.median(times) for name, times in seen.items()},
                    {n: statistics.median(r) for n, r in rates.items()},
                )


async def stream_rate(port: int, size: int, count: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head, data = struct.pack("<Q", size), bytes(size)

    async def write() -> None:
        writer.write(head)
        writer.write(data)
        await writer.drain()

    seconds = await pipelined(write, lambda: reader.readexactly(1), count)
    writer.close()
    return count * size / seconds


async def grpc_rate(port: int, size: int, message_bytes: int, count: int) -> float:
    messages = [bytes(min(message_bytes, size - at)) for at in range(0, size, message_bytes)]
    messages[-1] = messages[-1][:-1] + b"\1"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream("/hop/Send", None, None)()

        async def write() -> None:
            for message in messages:
                await call.write(message)

        seconds = await pipelined(write, call.read, count)
        call.cancel()
    return count * size / seconds


def report(size: int, s: dict[str, float], rates: dict[str, float]) -> None:
    tiny_hop = (s["cross tiny"] - s["local tiny"]) / 2
    hop = s["cross"] - s["local"] - tiny_hop
    raw = {"tcp": s["tcp"] - s["tcp tiny"] / 2, "chunked": s["chunked"] - s["grpc tiny"] / 2, "whole": s["whole"] - s["grpc tiny"] / 2}
    unit = next(f"{size // factor} {name}" for name, factor in reversed(UNITS.items()) if size >= factor)
    print(f"{unit:>8}  latency ms: hop {hop * 1e3:7.3f}  tcp {raw['tcp'] * 1e3:7.3f}  grpc chunked {raw['chunked'] * 1e3:7.3f}  whole {raw['whole'] * 1e3:7.3f}"
          f"   hop/tcp {hop / raw['tcp']:5.2f}  hop/chunked {hop / raw['chunked']:5.2f}  hop/whole {hop / raw['whole']:5.2f}")  # fmt: skip
    m = {name: rate / 1e6 for name, rate in rates.items()}
    print(f"{'':8}  MB/s: hop {m['hop']:7.0f}  tcp {m['tcp']:7.0f}  grpc chunked {m['chunked']:7.0f}  whole {m['whole']:7.0f}"
          f"   hop/tcp {m['hop'] / m['tcp']:5.2f}  hop/chunked {m['hop'] / m['chunked']:5.2f}  hop/whole {m['hop'] / m['whole']:5.2f}")  # fmt: skip
    print(
        f"{'':8}  (tiny hop {tiny_hop * 1e3:.3f} ms; tcp round trip {s['tcp tiny'] * 1e3:.3f} ms, grpc {s['grpc tiny'] * 1e3:.3f} ms)",
        flush=True,
    )


def size_of(text: str) -> int:
    for name, factor in UNITS.items():
        if text.endswith(name):
            return int(text.removesuffix(name)) * factor
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[64 << 10, 1 << 20, 16 << 20], help="of the activation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20, help="per round")
    parser.add_argument("--serve", choices=("tcp", "grpc"), help=argparse.SUPPRESS)  # the far side, in a process of its own
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve_tcp() if arguments.serve == "tcp" else serve_grpc())
        return
    servers = [subprocess.Popen([sys.executable, __file__, "--serve", kind], stdout=subprocess.PIPE, text=True) for kind in ("tcp", "grpc")]
    try:
        ports = [int(server.stdout.readline()) for server in servers if server.stdout]
        with LocalCluster(2, processes=True) as nodes:
            asyncio.run(measure(arguments, *ports, nodes))
    finally:
        for server in servers:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
