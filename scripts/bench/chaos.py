"""Nodes killed at random under load: every accepted request answered, with the same bits, and how long that took.

    python scripts/bench/chaos.py [--kills 200] [--how kill|stop|mixed] [--seed 0]     a node at a time, the ingress too
    python scripts/bench/chaos.py --resets                                             1% of steps failing, against undisturbed
    python scripts/bench/chaos.py --cost                                               what being recoverable costs without faults

Four nodes, processes of their own; three stages, each with one standby. `--clients` tasks send requests all the time and compare each answer
with the whole model's. A kill comes when the deployment is whole; then: detection is from the signal to the "lost" event of whoever notices;
recovery from the signal to the first answer to a request that was under way or sent afterwards; the node is started again and taken in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import SplitnetError
from splitnet.heartbeat import Heartbeat
from splitnet.install import deploy_async, status_async
from splitnet.node_status import NodeStatus
from splitnet.plan import NodeRef, Plan

NAME = "chaos"
_WHOLE_S = 60.0


@dataclass
class Load:
    """What the clients saw."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    different: int = 0
    refused: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)  # asked, answered: by time.time()

    def recovery_s(self, killed_s: float) -> float | None:
        """From the kill to the first answer to a request that was asked before it and answered after, or asked after it: the latest of the clients'
        first answers would flatter a pipeline whose tail was past the lost node, so what counts is the first one asked after the kill."""
        after = [done_s for asked_s, done_s in self.times if asked_s >= killed_s]
        return min(after) - killed_s if after else None


