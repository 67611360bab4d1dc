"""One activation from one node's stage to the next, against the same bytes over raw asyncio TCP and over a bare grpc.aio stream.

    python scripts/bench/hop.py [--sizes 64KiB 1MiB 16MiB] [--rounds 9] [--repeats 20] [--message SIZE]

Two real nodes, the far sides of TCP and of gRPC: each a process of its own, on loopback. One activation each in turn, then many each in
turn, so that whatever else the machine does falls on all of them; medians over the rounds.

Latency: one way, by the machine's one monotonic clock. The node's stages are two engines that compute nothing: the first writes the
time into its output as its last act, the second reads the time as its first, and answers with the difference. So a hop is all that lies
between two engines: leaving the compute thread, framing, sending, receiving, putting together, entering the other compute thread.
TCP and gRPC: from before the first write until the receiver has all bytes.

Throughput: many activations under way. The client sends requests of a few bytes, each of which makes several activations of the size
(`per request` says how many), because what a request costs is not what a hop costs; the figure with one per request is printed, too.

The gRPC stream carries messages of at most `--message` bytes, by default what the wire uses. Its receiver does one of two things:
"sink" copies every message into a fresh numpy buffer of the activation's size, which is the least that a receiver of tensors must do
and what ratios are taken of; "bare" drops the messages.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import ClassVar, Self

import grpc
import grpc.aio
import numpy as np

from nodes.admission import Admission
from nodes.config import NodeConfig
from nodes.deployment import Deployment, Stage, routes
from nodes.logs import get_log
from nodes.memory import keep_buffers
from nodes.server import NodeServer
from splitnet import AsyncClient, wire
from splitnet.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.shard import Shard
from splitnet.tensors import TensorSpec

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
REQUEST_BYTES = 4 << 20  # what one request makes in activations, at the least, where throughput is measured
WINDOW = 8  # requests under way
PAUSE_S = 0.002  # before each timed send: what the one before has left to do must not disturb it
SECONDS = struct.Struct("<d")
SEED = {"seed": np.zeros(1)}


# ----------------------------------------------------------------------------------------------------------- the nodes


class Source:
    """Hands out the same activations again and again; the time stands in the first."""

    name: ClassVar[str] = "source"

    def __init__(self, spec: StageSpec) -> None:
        self._made = {output.name: np.zeros([int(size) for size in output.shape]) for output in spec.outputs}
        self._first = next(iter(self._made.values()))

    @classmethod
    def load(cls, shard: Shard, *, threads: int) -> Self:
        raise NotImplementedError("this engine has no shards")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._first[0] = time.monotonic()
        return self._made

    def memory_bytes(self) -> int:
        return 0


class Sink(Source):
    """Answers with the time that has gone by since the activation was made."""

    name: ClassVar[str] = "sink"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        now = time.monotonic()
        return {name: np.array([now - inputs["v0"][0]]) for name in self._made}


def plan_of(size: int, count: int, nodes: Mapping[str, str]) -> Plan:
    """`count` activations of `size` bytes from a stage on the first node to one on the second; one number in, one out."""
    seed, took = TensorSpec("seed", "float64", (1,)), TensorSpec("took", "float64", (1,))
    values = tuple(TensorSpec(f"v{i}", "float64", (size // 8,)) for i in range(count))
    (a, b) = nodes
    return Plan(
        model="hop", model_sha256="0" * 64, objective="latency", inputs=(seed,), outputs=(OutputSpec("took", took),),
        nodes=tuple(NodeRef(name, address) for name, address in nodes.items()),
        stages=(StageSpec("source", a, (), (seed,), values), StageSpec("sink", b, (), values, (took,))),
        transfers=(
            Transfer(CLIENT, "source", ("seed",), bytes=8),
            Transfer("source", "sink", tuple(v.name for v in values), bytes=size * count),
            Transfer("sink", CLIENT, ("took",), bytes=8),
        ),
    )  # fmt: skip


async def serve_node(name: str) -> None:
    """A node that serves the plans it reads, one per line: a name, and the plan."""
    keep_buffers()  # as `splitnet node` does
    with tempfile.TemporaryDirectory() as folder:
        server = NodeServer(NodeConfig(listen="127.0.0.1:0", name=name, data_dir=Path(folder), threads=1), get_log(name, quiet=True))
        await server.start()
        print(server.address, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            deployment, file = line.split()
            plan = Plan.load(file)
            (spec,) = (stage for stage in plan.stages if stage.node == name)
            engine = (Source if spec.name == "source" else Sink)(spec)
            stage = Stage(spec, engine, "", {t.name: t for t in spec.inputs}, routes(plan, spec.name), 0)
            server.serve_directly(Deployment(deployment, plan, plan.sha256, plan.node(name), {spec.name: stage}, Admission(WINDOW)))
            print("active", flush=True)
        await server.abandon()


# ------------------------------------------------------------------------------------------------ what it is held against


async def serve_tcp() -> None:
    loop = asyncio.get_running_loop()

    async def receive(connection: socket.socket) -> None:
        (size,) = struct.unpack("<Q", await loop.sock_recv(connection, 8))
        while True:
            buffer, at = np.empty(size, np.uint8), 0
            while at < size:
                got = await loop.sock_recv_into(connection, memoryview(buffer)[at:])
                if not got:
                    return
                at += got
            await loop.sock_sendall(connection, SECONDS.pack(time.monotonic()))

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        print(server.getsockname()[1], flush=True)
        receiving = set()
        while True:
            connection, _ = await loop.sock_accept(server)
            receiving.add(asyncio.create_task(receive(connection)))


async def serve_grpc() -> None:
    async def sink(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await receive(context, keep=True)

    async def bare(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await receive(context, keep=False)

    async def receive(context: grpc.aio.ServicerContext[bytes, bytes], keep: bool) -> None:
        (size,) = (int(value) for key, value in context.invocation_metadata() or () if key == "size")
        while True:
            buffer, at = np.empty(size if keep else 0, np.uint8), 0
            while at < size:
                message: object = await context.read()
                if not isinstance(message, bytes):  # grpc.aio.EOF
                    return
                if keep:
                    buffer[at : at + len(message)] = np.frombuffer(message, np.uint8)
                at += len(message)
            await context.write(SECONDS.pack(time.monotonic()))

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.stream_stream_rpc_method_handler(act) for name, act in {"sink": sink, "bare": bare}.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("hop", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Way:
    """`once`: sends one activation, returns the seconds that it took. `many(n)`: n of them, as fast as they go."""

    once: Callable[[], Awaitable[float]]
    many: Callable[[int], Awaitable[object]]
    per_request: int = 1


def sending(write: Callable[[], Awaitable[object]], read: Callable[[], Awaitable[bytes]]) -> Way:
    """`write` sends one activation, `read` returns the time at which the far side had all of one."""

    async def once() -> float:
        started = time.monotonic()
        await write()
        (arrived,) = SECONDS.unpack(await read())
        return float(arrived - started)

    async def many(count: int) -> None:
        async def read_all() -> None:
            for _ in range(count):
                await read()

        reading = asyncio.create_task(read_all())
        for _ in range(count):
            await write()
        await reading

    return Way(once, many)


@asynccontextmanager
async def over_tcp(port: int, size: int) -> AsyncIterator[Way]:
    loop = asyncio.get_running_loop()
    data = bytes(size)
    with socket.socket() as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, struct.pack("<Q", size))
        yield sending(lambda: loop.sock_sendall(connection, data), lambda: loop.sock_recv(connection, SECONDS.size))


@asynccontextmanager
async def over_grpc(port: int, method: str, size: int, message_bytes: int) -> AsyncIterator[Way]:
    messages = [bytes(min(message_bytes, size - at)) for at in range(0, size, message_bytes)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"/hop/{method}")(
            metadata=grpc.aio.Metadata(("size", str(size)))
        )

        async def write() -> None:
            for message in messages:
                await call.write(message)

        async def read() -> bytes:
            arrived = await call.read()
            assert isinstance(arrived, bytes)  # else the far side has gone
            return arrived

        yield sending(write, read)
        call.cancel()


@asynccontextmanager
async def over_nodes(nodes: Nodes, size: int, per_request: int) -> AsyncIterator[Way]:
    deployment = f"hop-{size}-{per_request}"
    plan = nodes.deploy(deployment, plan_of(size, per_request, nodes.addresses))

    async with AsyncClient(plan.ingress.address, deployment) as client:

        async def once() -> float:
            return float((await client.infer(SEED))["took"][0])

        async def many(count: int) -> None:
            async for _ in client.stream((SEED for _ in range(count // per_request)), window=WINDOW):
                pass

        yield Way(once, many, per_request)


class Nodes:
    """Node processes, by name."""

    def __init__(self, processes: Mapping[str, subprocess.Popen[str]]) -> None:
        self._processes = processes
        self.addresses = {name: said(process) for name, process in processes.items()}

    def deploy(self, name: str, plan: Plan) -> Plan:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(plan.to_json())
            file.flush()
            for process in reversed(list(self._processes.values())):
                assert process.stdin is not None
                process.stdin.write(f"{name} {file.name}\n")
                process.stdin.flush()
                assert said(process) == "active"
        return plan


async def measure(arguments: argparse.Namespace, tcp_port: int, grpc_port: int, nodes: Nodes) -> None:
    for size in arguments.sizes:
        per_request = max(1, REQUEST_BYTES // size)
        async with AsyncExitStack() as stack:
            contexts = {
                "hop": over_nodes(nodes, size, 1),
                "hops": over_nodes(nodes, size, per_request),
                "sink": over_grpc(grpc_port, "sink", size, arguments.message),
                "bare": over_grpc(grpc_port, "bare", size, arguments.message),
                "tcp": over_tcp(tcp_port, size),
            }
            ways = {name: await stack.enter_async_context(context) for name, context in contexts.items()}
            latency: dict[str, list[float]] = {name: [] for name in ways}
            rate: dict[str, list[float]] = {name: [] for name in ways}
            batch = max(8 * per_request, arguments.bytes // size)
            for round_ in range(-1, arguments.rounds):  # the first to warm up
                took: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(arguments.repeats):
                    for name in random.sample(list(ways), len(ways)):
                        await asyncio.sleep(PAUSE_S)
                        took[name].append(await ways[name].once())
                for name, way in ways.items():
                    count = batch if name != "hop" else max(8, batch // 4)
                    count -= count % way.per_request
                    started = time.monotonic()
                    await way.many(count)
                    if round_ >= 0:
                        rate[name].append(count * size / (time.monotonic() - started))
                        latency[name].append(statistics.median(took[name]))
        report(size, per_request, latency, rate)


def report(size: int, per_request: int, latency: dict[str, list[float]], rate: dict[str, list[float]]) -> None:
    ms = {name: statistics.median(seconds) * 1e3 for name, seconds in latency.items()}
    mb = {name: statistics.median(bytes_per_s) / 1e6 for name, bytes_per_s in rate.items()}
    unit = next(f"{size // factor} {name}" for name, factor in reversed(UNITS.items()) if size >= factor)
    print(f"{unit:>8}  latency, ms       hop {ms['hop']:7.3f}   gRPC sink {ms['sink']:7.3f}  bare {ms['bare']:7.3f}   TCP {ms['tcp']:7.3f}"
          f"   hop/sink {ratio(latency, 'hop', 'sink')}  hop/bare {ms['hop'] / ms['bare']:4.2f}  hop/TCP {ms['hop'] / ms['tcp']:5.2f}")  # fmt: skip
    print(f"{'':8}  throughput, MB/s  hop {mb['hops']:7.0f}   gRPC sink {mb['sink']:7.0f}  bare {mb['bare']:7.0f}   TCP {mb['tcp']:7.0f}"
          f"   hop/sink {ratio(rate, 'hops', 'sink')}  hop/bare {mb['hops'] / mb['bare']:4.2f}  hop/TCP {mb['hops'] / mb['tcp']:5.2f}"
          f"   ({per_request} per request; with 1: {mb['hop']:.0f})", flush=True)  # fmt: skip


def ratio(figures: dict[str, list[float]], ours: str, theirs: str) -> str:
    """Of the medians, and the quartiles of the rounds' own ratios."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(figures[ours], figures[theirs], strict=True)], n=4)
    return f"{statistics.median(figures[ours]) / statistics.median(figures[theirs]):4.2f} [{low:.2f}, {high:.2f}]"


