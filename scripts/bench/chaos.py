"""Nodes lost at random under load: every accepted request answered, with the same bits and the same tokens, and how long that took.

    python scripts/bench/chaos.py [--kills 200] [--how kill|stop|drop|there|back|mixed] [--load tensors|text|both] [--seed 0] [--tally FILE]
    python scripts/bench/chaos.py --resets                  1% of steps failing, against undisturbed
    python scripts/bench/chaos.py --cost                    what being recoverable costs without faults

Four nodes, processes of their own; three stages of each model, each with two standbys. `--clients` tasks for each model send requests all the time and compare each answer
with the whole model's. A loss comes when the deployments are whole: a SIGKILL (kill), a SIGSTOP (stop), a cable to the node that carries nothing any more
(drop), nothing to the node (there), or nothing from it (back). Then: detection is from the loss to the "lost" event of whoever notices; recovery as `Load.recovery_s` says; the node is
started again, or the cable mended, and it is taken in. Figures of several runs with a `--tally` add up there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from cables import Cable
from chaos_loads import Load, Served, serve_tensors, serve_text

from nodes.testing import LocalCluster
from splitnet.cluster import Cluster
from splitnet.heartbeat import Heartbeat
from splitnet.install import deploy_async, status_async
from splitnet.node_status import NodeStatus
from splitnet.plan import NodeRef

_WHOLE_S, _MOST_LOOKS = 60.0, 600
_CUTS = {"drop": ("there", "back"), "there": ("there",), "back": ("back",)}
_MAKERS = {"tensors": (serve_tensors,), "text": (serve_text,), "both": (serve_tensors, serve_text)}


def active(statuses: list[NodeStatus], name: str) -> tuple[int, set[str], str]:
    """The newest active generation, who holds it, and its ingress."""
    held = [(d.generation, node.name, d.ingress) for node in statuses for d in node.deployments if d.name == name and d.state == "active"]
    newest = max((generation for generation, _, _ in held), default=0)
    return newest, {name for g, name, _ in held if g == newest}, next((name for g, name, i in held if g == newest and i), "")


async def whole(cluster: LocalCluster, served: list[Served]) -> dict[str, str]:
    """Waits until every node holds the active generations; returns the ingresses."""
    for _ in range(_MOST_LOOKS):  # and no clock: whoever freezes this process must not make it give up
        statuses = await status_async(cluster.cluster(), timeout_s=2.0)
        found = {each.name: active(statuses, each.name) for each in served}
        if all(len(holders) == len(cluster.names) and ingress for _, holders, ingress in found.values()):
            return {name: ingress for name, (_, _, ingress) in found.items()}
        await asyncio.sleep(0.1)
    held = [(s.name, s.error, [(d.name, d.generation, d.state) for d in s.deployments]) for s in statuses]
    raise SystemExit(f"not whole after {_MOST_LOOKS} looks: {held}")


async def noticed(cluster: LocalCluster, victim: str, since_s: float) -> float | None:
    """Seconds from the loss until somebody noted it."""
    others = [node for node in cluster.cluster().nodes if node.name != victim]
    statuses = await status_async([NodeRef(n.name, n.address) for n in others], timeout_s=2.0)
    found = [e.time_s for s in statuses for e in s.events if e.kind in ("lost", "replaced") and victim in e.node and e.time_s >= since_s]
    return min(found) - since_s if found else None


def role_of(statuses: list[NodeStatus], victim: str, ingresses: dict[str, str]) -> str:
    if victim in ingresses.values():
        return "ingress"
    found = next(s for s in statuses if s.name == victim)
    newest = {name: active(statuses, name)[0] for name in ingresses}
    serves = any(not stage.standby for d in found.deployments if d.generation == newest.get(d.name) for stage in d.stages)
    return "stage" if serves else "standby"


class Tally:
    """Figures that add up over runs, in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.kept: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {"counts": {}, "times": {}}

    def count(self, what: str, number: int = 1) -> None:
        self.kept["counts"][what] = self.kept["counts"].get(what, 0) + number

    def time(self, what: str, seconds: float | None) -> None:
        if seconds is not None:
            self.kept["times"].setdefault(what, []).append(round(seconds, 4))

    def save(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(self.kept, indent=1))

    def show(self) -> None:
        print("\n" + "; ".join(f"{number} {what}" for what, number in self.kept["counts"].items()))
        for what, times in self.kept["times"].items():
            ordered = sorted(times)
            p95 = ordered[int(0.95 * (len(ordered) - 1))]
            print(f"{what:30} median {statistics.median(ordered):.3f} s   p95 {p95:.3f} s   longest {ordered[-1]:.3f} s   ({len(times)})")


