"""What mutual TLS costs: activations of 1 MiB over one Forward link, as nodes send them, in plaintext and over TLS 1.3, in turns.

    scripts/bench/security.py [--rounds 5] [--megabytes 256] [--json]

First two processes: a node that takes the frames and counts them, and a link that sends them. What is compared is the bytes that arrive in a second, the codec raw.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
import numpy as np
from safetensors.numpy import save

from nodes.testing import LocalCluster
from splitnet import Client, Cluster, NodeRef, OutputSpec, Plan, Shard, StageSpec, TensorSpec, Transfer, deploy, wire
from splitnet.channel import FORWARD_METHOD, SERVER_OPTIONS, forward_stream, open_channel, read_frame
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security.addresses import PLAINTEXT, know_address
from splitnet.security.authority import Authority
from splitnet.security.credentials import AccessLike, Credentials
from splitnet.security.roles import Role
from splitnet.shard import write_shard

TENSOR_BYTES = 1 << 20
WIDTH = 1024


class Sink(grpc.GenericRpcHandler):  # type: ignore[type-arg] # generic in the type stubs only
    """Decodes each tensor into place, as a node does, and answers when the stream ends."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._take) if details.method == FORWARD_METHOD else None

    async def _take(self, _: object, context: Any) -> None:
        count = 0
        while isinstance(data := await context.read(), bytes):
            message = wire.decode_frame(data)
            assembler = wire.TensorAssembler(message.frame.tensor)
            assembler.add(message.frame.tensor, message.payload)
            count += assembler.complete
        await context.write(wire.encode_frame(wire.Message(pb.Frame(received=pb.Received(frames=count)))))


def serve(certs: str, pipe: Connection) -> None:
    async def run() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((Sink(),))
        secure = server.add_secure_port("127.0.0.1:0", Credentials(certs).server_credentials())
        plain = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send((secure, plain))
        await asyncio.to_thread(pipe.recv)
        await server.stop(0)

    asyncio.run(run())


async def sent(port: int, access: AccessLike, tensors: int) -> float:
    """Bytes per second, from the first to the answer that all have come."""
    array = np.random.default_rng(0).standard_normal(TENSOR_BYTES // 4, dtype=np.float32)
    async with open_channel(f"127.0.0.1:{port}", node="a", credentials=access) as channel:
        await channel.channel_ready()
        call = forward_stream(channel)()
        started = time.perf_counter()
        for number in range(tensors):
            for chunk, payload in wire.tensor_chunks("x", array):
                frame = pb.Frame(request=str(number), deployment="bench", stage="s", tensor=chunk)
                await call.write(wire.Message(frame, payload))
        await call.done_writing()
        answer = await read_frame(call, str(port))
        took_s = time.perf_counter() - started
    assert answer is not None
    assert answer.frame.received.frames == tensors
    return tensors * TENSOR_BYTES / took_s


async def compare(ports: tuple[int, int], certs: Path, rounds: int, megabytes: int) -> dict[str, Any]:
    kinds: tuple[tuple[str, int, AccessLike], ...] = (("tls", ports[0], Credentials(certs)), ("plaintext", ports[1], PLAINTEXT))
    found: dict[str, list[float]] = {"tls": [], "plaintext": []}
    for _, port, access in kinds:
        await sent(port, access, 32)
    for turn in range(rounds):
        for name, port, access in kinds if turn % 2 else kinds[::-1]:
            found[name].append(await sent(port, access, megabytes))
    figures = {name: statistics.median(values) / 1e6 for name, values in found.items()}
    share = statistics.median(t / p for t, p in zip(found["tls"], found["plaintext"], strict=True))
    return {"mb_per_s": {name: round(value) for name, value in figures.items()}, "tls_share": round(share, 3), "rounds": rounds}


# ------------------------------------------------------------------------------------------------------------- a served model


def _plan(cluster: Cluster, folder: Path) -> tuple[Plan, dict[str, Shard]]:
    """Two stages, each one matrix: 1 MiB in, 1 MiB between, 1 MiB out, with a batch of 256."""
    specs = [TensorSpec(f"v{i}", "float32", ("batch", WIDTH)) for i in range(3)]
    weight = np.eye(WIDTH, dtype=np.float32)
    shards = {}
    for i in range(2):
        graph = GraphDocument(
            inputs=(Input(f"v{i}", "tensor"),),
            weights={"w": WeightSpec("float32", (WIDTH, WIDTH), (0, 1))},
            operators=(Operator("aten.linear.default", (Ref(f"v{i}"), Weight("w")), {}, f"v{i + 1}"),),
            outputs=(f"v{i + 1}",),
        )
        shards[f"s{i}"] = write_shard(
            folder / f"s{i}", model="bench", model_sha256="0" * 64, stage=f"s{i}", engine="torch-graph", inputs=specs[i : i + 1], outputs=specs[i + 1 : i + 2],
            members={"graph.json": graph.to_bytes(), "weights.safetensors": save({"w": weight})}, param_bytes=weight.nbytes, activation_bytes=3 * TENSOR_BYTES,
        )  # fmt: skip
    stages = tuple(
        StageSpec(f"s{i}", cluster.nodes[i].name, (f"op{i}",), (specs[i],), (specs[i + 1],), weight.nbytes, 3 * TENSOR_BYTES)
        for i in range(2)
    )
    plan = Plan(
        model="bench", model_sha256="0" * 64, objective="throughput", nodes=tuple(NodeRef(n.name, n.address) for n in cluster.nodes), stages=stages,
        transfers=(Transfer("", "s0", ("v0",)), Transfer("s0", "s1", ("v1",)), Transfer("s1", "", ("v2",))),
        inputs=(specs[0],), outputs=(OutputSpec("v2", TensorSpec("y", "float32", ("batch", WIDTH))),),
    )  # fmt: skip
    return plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), shards