def model(width: int, depth: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(depth):
        layers += [torch.nn.Linear(width, width), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers).eval()


def make(
    cluster: LocalCluster, directory: Path, *, standbys: bool
) -> tuple[Plan, dict[str, splitnet.shard.Shard], list[dict[str, np.ndarray]], list[np.ndarray]]:
    """A plan of three stages on the first three nodes; each stage's standby is a node that serves another, or none."""
    module = model(256, 12)
    captured = partitioner.capture(module, (torch.randn(2, 256),), name=NAME)
    plan = partitioner.plan(partitioner.profile(captured), cluster.cluster(), objective="throughput", stages=3)
    shards = partitioner.cut(captured, plan, directory)
    plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
    nodes = tuple(NodeRef(name, address) for name, address in cluster.addresses.items())
    names = [node.name for node in nodes]
    stages = tuple(
        dataclasses.replace(stage, node=names[i], replicas=tuple(n for n in (names[-1], *names) if n != names[i])[:2] if standbys else ())
        for i, stage in enumerate(plan.stages)
    )
    inputs = [{captured.structure.inputs[0].name: np.random.default_rng(i).standard_normal((8, 256)).astype(np.float32)} for i in range(16)]
    with torch.inference_mode():
        expected = [module(torch.from_numpy(next(iter(given.values())))).numpy() for given in inputs]
    return dataclasses.replace(plan, nodes=nodes, stages=stages), shards, inputs, expected


async def client(address: str, load: Load, inputs: list[dict[str, np.ndarray]], expected: list[np.ndarray], number: int) -> None:
    async with splitnet.AsyncClient(address, NAME, timeout_s=60.0) as asking:
        turn = number
        while True:
            turn += 1
            i, asked_s = turn % len(inputs), time.time()
            try:
                (answer,) = (await asking.infer(inputs[i], retry=True)).values()
            except SplitnetError as error:
                load.failed[f"{type(error).__name__}: {error.message[:80]}"] += 1
                await asyncio.sleep(0.05)
                continue
            load.times.append((asked_s, time.time()))
            load.answered += 1
            load.different += not np.array_equal(answer, expected[i])


def active(statuses: list[NodeStatus]) -> tuple[int, set[str], str]:
    """The newest active generation, who holds it, and its ingress."""
    held = [(d.generation, node.name, d.ingress) for node in statuses for d in node.deployments if d.name == NAME and d.state == "active"]
    newest = max((generation for generation, _, _ in held), default=0)
    return newest, {name for g, name, _ in held if g == newest}, next((name for g, name, i in held if g == newest and i), "")


async def whole(cluster: LocalCluster) -> str:
    """Waits until every node holds the active generation; returns the ingress's name."""
    until_s = time.monotonic() + _WHOLE_S
    while True:
        statuses = await status_async(cluster.cluster(), timeout_s=2.0)
        _, holders, ingress = active(statuses)
        if len(holders) == len(cluster.names) and ingress:
            return ingress
        if time.monotonic() > until_s:
            raise SystemExit(
                f"not whole after {_WHOLE_S:g} s: {[(s.name, s.error, [(d.generation, d.state) for d in s.deployments]) for s in statuses]}"
            )
        await asyncio.sleep(0.1)


async def noticed(cluster: LocalCluster, victim: str, since_s: float) -> float | None:
    """Seconds from the signal until somebody noted the loss."""
    others = [node for node in cluster.cluster().nodes if node.name != victim]
    statuses = await status_async([NodeRef(n.name, n.address) for n in others], timeout_s=2.0)
    found = [e.time_s for s in statuses for e in s.events if e.kind in ("lost", "replaced") and victim in e.node and e.time_s >= since_s]
    return min(found) - since_s if found else None


async def kills(arguments: argparse.Namespace) -> None:
    chance = random.Random(arguments.seed)
    with LocalCluster(4, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
        plan, shards, inputs, expected = make(cluster, Path(folder), standbys=True)
        await deploy_async(plan, shards, name=NAME)
        load = Load()
        clients = [asyncio.create_task(client(plan.ingress.address, load, inputs, expected, i)) for i in range(arguments.clients)]
        detections: list[float] = []
        recoveries: dict[str, list[float]] = {"ingress": [], "stage": [], "standby": []}
        ingress = await whole(cluster)
        for count in range(arguments.kills):
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            victim = chance.choice(cluster.names)
            how = arguments.how if arguments.how != "mixed" else chance.choice(("kill", "stop"))
            role = await role_of(cluster, victim, ingress)
            load.times.clear()
            killed_s = time.time()
            os.kill(cluster.pid(victim), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            await asyncio.sleep(arguments.settle)
            recovered_s = load.recovery_s(killed_s)
            while recovered_s is None and time.time() - killed_s < _WHOLE_S:
                await asyncio.sleep(0.05)
                recovered_s = load.recovery_s(killed_s)
            detected_s = await noticed(cluster, victim, killed_s)
            if recovered_s is not None:
                recoveries[role].append(recovered_s)
            if detected_s is not None:
                detections.append(detected_s)
            await asyncio.to_thread(cluster.kill, victim)
            await asyncio.to_thread(cluster.restart, victim)
            ingress = await whole(cluster)
            shown = [f"{figure:.3f}" if figure is not None else "-" for figure in (detected_s, recovered_s)]
            print(
                f"{count + 1:4} {how:4} {victim} ({role:7}) noticed after {shown[0]} s, answers again after {shown[1]} s; {load.answered} answered, {sum(load.failed.values())} failed",
                flush=True,
            )
        await stop(clients)
        print(
            f"\n{arguments.kills} kills, {arguments.clients} clients: {load.answered} answered, {sum(load.failed.values())} failed, {load.different} with other bits"
        )
        for what, number in load.failed.most_common(5):
            print(f"  {number} x {what}")
        show("detection", detections)
        for role, times in recoveries.items():
            show(f"recovery, {role}", times)


async def role_of(cluster: LocalCluster, victim: str, ingress: str) -> str:
    if victim == ingress:
        return "ingress"
    (status,) = [s for s in await status_async(cluster.cluster(), timeout_s=2.0) if s.name == victim]
    generation = max((d.generation for d in status.deployments if d.name == NAME), default=0)
    serves = any(not stage.standby for d in status.deployments if d.generation == generation for stage in d.stages)
    return "stage" if serves else "standby"


def show(what: str, times: list[float]) -> None:
    if times:
        ordered = sorted(times)
        print(
            f"{what:20} median {statistics.median(ordered):.3f} s   p95 {ordered[int(0.95 * (len(ordered) - 1))]:.3f} s   longest {ordered[-1]:.3f} s   ({len(times)})"
        )


async def stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------------------------ resets


class Cable:
    """Between the ingress and a node; breaks all connections when told."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def reset(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled at the end, by whoever ends the loop
            far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
            both = {writer, far_writer}
            self._writers |= both
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
            self._writers -= both

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()


async def resets(arguments: argparse.Namespace) -> None:
    """Every hundredth step fails, by its connection: with all the others that are on it at that moment."""
    with LocalCluster(4, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
        plan, shards, inputs, expected = make(cluster, Path(folder), standbys=False)
        cable = Cable(plan.nodes[1].address)
        address = await cable.open()
        await deploy_async(
            dataclasses.replace(
                plan, nodes=tuple(NodeRef(n.name, address if n.name == plan.nodes[1].name else n.address) for n in plan.nodes)
            ),
            shards,
            name=NAME,
        )
        load = Load()
        clients = [asyncio.create_task(client(plan.ingress.address, load, inputs, expected, i)) for i in range(arguments.clients)]
        await asyncio.sleep(2.0)
        ratios = []
        for _ in range(arguments.rounds):
            speeds = []
            for disturbed in (False, True):
                begun, started_s, broken_at = load.answered, time.monotonic(), load.answered
                while time.monotonic() - started_s < arguments.seconds:
                    await asyncio.sleep(0.002)
                    if disturbed and load.answered - broken_at >= 100:  # one of a hundred
                        cable.reset()
                        broken_at = load.answered
                speeds.append((load.answered - begun) / (time.monotonic() - started_s))
            ratios.append(speeds[1] / speeds[0])
            print(f"undisturbed {speeds[0]:.1f}/s, 1% failing {speeds[1]:.1f}/s: {ratios[-1]:.3f}", flush=True)
        await stop(clients)
        print(f"median ratio {statistics.median(ratios):.3f}; {sum(load.failed.values())} failed, {load.different} with other bits")
        for what, number in load.failed.most_common(5):
            print(f"  {number} x {what}")


async def cost(arguments: argparse.Namespace) -> None:
    """Throughput with heartbeats and standbys against without, in turns; both clusters run all the time, one idle."""
    silent = Heartbeat(0.0, 0.4, 4.0)
    with (
        LocalCluster(4, processes=True) as able,
        LocalCluster(4, processes=True, heartbeat=silent) as plain,
        tempfile.TemporaryDirectory() as folder,
    ):
        speeds: dict[str, list[float]] = {"plain": [], "recoverable": []}
        clients: dict[str, tuple[str, list[dict[str, np.ndarray]], list[np.ndarray]]] = {}
        for name, cluster in (("plain", plain), ("recoverable", able)):
            (Path(folder) / name).mkdir()
            plan, shards, inputs, expected = make(cluster, Path(folder) / name, standbys=name == "recoverable")
            await deploy_async(plan, shards, name=NAME)
            clients[name] = plan.ingress.address, inputs, expected
        for turn in range(arguments.rounds):
            for name in sorted(clients, reverse=bool(turn % 2)):
                address, inputs, expected = clients[name]
                load = Load()
                tasks = [asyncio.create_task(client(address, load, inputs, expected, i)) for i in range(arguments.clients)]
                await asyncio.sleep(0.5)
                begun, started_s = load.answered, time.monotonic()
                await asyncio.sleep(arguments.seconds)
                speeds[name].append((load.answered - begun) / (time.monotonic() - started_s))
                await stop(tasks)
        ratios = [a / b for a, b in zip(speeds["recoverable"], speeds["plain"], strict=True)]
        for name, found in speeds.items():
            print(f"{name:12} {statistics.median(found):.1f} requests/s")
        print(f"recoverable / plain: median {statistics.median(ratios):.3f} (rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--how", choices=("kill", "stop", "mixed"), default="kill")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--settle", type=float, default=0.7, help="seconds to look at after each kill, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resets", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(resets(arguments) if arguments.resets else cost(arguments) if arguments.cost else kills(arguments))


if __name__ == "__main__":
    main()