# ----------------------------------------------------------------------------------------------------------- processes


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def far_sides(*roles: str) -> Iterator[list[subprocess.Popen[str]]]:
    """This file again, once for each role."""
    commands = ([sys.executable, __file__, "--serve", role] for role in roles)
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def size_of(text: str) -> int:
    for name, factor in UNITS.items():
        if text.endswith(name):
            return int(text.removesuffix(name)) * factor
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[64 << 10, 1 << 20, 16 << 20], help="of the activation")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="per round, for the latency")
    parser.add_argument("--bytes", type=size_of, default=128 << 20, help="per round, for the throughput")
    parser.add_argument("--message", type=size_of, default=wire.CHUNK_BYTES, help="the gRPC stream's largest")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the role of a far side: tcp, grpc, or a node's name
    arguments = parser.parse_args()
    if arguments.serve:
        roles = {"tcp": serve_tcp, "grpc": serve_grpc}
        asyncio.run(roles[arguments.serve]() if arguments.serve in roles else serve_node(arguments.serve))
        return
    with far_sides("tcp", "grpc", "a", "b") as (tcp, stream, a, b):
        asyncio.run(measure(arguments, int(said(tcp)), int(said(stream)), Nodes({"a": a, "b": b})))


if __name__ == "__main__":
    main()