async def kills(arguments: argparse.Namespace) -> None:
    chance, tally = random.Random(arguments.seed), Tally(arguments.tally)
    hows = ("kill", "stop", "drop", "there", "back") if arguments.how == "mixed" else (arguments.how,)
    with LocalCluster(4, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
        plain, cables = cluster.cluster(), {}
        wired = plain
        if set(hows) & set(_CUTS):
            cables = {node.name: Cable(node.address) for node in plain.nodes}
            wired = Cluster(tuple([dataclasses.replace(n, address=await cables[n.name].open()) for n in plain.nodes]), plain.links)
        served = [await asyncio.to_thread(make, wired, Path(folder)) for make in _MAKERS[arguments.load]]
        loads = {each.name: Load() for each in served}
        clients: list[asyncio.Task[None]] = []
        for each in served:
            await deploy_async(each.plan, each.shards, name=each.name)
            address, load = each.plan.ingress.address, loads[each.name]
            clients += [asyncio.create_task(each.client(address, load, number)) for number in range(arguments.clients)]
        ingresses = await whole(cluster, served)
        began_s = time.monotonic()
        for number in range(arguments.kills):
            if time.monotonic() - began_s > arguments.most_s:
                break
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            victim, how = chance.choice(cluster.names), chance.choice(hows)
            role = role_of(await status_async(cluster.cluster(), timeout_s=2.0), victim, ingresses)
            for load in loads.values():
                load.times.clear()
            lost_s = time.time()
            if how in _CUTS:
                cables[victim].cut(*_CUTS[how])
            else:
                os.kill(cluster.pid(victim), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            await asyncio.sleep(arguments.settle)
            recovered = {name: load.recovery_s(lost_s) for name, load in loads.items()}
            while None in recovered.values() and time.time() - lost_s < _WHOLE_S:
                await asyncio.sleep(0.05)
                recovered = {name: load.recovery_s(lost_s) for name, load in loads.items()}
            detected_s = await noticed(cluster, victim, lost_s)
            if how in _CUTS:
                cables[victim].mend()
            else:
                await asyncio.to_thread(cluster.kill, victim)
                await asyncio.to_thread(cluster.restart, victim)
            ingresses = await whole(cluster, served)
            tally.count(f"x {how} of the {role}")
            tally.time(f"detection, {how}", detected_s)
            for name, seconds in recovered.items():
                tally.time(f"recovery, {role}, {name}", seconds)
            shown = ", ".join(f"{name} {'-' if s is None else f'{s:.3f}'}" for name, s in recovered.items())
            so_far = "; ".join(
                f"{name} {load.answered} answered, {load.failed.total()} failed, {load.different} different" for name, load in loads.items()
            )
            print(
                f"{number + 1:4} {how:5} {victim} ({role:7}) noticed {'-' if detected_s is None else f'{detected_s:.3f}'} s, recovered {shown} s; {so_far}",
                flush=True,
            )
        await stop(clients)
        for name, load in loads.items():
            for what, count in (
                ("answered", load.answered),
                ("tokens", load.tokens),
                ("failed", load.failed.total()),
                ("different", load.different),
            ):
                tally.count(f"{name} {what}", count)
            for failure, count in load.failed.most_common(5):
                print(f"  {name}: {count} x {failure}")
    tally.save()
    tally.show()


async def stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def resets(arguments: argparse.Namespace) -> None:
    """Every hundredth step fails, by its connection: with all the others that are on it at that moment."""
    with LocalCluster(4, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
        plain = cluster.cluster()
        cable = Cable(plain.nodes[1].address)
        address = await cable.open()
        wired = Cluster(tuple(dataclasses.replace(n, address=address) if i == 1 else n for i, n in enumerate(plain.nodes)), plain.links)
        served = await asyncio.to_thread(serve_tensors, wired, Path(folder), standbys=False)
        await deploy_async(served.plan, served.shards, name=served.name)
        load = Load()
        clients = [asyncio.create_task(served.client(served.plan.ingress.address, load, i)) for i in range(arguments.clients)]
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
        print(f"median ratio {statistics.median(ratios):.3f}; {load.failed.total()} failed, {load.different} with other bits")
        for what, number in load.failed.most_common(5):
            print(f"  {number} x {what}")


class _Asleep:
    """All processes of a cluster are stopped (SIGSTOP) but while it is its turn: what is idle must not take the other's processor."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._processes = [psutil.Process(cluster.pid(name)) for name in cluster.names]
        for process in self._processes:
            process.suspend()

    def wake(self) -> None:
        for process in self._processes:
            process.resume()

    @contextlib.contextmanager
    def awake(self) -> Any:
        self.wake()
        try:
            yield
        finally:
            for process in self._processes:
                process.suspend()

    def processor_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


async def cost(arguments: argparse.Namespace) -> None:
    """With heartbeats, standbys and followers against without, in many short turns; whoever has no turn is asleep. A box that is busy for a moment spoils one turn; the medians
    of the ratios of neighbouring turns count, of processor seconds per request and of requests per second."""
    silent = Heartbeat(0.0, 0.45, 4.0)
    with (
        LocalCluster(4, processes=True) as able,
        LocalCluster(4, processes=True, heartbeat=silent) as plain,
        tempfile.TemporaryDirectory() as folder,
    ):
        both: dict[str, tuple[Served, _Asleep]] = {}
        for name, cluster in (("plain", plain), ("recoverable", able)):
            (Path(folder) / name).mkdir()
            served = await asyncio.to_thread(serve_tensors, cluster.cluster(), Path(folder) / name, standbys=name == "recoverable")
            await deploy_async(served.plan, served.shards, name=served.name)
            await asyncio.sleep(1.0)
            both[name] = served, _Asleep(cluster)
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
        failed: Counter[str] = Counter()
        for turn in range(arguments.rounds + 1):
            for name in sorted(both, reverse=bool(turn % 2)):
                served, asleep = both[name]
                load = Load()
                with asleep.awake():
                    tasks = [asyncio.create_task(served.client(served.plan.ingress.address, load, i)) for i in range(arguments.clients)]
                    await asyncio.sleep(0.5)
                    begun, started_s, processor_s = load.answered, time.monotonic(), asleep.processor_s()
                    await asyncio.sleep(arguments.seconds)
                    count, took_s = load.answered - begun, time.monotonic() - started_s
                    processor_s = asleep.processor_s() - processor_s
                    await stop(tasks)
                    await asyncio.sleep(0.1)
                failed += load.failed
                if turn:  # the first one warms up
                    figures[name].append((count / took_s, processor_s / max(count, 1)))
        for _, asleep in both.values():
            asleep.wake()  # else they do not hear that they are to stop
        for name, found in figures.items():
            print(
                f"{name:12} {statistics.median(f[0] for f in found):.1f} requests/s, {1e3 * statistics.median(f[1] for f in found):.3f} ms of processor each"
            )
        for what, at in (("requests per second", 0), ("processor seconds per request", 1)):
            ratios = sorted(a[at] / b[at] for a, b in zip(figures["recoverable"], figures["plain"], strict=True))
            quarter = len(ratios) // 4
            print(
                f"recoverable / plain, {what}: median {statistics.median(ratios):.3f}, middle half {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} ({len(ratios)} pairs)"
            )
        for what, number in failed.most_common(5):
            print(f"  {number} x {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--how", choices=("kill", "stop", *_CUTS, "mixed"), default="kill")
    parser.add_argument("--load", choices=tuple(_MAKERS), default="both")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--settle", type=float, default=0.7, help="seconds to look at after each loss, at least")
    parser.add_argument("--most", dest="most_s", type=float, default=1e9, help="seconds after which no more are lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tally", type=Path, help="a file in which the figures of several runs add up")
    parser.add_argument("--resets", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(resets(arguments) if arguments.resets else cost(arguments) if arguments.cost else kills(arguments))


if __name__ == "__main__":
    main()
