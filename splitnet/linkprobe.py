"""How long a link takes, measured from one of its ends: round trip and bandwidth, fitted to seconds = round trip + bytes / bandwidth.

Payloads are sent over one Probe stream, in messages as large as an activation's chunks, and each is acknowledged. First the sizes grow
until the next one would not fit into the time allowed: a link of 5 Mbit/s stops at some 100 KiB, loopback at 4 MiB. Then all sizes take turns
until the time is up, so that what disturbs the box for a while disturbs them all and not one. The round trip is the median of the
smallest messages; the bandwidth is the one with the least mean relative error over all others, which is a weighted median (least absolute
deviations, Boscovich 1757; Bloomfield and Steiger 1983): a third of outliers does not move it, and no size is fitted at the cost of
the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitnet.errors import ProtocolError
from splitnet.rpc.v1 import node_pb2

__all__ = ["LinkMeasurement", "LinkSample", "fit_link", "measure_link"]

_PING_BYTES = 1
_PINGS = 20
_SIZES_BYTES = tuple(1 << k for k in range(12, 24, 2))  # 4 KiB, 16 KiB, ... 4 MiB
_MOST_ROUNDS = 40
_PAUSE_S = 0.005  # between one stage's message and the next there is computing
_NEARLY = 0.95
_MESSAGE_BYTES = 1 << 20  # payload of one message, as activations are chunked
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkSample:
    """`bytes` were sent, and `seconds` later the acknowledgement was back."""

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """`round_trip_s` is for a message of one byte (a one-way latency is half of it); `jitter_s` is the median absolute deviation of
    that. `bandwidth_bytes_per_s` is always positive and finite."""

    round_trip_s: float
    bandwidth_bytes_per_s: float
    jitter_s: float
    samples: tuple[LinkSample, ...]


async def measure_link(stub: Any, budget_s: float = 2.0) -> LinkMeasurement:
    """Measures the link from here to the node behind `stub` (a NodeStub on a grpc.aio channel), over its Probe RPC.

    Takes about `budget_s` (less on a fast link), at most `budget_s` + 10 s. Raises grpc.RpcError as it comes (the caller knows the address, and
    translates), ProtocolError for a peer that acknowledges something else than was sent. Leaves nothing behind when cancelled.
    """
    call = stub.Probe(timeout=budget_s + _GRACE_S)
    start = time.perf_counter()
    try:
        await _exchange(call, _PING_BYTES)  # connects
        samples: list[LinkSample] = []
        while len(samples) < 3 or (len(samples) < _PINGS and time.perf_counter() - start < budget_s / 4):
            samples.append(await _ping(call))
        sizes: list[int] = []
        for size in _SIZES_BYTES:
            if sizes and _expected_s(samples, size) > budget_s / 2 - (time.perf_counter() - start):
                break  # never before the smallest: pings alone tell no bandwidth, however far away the peer is
            samples.append(await _exchange(call, size))
            sizes.append(size)
        for _ in range(_MOST_ROUNDS):
            samples.append(await _ping(call))
            for size in sizes:
                if _expected_s(samples, size) > budget_s - (time.perf_counter() - start):
                    break
                samples.append(await _exchange(call, size))
            if time.perf_counter() - start > budget_s * _NEARLY:
                break
        await call.done_writing()
        await call.read()  # the end: a call that is cancelled while the peer sends its status makes gRPC log an error over there
        return fit_link(samples)
    finally:
        call.cancel()


async def _ping(call: Any) -> LinkSample:
    """After a pause, as activations come: two ends that talk without one are awake, and answer in half the time."""
    await asyncio.sleep(_PAUSE_S)
    return await _exchange(call, _PING_BYTES)


async def _exchange(call: Any, size: int) -> LinkSample:
    """Sends `size` bytes and waits until all have been acknowledged."""
    lengths = [min(_MESSAGE_BYTES, size - at) for at in range(0, size, _MESSAGE_BYTES)]
    messages = [node_pb2.ProbeRequest(payload=bytes(length)) for length in lengths]
    start = time.perf_counter()
    for message in messages:
        await call.write(message)
    for length in lengths:
        reply = await call.read()
        if not isinstance(reply, node_pb2.ProbeReply):  # grpc.aio.EOF: the peer ended the stream with OK
            raise ProtocolError("the peer ended the Probe stream early", remedy="update splitnet on the other node")
        if reply.received_bytes != length:
            raise ProtocolError(f"Probe: sent {length} bytes, {reply.received_bytes} were acknowledged")
    return LinkSample(size, time.perf_counter() - start)


def _expected_s(samples: Sequence[LinkSample], size: int) -> float:
    """How long a message of `size` is expected to take, judged by the largest yet; nothing is expected of pings alone."""
    round_trip = float(np.median([s.seconds for s in samples if s.bytes == _PING_BYTES]))
    largest = max(sample.bytes for sample in samples)
    beyond = float(np.median([s.seconds for s in samples if s.bytes == largest])) - round_trip
    return round_trip + max(beyond, 0.0) * size / largest


def fit_link(samples: Sequence[LinkSample]) -> LinkMeasurement:
    """Fits seconds = round trip + bytes / bandwidth. Needs at least two sizes; raises ValueError otherwise."""
    sizes = np.array([s.bytes for s in samples], dtype=np.float64)
    seconds = np.array([s.seconds for s in samples], dtype=np.float64)
    if len(np.unique(sizes)) < 2:
        raise ValueError("a bandwidth needs samples of at least two sizes")
    pings = seconds[sizes == sizes.min()]
    round_trip = float(np.median(pings))
    larger = sizes > sizes.min()
    # sum |round trip + x * bytes - seconds| / seconds = sum bytes / seconds * |x - (seconds - round trip) / bytes|
    beyond = sizes[larger] - sizes.min()
    slope = _weighted_median((seconds[larger] - round_trip) / beyond, beyond / seconds[larger])
    jitter = float(np.median(np.abs(pings - round_trip)))
    # Where noise hides the slope, the largest message took no longer to transmit than the noise: the link is at least that fast.
    floor = max(jitter, 1e-6 * round_trip, 1e-9) / float(sizes.max())
    return LinkMeasurement(round_trip_s=round_trip, bandwidth_bytes_per_s=1.0 / max(slope, floor), jitter_s=jitter, samples=tuple(samples))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
