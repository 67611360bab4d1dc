"""The link probe: its fit and its schedule on links of a virtual clock, and the RPC over a real server of known speed.

Real links, through the testbed's relay and the kernel's token buckets: tests/testbed/test_probe_on_links.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.channel import SERVER_OPTIONS, open_channel, stub
from splitnet.errors import ProtocolError
from splitnet.linkprobe import LinkMeasurement, LinkSample, Train, fit_link, measure_link, take_turns
from splitnet.rpc.v1 import node_pb2, node_pb2_grpc

MBIT = 1e6 / 8
LINE_BYTES_PER_S = 2e9  # what software and cable allow


class VirtualLink:
    """A token bucket of `burst` bytes behind a window that opens by slow start after a pause, on a clock of its own."""

    def __init__(
        self,
        round_trip_s: float,
        bandwidth: float,
        *,
        burst: float = 0.0,
        jitter_s: float = 0.0,
        stalls: float = 0.0,
        message_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.round_trip_s, self.bandwidth, self.burst, self.jitter_s, self.stalls = round_trip_s, bandwidth, burst, jitter_s, stalls
        self.message_s = message_s
        self.held_up_s = 0.0  # in the first train
        self.now_s = 100.0
        self._free_s = 0.0  # when the bucket will have been paid for
        self._random = random.Random(seed)

    def measure(self, budget_s: float = 2.0) -> LinkMeasurement:
        end_s = self.now_s + budget_s
        return fit_link(*asyncio.run(take_turns(self._ping, self._train, lambda: end_s - self.now_s, budget_s)))

    async def _ping(self) -> float:
        self.now_s += 0.005
        return self._messages(1, 1)[-1].seconds

    async def _train(self, size: int) -> Train:
        count = min(max(size >> 14, 4), 16)
        self._free_s, self.held_up_s = max(self._free_s, self.now_s) + self.held_up_s, 0.0
        return self._messages(count, size // count)

    def _messages(self, count: int, size: int) -> Train:
        sent_s, acknowledged_s, acks = self.now_s, self.now_s, []
        for k in range(1, count + 1):
            sent_s += size / LINE_BYTES_PER_S + self.message_s
            self._free_s = max(self._free_s, sent_s - self.burst / self.bandwidth) + size / self.bandwidth
            delay_s = self.round_trip_s + self._random.uniform(0, self.jitter_s)
            if self._random.random() < self.stalls:
                delay_s += self._random.uniform(0, 0.05)
            acknowledged_s = max(acknowledged_s, max(sent_s, self._free_s) + delay_s)
            acks.append(LinkSample(k * size, acknowledged_s - self.now_s))
        self.now_s = acknowledged_s
        return tuple(acks)


@settings(max_examples=150, deadline=None)
@given(st.floats(1, 1000), st.floats(1e-4, 0.15), st.integers(0, 256))
def test_a_bucket_does_not_hide_the_rate(mbit: float, round_trip_s: float, burst_kib: int) -> None:
    burst = min(burst_kib * 1024, 0.7 * mbit * MBIT)  # what a third of the time allowed can empty
    link = VirtualLink(round_trip_s, mbit * MBIT, burst=burst)
    fit = link.measure()
    assert fit.bandwidth_bytes_per_s == pytest.approx(mbit * MBIT, rel=0.1)
    assert fit.round_trip_s == pytest.approx(round_trip_s, rel=0.02, abs=1.1e-5)  # 8 us for a byte at 1 Mbit/s
    assert fit.jitter_s == pytest.approx(0.0, abs=1e-5)
    bucket_s = 2 * burst / (mbit * MBIT)  # a first train that passed at once is taken for a fast link
    assert link.now_s - 100 < 2.2 + 10 * round_trip_s + bucket_s


@settings(max_examples=60, deadline=None)
@given(st.floats(3, 300), st.floats(1e-3, 0.05), st.integers(0, 128), st.floats(0, 0.01), st.floats(0, 0.005), st.integers(0, 99))
def test_jitter_and_stalls_hardly_move_it(
    mbit: float, round_trip_s: float, burst_kib: int, jitter_s: float, stalls: float, seed: int
) -> None:
    fit = VirtualLink(round_trip_s, mbit * MBIT, burst=burst_kib * 1024, jitter_s=jitter_s, stalls=stalls, seed=seed).measure()
    assert fit.bandwidth_bytes_per_s == pytest.approx(mbit * MBIT, rel=0.25)
    assert fit.round_trip_s == pytest.approx(round_trip_s + jitter_s / 2, abs=0.5 * jitter_s + 1e-4)
    if not stalls:
        assert 0 <= fit.jitter_s <= 0.5 * jitter_s + 1e-9
    if jitter_s > 1e-4:
        assert fit.jitter_s > 0


@settings(max_examples=50, deadline=None)
@given(st.floats(2e8, 3e9), st.floats(5e-5, 1e-3))
def test_what_a_message_takes_does_not_hide_a_fast_link(bandwidth: float, round_trip_s: float) -> None:
    link = VirtualLink(round_trip_s, bandwidth, message_s=1e-4)
    fit = link.measure()
    # 100 us beside every message, of 1 MiB at the end
    least = 1 / (max(1 / bandwidth, 1 / LINE_BYTES_PER_S + 1e-4 / 2**20))
    assert fit.bandwidth_bytes_per_s == pytest.approx(least, rel=0.02)
    assert link.now_s - 100 < 2.5


@pytest.mark.parametrize("budget_s", [0.1, 0.2, 0.5, 5.0])
@pytest.mark.parametrize("mbit", [1, 30, 1000])
def test_any_budget_tells_a_bandwidth(budget_s: float, mbit: int) -> None:
    link = VirtualLink(0.02, mbit * MBIT)
    assert link.measure(budget_s).bandwidth_bytes_per_s == pytest.approx(mbit * MBIT, rel=0.02)
    assert link.now_s - 100 < max(1.2 * budget_s, 1.0)


def test_a_box_that_is_held_up_once_does_not_hide_the_rate() -> None:
    link = VirtualLink(0.005, 100 * MBIT)
    link.held_up_s = 0.9  # of a second
    assert link.measure(1.0).bandwidth_bytes_per_s == pytest.approx(100 * MBIT, rel=0.02)


def acks(size: int, seconds: float, start_s: float = 0.01) -> Train:
    return tuple(LinkSample(size * k // 4, start_s + seconds * k / 4) for k in range(1, 5))


def test_one_train_in_five_may_be_wrong() -> None:
    good, bad = [acks(40_000, 0.04)] * 5, [acks(40_000, 1.0)]
    assert fit_link([0.01], good + bad).bandwidth_bytes_per_s == pytest.approx(1e6)
    assert fit_link([0.01], bad + good).bandwidth_bytes_per_s == pytest.approx(1e6)


def test_the_first_train_of_a_length_counts_where_there_is_no_other() -> None:
    assert fit_link([0.01], [acks(40_000, 0.04)]).bandwidth_bytes_per_s == pytest.approx(1e6)
    assert fit_link([0.01], [acks(40_000, 0.001), acks(40_000, 0.04)]).bandwidth_bytes_per_s == pytest.approx(1e6)
    assert fit_link([0.01], [acks(400, 0.04), acks(400, 0.04), acks(40_000, 0.04)]).bandwidth_bytes_per_s == pytest.approx(1e6)


def test_noise_that_hides_the_slope_gives_a_finite_bandwidth() -> None:
    at_once = (LinkSample(2048, 0.001), LinkSample(4096, 0.001))
    fit = fit_link([0.002, 0.003], [at_once, at_once])
    assert fit.jitter_s == pytest.approx(0.0005)
    assert fit.bandwidth_bytes_per_s == pytest.approx(4096 / 0.0005)
    assert len(fit.samples) == 6
    with pytest.raises(ValueError, match="two messages"):
        fit_link([0.1], [(LinkSample(1, 0.1),)])
    with pytest.raises(ValueError, match="a round trip"):
        fit_link([], [at_once])


class _Shaped(node_pb2_grpc.NodeServicer):
    """Acknowledges as a link of this round trip and bandwidth would let it."""

    def __init__(self, round_trip_s: float, bandwidth: float, lie: int = 0) -> None:
        self.round_trip_s, self.bandwidth, self.lie = round_trip_s, bandwidth, lie

    async def Probe(self, request_iterator: AsyncIterator[node_pb2.ProbeRequest], context: Any) -> AsyncIterator[node_pb2.ProbeReply]:
        coming: asyncio.Queue[tuple[float, int] | None] = asyncio.Queue()

        async def take() -> None:
            free_s = 0.0
            async for request in request_iterator:
                free_s = max(free_s, time.perf_counter()) + len(request.payload) / self.bandwidth
                coming.put_nowait((free_s + self.round_trip_s, len(request.payload)))
            coming.put_nowait(None)

        taking = asyncio.ensure_future(take())
        try:
            while (next_one := await coming.get()) is not None:
                due_s, size = next_one
                await asyncio.sleep(max(due_s - time.perf_counter(), 0))
                yield node_pb2.ProbeReply(received_bytes=size + self.lie)
        finally:
            taking.cancel()


async def _measure(servicer: node_pb2_grpc.NodeServicer, budget_s: float) -> LinkMeasurement:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    node_pb2_grpc.add_NodeServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            return await measure_link(stub(channel), budget_s)
    finally:
        await server.stop(None)


async def test_a_slow_link_is_measured_over_a_real_stream() -> None:
    found = await _measure(_Shaped(0.004, 5 * MBIT), budget_s=0.8)
    assert found.round_trip_s >= 0.004
    assert 1 * MBIT < found.bandwidth_bytes_per_s < 8 * MBIT  # nothing bounds what a busy machine adds
    assert max(sample.bytes for sample in found.samples) < 1 << 20


async def test_a_fast_link_gets_large_payloads() -> None:
    found = await _measure(_Shaped(0.0, 1e12), budget_s=1.0)
    assert max(sample.bytes for sample in found.samples) >= 1 << 18
    assert found.bandwidth_bytes_per_s > 8 * MBIT
    assert len([s for s in found.samples if s.bytes == 1]) >= 3


async def test_a_peer_that_miscounts_is_refused() -> None:
    with pytest.raises(ProtocolError, match="sent 1 bytes, 8 were acknowledged"):
        await _measure(_Shaped(0.0, 1e12, lie=7), budget_s=0.2)


async def test_a_probe_that_is_cancelled_leaves_no_task() -> None:
    probing = asyncio.ensure_future(_measure(_Shaped(0.05, 1e5), budget_s=5.0))
    await asyncio.sleep(0.3)
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
    assert [task for task in asyncio.all_tasks() if "_write" in repr(task.get_coro())] == []
