"""The link fit, the link probe over a real server of known speed, and the reference kernel."""

from __future__ import annotations

import asyncio
import importlib
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.channel import SERVER_OPTIONS, open_channel, stub
from splitnet.errors import ProtocolError
from splitnet.linkprobe import LinkSample, fit_link, measure_link
from splitnet.reference_kernel import measure_reference
from splitnet.rpc.v1 import node_pb2, node_pb2_grpc


def samples(
    round_trip_s: float, bandwidth: float, noise: Callable[[], float], sizes: tuple[int, ...] = (1, 4096, 65536, 1 << 20)
) -> list[LinkSample]:
    return [LinkSample(size, (round_trip_s + size / bandwidth) * noise()) for size in sizes for _ in range(8)]


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-5, 0.5), st.floats(1e4, 1e10))
def test_exact_samples_give_the_link_back(round_trip_s: float, bandwidth: float) -> None:
    fit = fit_link(samples(round_trip_s, bandwidth, lambda: 1.0))
    assert fit.round_trip_s == pytest.approx(round_trip_s + 1 / bandwidth)
    if (1 << 20) / bandwidth > 1e-3 * round_trip_s:  # else the bandwidth drowns in rounding
        assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.01)
    assert fit.bandwidth_bytes_per_s > 0
    assert fit.jitter_s == pytest.approx(0.0, abs=1e-12)


def test_a_fifth_of_outliers_hardly_moves_the_fit() -> None:
    rng = random.Random(3)
    fit = fit_link(samples(0.010, 1e6, lambda: 5.0 if rng.random() < 0.2 else rng.uniform(0.98, 1.02)))
    assert fit.round_trip_s == pytest.approx(0.010, rel=0.05)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1e6, rel=0.15)
    assert fit.jitter_s < 0.001


def test_noise_that_hides_the_slope_gives_a_finite_bandwidth() -> None:
    fit = fit_link([LinkSample(1, 0.002), LinkSample(1, 0.003), LinkSample(4096, 0.001), LinkSample(4096, 0.001)])
    assert fit.jitter_s == pytest.approx(0.0005)
    assert fit.bandwidth_bytes_per_s == pytest.approx(4096 / 0.0005)
    with pytest.raises(ValueError, match="two sizes"):
        fit_link([LinkSample(1, 0.1), LinkSample(1, 0.1)])


class _Shaped(node_pb2_grpc.NodeServicer):
    """Acknowledges as a link of this round trip and bandwidth would let it."""

    def __init__(self, round_trip_s: float, bandwidth: float, lie: int = 0) -> None:
        self.round_trip_s, self.bandwidth, self.lie = round_trip_s, bandwidth, lie

    async def Probe(self, request_iterator: AsyncIterator[node_pb2.ProbeRequest], context: Any) -> AsyncIterator[node_pb2.ProbeReply]:
        async for request in request_iterator:
            await asyncio.sleep(self.round_trip_s + len(request.payload) / self.bandwidth)
            yield node_pb2.ProbeReply(received_bytes=len(request.payload) + self.lie)


async def _measure(servicer: node_pb2_grpc.NodeServicer, budget_s: float) -> Any:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    node_pb2_grpc.add_NodeServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            return await measure_link(stub(channel), budget_s)
    finally:
        await server.stop(None)


async def test_a_slow_link_is_measured_within_the_budget() -> None:
    start = time.perf_counter()
    found = await _measure(_Shaped(0.004, 625_000.0), budget_s=0.8)  # 5 Mbit/s
    assert time.perf_counter() - start < 4
    assert found.round_trip_s == pytest.approx(0.005, rel=0.6)
    assert found.bandwidth_bytes_per_s == pytest.approx(625_000, rel=0.25)
    assert max(sample.bytes for sample in found.samples) < 1 << 20


async def test_a_fast_link_gets_large_payloads() -> None:
    found = await _measure(_Shaped(0.0, 1e12), budget_s=1.0)
    assert max(sample.bytes for sample in found.samples) >= 1 << 20
    assert found.bandwidth_bytes_per_s > 2e7
    assert len([s for s in found.samples if s.bytes == 1]) >= 3


async def test_a_peer_that_miscounts_is_refused() -> None:
    with pytest.raises(ProtocolError, match="sent 1 bytes, 8 were acknowledged"):
        await _measure(_Shaped(0.0, 1e12, lie=7), budget_s=0.2)


def test_the_reference_kernel_takes_its_threads_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    found = measure_reference(1, budget_s=0.1)
    assert found.backend == "torch"
    assert found.repeats >= 3
    assert 1e-4 < found.seconds < 5
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"):
        measure_reference(0)


def test_the_reference_kernel_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without_torch(name: str) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name)

    monkeypatch.setattr("splitnet.reference_kernel.importlib.import_module", without_torch)
    found = measure_reference(1, budget_s=0.1)
    assert found.backend == "numpy"
    assert 1e-4 < found.seconds < 5
