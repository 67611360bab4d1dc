"""Many clients at once against a pipeline of real nodes, and the memory that nodes need while bytes go through them.

    python scripts/bench/serving.py clients [--clients 64] [--times 2] [--stage-ms 20 20] [--seconds 20] [--max-batch 1]
    python scripts/bench/serving.py bytes [--gib 1] [--mib 1 4]

Nodes and clients are processes of their own, on loopback. The nodes' stages take a fixed time by waiting, as if each node had a machine of its
own; all else is real: frames, streams, admission, the line at the ingress.

clients: one client alone, one request at a time (unloaded); one client that keeps the pipeline full (capacity); then `--clients` of them,
each with a connection of its own, which send at times of their own, together `--times` as many requests as the capacity, and drop what is
refused. Shares are of the unloaded median and of the capacity in the same run.

bytes: activations from the first node to the second until so many bytes have gone through the link. Memory is the resident set, before
(after a few requests), at its highest, and afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import psutil

from nodes.admission import Admission
from nodes.config import NodeConfig
from nodes.deployment import Deployment, Stage, routes
from nodes.logs import get_log
from nodes.memory import keep_buffers
from nodes.server import NodeServer
from splitnet import AsyncClient, Batching, Client
from splitnet.errors import Overloaded
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.shard import Shard
from splitnet.tensors import TensorSpec

MIB = 1 << 20
AIM_SLOWER, AIM_GROWTH_MIB = 3.0, 64


class Waiting:
    """Takes its time, and hands on as many rows as came, of its output's width."""

    name: ClassVar[str] = "waiting"

    def __init__(self, spec: StageSpec) -> None:
        self._input, self._output = spec.inputs[0].name, spec.outputs[0]
        self._seconds = spec.seconds
        self._made: dict[int, np.ndarray] = {}

    @classmethod
    def load(cls, shard: Shard, *, threads: int, max_value_bytes: int) -> Self:
        raise NotImplementedError("this engine has no shards")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self._seconds)
        rows, width = len(inputs[self._input]), int(self._output.shape[1])
        if rows not in self._made:
            self._made[rows] = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
        return {self._output.name: self._made[rows]}

    def memory_bytes(self) -> int:
        return 0


def plan_of(widths: Sequence[int], stage_s: Sequence[float], nodes: Mapping[str, str], batching: Batching, max_in_flight: int = 16) -> Plan:
    """A chain: value i has `widths[i]` numbers per row."""
    values = [TensorSpec(f"v{i}", "float32", ("batch", width)) for i, width in enumerate(widths)]
    stages = tuple(StageSpec(f"stage{i}", name, (), (values[i],), (values[i + 1],), seconds=stage_s[i]) for i, name in enumerate(nodes))
    ends = [CLIENT, *(stage.name for stage in stages), CLIENT]
    transfers = tuple(Transfer(ends[i], ends[i + 1], (value.name,)) for i, value in enumerate(values))
    return Plan(
        model="serving", model_sha256="0" * 64, objective="throughput", nodes=tuple(NodeRef(n, a) for n, a in nodes.items()),
        stages=stages, transfers=transfers, inputs=(values[0],), batching=batching, max_in_flight=max_in_flight,
        outputs=(OutputSpec(values[-1].name, dataclasses.replace(values[-1], name="out")),),
    )  # fmt: skip


