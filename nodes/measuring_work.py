"""What a node spends besides computing when it is kept busy: processor seconds, of the whole process, beside a thread that computes.

Two private servers serve a model that does nothing, one of them alone, then both (see `nodes.measuring_overhead`); what a request over both
spends more is what a hop costs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import threading
import time
from typing import TYPE_CHECKING, Self

import numpy as np

from splitnet import background
from splitnet.client import AsyncClient
from splitnet.wire import CHUNK_BYTES

if TYPE_CHECKING:
    from nodes.server import NodeServer

__all__ = ["PAUSE_S", "SMALL", "Work", "measure_work"]

PAUSE_S = 0.005  # as between requests: what is done without a pause finds everything awake, and takes half the time
_REPEATS = 3
_SHORTEST_S = 0.06
_FEWEST = 8
_AT_ONCE = 2
SMALL, _LARGE = 16, CHUNK_BYTES // 4  # elements of float32
_OPERATOR = 1 << 18  # elements: a tenth of a millisecond, two megabytes


@dataclasses.dataclass(frozen=True)
class Work:
    stage_cpu_s: float
    message_cpu_s: float
    request_cpu_s: float
    byte_cpu_s: float


async def measure_work(one: NodeServer, budget_s: float) -> Work:
    """Two hops more, and a stage, are what a request over both servers spends more than one to the first alone. The client shares the
    servers' thread. Another one computes meanwhile, as on a node that is kept busy: who shares the interpreter's lock and the caches with an
    engine, and has to be woken for each message, spends two to four times the processor time of one that is kept awake."""
    share_s = max(budget_s / (7 * _REPEATS), _SHORTEST_S)
    small, large = np.zeros(SMALL, np.float32), np.zeros(_LARGE, np.float32)
    found = []
    async with AsyncClient(one.address, "alone") as alone, AsyncClient(one.address, "apart") as apart:
        cases = [(client, array) for array in (small, large) for client in (alone, apart)]
        for client, array in cases:
            await client.infer({"v0": array}, retry=True)  # what is done once is done
        with _Computing() as computing:
            for _ in range(_REPEATS):
                pause_s = await _pause_s(computing, share_s)  # before each of these
                stage_s = await _handing_over_s(one, computing, share_s) - pause_s
                here_s, over_s, large_here_s, large_over_s = [await _spent_s(client, array, computing, share_s) for client, array in cases]
                hop_s = (over_s - here_s - stage_s) / 2
                large_hop_s = (large_over_s - large_here_s - stage_s) / 2
                request_s = (here_s - pause_s / _AT_ONCE - stage_s) * await _servers_share(one.address, small, share_s)
                found.append((stage_s, hop_s / 2, request_s, (large_hop_s - hop_s) / 2 / (large.nbytes - small.nbytes)))
    return Work(*(statistics.median(figures) for figures in zip(*found, strict=True)))


class _Computing:
    """A thread that does what an engine's does: one operator after another, each a fraction of a millisecond without the interpreter's lock."""

    def __init__(self) -> None:
        self._stop = False
        self._spent_s = 0.0
        self._thread = threading.Thread(target=self._work, name="splitnet-imitation", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def others_s(self) -> float:
        """The process's processor seconds, this thread's left out."""
        return time.process_time() - self._spent_s

    def _work(self) -> None:
        a, b = np.ones(_OPERATOR, np.float32), np.ones(_OPERATOR, np.float32)
        while not self._stop:
            np.multiply(a, b, out=a)
            self._spent_s = time.thread_time()


async def _handing_over_s(server: NodeServer, computing: _Computing, budget_s: float) -> float:
    """Processor seconds of a job of the compute thread, from the event loop and back."""
    before_s, count, end = computing.others_s(), 0, time.perf_counter() + budget_s
    while time.perf_counter() < end or count < _FEWEST:
        await asyncio.sleep(PAUSE_S)
        await server.compute.call(lambda: None)
        count += 1
    return (computing.others_s() - before_s) / count


async def _pause_s(computing: _Computing, budget_s: float) -> float:
    """Processor seconds of the pause that all of these have in them."""
    before_s, count, end = computing.others_s(), 0, time.perf_counter() + budget_s
    while time.perf_counter() < end or count < _FEWEST:
        await asyncio.sleep(PAUSE_S)
        count += 1
    return (computing.others_s() - before_s) / count


async def _spent_s(client: AsyncClient, array: np.ndarray, computing: _Computing, budget_s: float) -> float:
    """Processor seconds per request."""
    before_s = computing.others_s()
    count = await _many(client, array, budget_s)
    return (computing.others_s() - before_s) / count


async def _servers_share(address: str, array: np.ndarray, budget_s: float) -> float:
    """Of what client and servers spend on a request: the servers' part, from a client in a thread of its own."""

    async def asked() -> tuple[float, float]:
        async with AsyncClient(address, "alone") as client:
            await client.infer({"v0": array}, retry=True)
            before_s = time.thread_time()
            count = await _many(client, array, budget_s)
            return (time.thread_time() - before_s) / count, count

    before_s = time.thread_time()
    client_s, count = await asyncio.to_thread(background.run, asked())
    servers_s = (time.thread_time() - before_s) / (count + 1)
    return servers_s / (servers_s + client_s)


async def _many(client: AsyncClient, array: np.ndarray, budget_s: float) -> int:
    """How many requests were answered: with the pauses that computing makes between them, and two at once, because of what arrives at a node
    (several tensors, often) only the first has to wake it."""
    count, end = 0, time.perf_counter() + budget_s
    while time.perf_counter() < end or count < _FEWEST:
        await asyncio.sleep(PAUSE_S)
        await asyncio.gather(*(client.infer({"v0": array}, retry=True) for _ in range(_AT_ONCE)))
        count += _AT_ONCE
    return count