def served(authority: Path, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Requests per second through two nodes, in turns; the first round warms up."""
    found: dict[str, list[float]] = {"tls": [], "plaintext": []}
    x = {"v0": np.random.default_rng(0).standard_normal((TENSOR_BYTES // 4 // WIDTH, WIDTH), dtype=np.float32)}
    with LocalCluster(2, processes=True) as plain, LocalCluster(2, processes=True, certs=authority) as secure:
        clients = {}
        for name, cluster in (("plaintext", plain), ("tls", secure)):
            for node in cluster.cluster().nodes:
                know_address(node.address, PLAINTEXT if cluster is plain else str(authority / "operator"))
            plan, shards = _plan(cluster.cluster(), folder)
            clients[name] = Client(deploy(plan, shards, name="bench").ingress)
        for turn in range(rounds + 1):
            for name, client in clients.items():
                rate = _rate(client, x, seconds)
                if turn:
                    found[name].append(rate)
        for client in clients.values():
            client.close()
    share = statistics.median(t / p for t, p in zip(found["tls"], found["plaintext"], strict=True))
    return {"requests_per_s": {name: round(statistics.median(values), 1) for name, values in found.items()}, "tls_share": round(share, 3)}


def _rate(client: Client, x: dict[str, np.ndarray], seconds: float) -> float:
    started = time.perf_counter()
    count = sum(1 for _ in client.stream(itertools.takewhile(lambda _: time.perf_counter() - started < seconds, itertools.repeat(x))))
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round of the served model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority.init(Path(folder) / "certs")
        for name in ("a", "b"):
            authority.issue(name, Role.NODE, ["127.0.0.1"])
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(str(authority.folder("a")), there))
        server.start()
        try:
            found = asyncio.run(compare(here.recv(), authority.folder("operator"), options.rounds, options.megabytes))
        finally:
            here.send(None)
            server.join(10)
        found["served"] = served(authority.directory, Path(folder), options.rounds, options.seconds)
    if options.json:
        print(json.dumps(found))
        return
    rates, speeds = found["served"]["requests_per_s"], found["mb_per_s"]
    print(
        f"1 MiB activations over one link: plaintext {speeds['plaintext']} MB/s, mutual TLS 1.3 {speeds['tls']} MB/s: {found['tls_share']:.0%}"
    )
    print(
        f"a model on two nodes, 1 MiB in, between and out: {rates['plaintext']} and {rates['tls']} requests/s: {found['served']['tls_share']:.0%}"
    )


if __name__ == "__main__":
    main()