async def serve_node(name: str) -> None:
    """Serves the plan whose file's name it reads."""
    keep_buffers()  # as `splitnet node` does
    with tempfile.TemporaryDirectory() as folder:
        server = NodeServer(NodeConfig(listen="127.0.0.1:0", name=name, data_dir=Path(folder), threads=1), get_log(name, quiet=True))
        await server.start()
        print(server.address, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            plan = Plan.load(line.strip())
            (spec,) = (stage for stage in plan.stages if stage.node == name)
            stage = Stage(spec, Waiting(spec), "", {t.name: t for t in spec.inputs}, routes(plan, spec.name), 0)
            admission = Admission(plan.max_in_flight, joined=plan.batching.max_batch)
            server.serve_directly(Deployment("serving", plan, plan.sha256, plan.node(name), {spec.name: stage}, admission))
            print("active", flush=True)
        await server.abandon()


# ---------------------------------------------------------------------------------------------------------------- clients


async def flood(address: str, clients: int, times: float, seconds: float, rows: np.ndarray) -> dict[str, object]:
    async with AsyncClient(address) as one:
        for _ in range(10):
            await one.infer(rows)

        async def alone() -> list[float]:
            return [(await _timed(one, rows))[0] for _ in range(25)]

        unloaded = await alone()
        count, started = 0, time.perf_counter()
        first = started
        async for _ in one.stream(rows for _ in range(200)):
            count += 1
            first = time.perf_counter() if count == 20 else first
        capacity = (count - 20) / (time.perf_counter() - first)

        many = [AsyncClient(address) for _ in range(clients)]
        for client in many:
            await client.connect()
        accepted: list[tuple[float, float]] = []
        refused: list[float] = []

        async def ask(client: AsyncClient) -> None:
            took_s, error = await _timed(client, rows)
            if error is None:
                accepted.append((time.perf_counter(), took_s))
            else:
                refused.append(took_s)

        async def keep_asking(client: AsyncClient, every_s: float, end_s: float) -> None:
            at_s = time.perf_counter() + random.random() * every_s
            async with asyncio.TaskGroup() as asking:
                while at_s < end_s:
                    await asyncio.sleep(max(at_s - time.perf_counter(), 0.0))
                    asking.create_task(ask(client))
                    at_s += every_s * random.uniform(0.5, 1.5)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for client in many:
                group.create_task(keep_asking(client, clients / (times * capacity), started + seconds))
        counted = [took_s for at_s, took_s in accepted if started + seconds * 0.1 < at_s < started + seconds]
        for client in many:
            await client.close()
        unloaded += await alone()
    return {
        "unloaded_s": statistics.median(unloaded),
        "capacity": capacity,
        "throughput": len(counted) / (0.9 * seconds),
        "accepted": len(accepted),
        "refused": len(refused),
        "p50_s": statistics.median(counted),
        "p99_s": sorted(counted)[int(0.99 * len(counted))],
        "refusal_p50_s": statistics.median(refused) if refused else 0.0,
        "refusal_p99_s": sorted(refused)[int(0.99 * len(refused))] if refused else 0.0,
    }


async def _timed(client: AsyncClient, rows: np.ndarray) -> tuple[float, Overloaded | None]:
    started = time.perf_counter()
    try:
        await client.infer(rows)
    except Overloaded as error:
        return time.perf_counter() - started, error
    return time.perf_counter() - started, None


def clients(arguments: argparse.Namespace) -> None:
    stage_s = [ms / 1e3 for ms in arguments.stage_ms]
    width = arguments.kib * 256
    with running(len(stage_s)) as nodes:
        plan = nodes.deploy(
            plan_of([width] * (len(stage_s) + 1), stage_s, nodes.addresses, Batching(arguments.max_batch), arguments.max_in_flight)
        )
        with nodes.watched() as memory:
            command = [sys.executable, __file__, "flood", plan.ingress.address]
            command += [str(x) for x in (arguments.clients, arguments.times, arguments.seconds, width)]
            said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"stages of {', '.join(f'{ms:g}' for ms in arguments.stage_ms)} ms, rows of {arguments.kib} KiB, max_batch {arguments.max_batch}")
    print(f"unloaded   median {said['unloaded_s'] * 1e3:8.1f} ms")
    print(f"capacity          {said['capacity']:8.1f} requests/s (one client's stream; the slowest stage alone: {1 / max(stage_s):.1f})")
    print(f"{arguments.clients} clients at {arguments.times:g} times that: {said['accepted']} answered, {said['refused']} refused")
    print(
        f"throughput        {said['throughput']:8.1f} requests/s   {said['throughput'] / said['capacity']:.3f} of the capacity   (aim: 1)"
    )
    slower = said["p99_s"] / said["unloaded_s"]
    print(
        f"p50 / p99   {said['p50_s'] * 1e3:.1f} / {said['p99_s'] * 1e3:.1f} ms   p99 {slower:.2f} times the unloaded   (aim: {AIM_SLOWER:g})"
    )
    print(f"refusals    p50 {said['refusal_p50_s'] * 1e3:.1f} ms, p99 {said['refusal_p99_s'] * 1e3:.1f} ms")
    report(memory)


# ------------------------------------------------------------------------------------------------------------------ bytes


def bytes_through(arguments: argparse.Namespace) -> None:
    for mib in arguments.mib:
        with running(2) as nodes:
            plan = nodes.deploy(plan_of([1, mib * MIB // 4, 1], [0.0, 0.0], nodes.addresses, Batching()))
            count = round(arguments.gib * 1024 / mib)
            with nodes.watched() as memory:
                started = time.perf_counter()
                with Client(plan.ingress.address) as client:
                    for _ in client.stream(np.zeros((1, 1), np.float32) for _ in range(count)):
                        pass
                took_s = time.perf_counter() - started
        print(f"{count} activations of {mib} MiB in {took_s:.1f} s ({count * mib / took_s:.0f} MiB/s)")
        report(memory)


# ------------------------------------------------------------------------------------------------------------------ nodes


@dataclasses.dataclass
class Memory:
    before: int
    highest: int
    after: int = 0


class Nodes:
    def __init__(self, processes: Mapping[str, subprocess.Popen[str]]) -> None:
        self._processes = processes
        self.addresses = {name: said(process) for name, process in processes.items()}

    def deploy(self, plan: Plan) -> Plan:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(plan.to_json())
            file.flush()
            for process in reversed(list(self._processes.values())):
                assert process.stdin is not None
                process.stdin.write(f"{file.name}\n")
                process.stdin.flush()
                assert said(process) == "active"
        with Client(plan.ingress.address) as client:
            for _ in range(5):  # what is needed once is there then
                client.infer(np.zeros((1, int(plan.inputs[0].shape[1])), np.float32))
        return plan

    @contextmanager
    def watched(self) -> Iterator[dict[str, Memory]]:
        """Resident bytes by node, complete when the block is left."""
        seen = {name: psutil.Process(process.pid) for name, process in self._processes.items()}
        memory = {name: Memory(rss := process.memory_info().rss, rss) for name, process in seen.items()}
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                for name, process in seen.items():
                    memory[name].highest = max(memory[name].highest, process.memory_info().rss)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield memory
        finally:
            over.set()
            thread.join()
            for name, process in seen.items():
                memory[name].after = process.memory_info().rss


@contextmanager
def running(count: int) -> Iterator[Nodes]:
    with ExitStack() as stack:
        processes = {}
        for i in range(count):
            name = chr(ord("a") + i)
            command = [sys.executable, __file__, "node", name]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            processes[name] = process
        yield Nodes(processes)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def report(memory: Mapping[str, Memory]) -> None:
    for name, m in memory.items():
        grown = (m.highest - m.before) / MIB
        print(
            f"node {name}: {m.before / MIB:.1f} MiB before, {m.highest / MIB:.1f} at most, {m.after / MIB:.1f} after; grew by {grown:.1f} MiB   (aim: < {AIM_GROWTH_MIB})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("clients")
    part.add_argument("--clients", type=int, default=64)
    part.add_argument("--times", type=float, default=2.0)
    part.add_argument("--stage-ms", type=float, nargs="+", default=[20.0, 20.0])
    part.add_argument("--seconds", type=float, default=20.0)
    part.add_argument("--kib", type=int, default=16, help="of a row")
    part.add_argument("--max-batch", type=int, default=1)
    part.add_argument("--max-in-flight", type=int, default=16)
    part = parts.add_parser("bytes")
    part.add_argument("--gib", type=float, default=1.0)
    part.add_argument("--mib", type=int, nargs="+", default=[1, 4], help="of an activation")
    part = parts.add_parser("node")
    part.add_argument("name")
    part = parts.add_parser("flood")
    for name, kind in (("address", str), ("clients", int), ("times", float), ("seconds", float), ("width", int)):
        part.add_argument(name, type=kind)
    a = parser.parse_args()
    if a.part == "node":
        asyncio.run(serve_node(a.name))
    elif a.part == "flood":
        print(json.dumps(asyncio.run(flood(a.address, a.clients, a.times, a.seconds, np.zeros((1, a.width), np.float32)))))
    elif a.part == "clients":
        clients(a)
    else:
        bytes_through(a)


if __name__ == "__main__":
    main()
