"""How long a link takes, measured from one of its ends: round trip and bandwidth, for seconds = round trip + bytes / bandwidth.

What counts is the rate that a stream of activations gets, and a link may be faster at first: a token bucket lets its first bytes pass at line
speed, a TCP connection that was idle begins slowly. So bandwidth is read off trains: messages sent one behind the other, each acknowledged
by itself. Over the later half of a train the acknowledgements come at the link's sustained rate, whatever held or helped its beginning,
and their distance does not contain the latency. Trains grow until the next one would take more than a quarter of the time allowed, then
they are repeated until it is up, with a pause and a message of one byte between: the round trip is the median of those.

The bandwidth is the median, weighted by bytes, of the slopes between any two acknowledgements of one later half (Theil 1950, Sen 1968), over
all trains of at least half the greatest length. The first train of a length counts only where there is no other: it empties the bucket, and
widens the windows of TCP and HTTP/2.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitnet.errors import ProtocolError
from splitnet.rpc.v1 import node_pb2

__all__ = ["LinkMeasurement", "LinkSample", "Train", "fit_link", "measure_link", "take_turns"]

_PINGS = 20
_FEWEST_MESSAGES, _MOST_MESSAGES = 4, 16  # of a train: a weak node spends more on a small message than its link does
_MESSAGE_BYTES = 1 << 14  # of a train with neither
_SMALLEST_BYTES, _LARGEST_BYTES = 1 << 14, 1 << 24  # of a train; the messages of the longest are as large as an activation's chunks
_FEWEST_TRAINS, _MOST_TRAINS = 4, 50  # the fewest may take twice the time allowed: a box that is held up once must not be all that is seen
_PAUSE_S = 0.005  # between one stage's message and the next there is computing
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkSample:
    """`bytes` were sent, and `seconds` later the acknowledgement of the last of them was back."""

    bytes: int
    seconds: float


Train = tuple[LinkSample, ...]  #: the acknowledgements of one train's messages: bytes so far, seconds since it began


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """`round_trip_s` is for a message of one byte (a one-way latency is half of it); `jitter_s` is the median absolute deviation of
    that. `bandwidth_bytes_per_s` is always positive and finite. `samples`: the round trips, then whole trains."""

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
    try:
        start = time.perf_counter()
        await _train(call, 1, 1)  # connects

        async def ping() -> float:
            await asyncio.sleep(_PAUSE_S)  # two ends that talk without one are awake, and answer in half the time
            return (await _train(call, 1, 1))[-1].seconds

        async def train(size: int) -> Train:
            count = min(max(size // _MESSAGE_BYTES, _FEWEST_MESSAGES), _MOST_MESSAGES)
            return await _train(call, count, size // count)

        pings, trains = await take_turns(
            ping,
            train,
            lambda: budget_s - (time.perf_counter() - start),
            budget_s,
        )
        await call.done_writing()
        await call.read()  # the end: a call that is cancelled while the peer sends its status makes gRPC log an error over there
        return fit_link(pings, trains)
    finally:
        call.cancel()


async def take_turns(
    ping: Callable[[], Awaitable[float]], train: Callable[[int], Awaitable[Train]], left_s: Callable[[], float], budget_s: float
) -> tuple[list[float], list[Train]]:
    """What to send when: round trips first, trains that double, then both in turns. `train` takes the bytes; `left_s` is what is left
    of `budget_s`, all of which is used unless the link is fast. The last train may end late, where a link was fast at first only."""
    pings: list[float] = []
    while len(pings) < 3 or (len(pings) < _PINGS and left_s() > budget_s * 3 / 4):
        pings.append(await ping())
    size = _SMALLEST_BYTES
    trains = [await train(size)]  # however far away the peer is: round trips alone tell no bandwidth
    for _ in range(_MOST_TRAINS):
        spare_s = left_s() + (budget_s if len(trains) < _FEWEST_TRAINS else 0.0)
        longest_s = min(budget_s / 4, spare_s)
        if 4 * size <= _LARGEST_BYTES and _expected_s(pings, trains[-1], 4 * size) < longest_s / 2:
            size *= 4
        elif 2 * size <= _LARGEST_BYTES and _expected_s(pings, trains[-1], 2 * size) < longest_s:
            size *= 2
        elif _expected_s(pings, trains[-1], size) < spare_s:
            pings.append(await ping())
        else:
            break
        trains.append(await train(size))
    return pings, trains


async def _train(call: Any, count: int, size: int) -> Train:
    """Sends `count` messages of `size` bytes, and takes the acknowledgements while it does."""
    message = node_pb2.ProbeRequest(payload=bytes(size))
    start = time.perf_counter()
    writing = asyncio.ensure_future(_write(call, message, count))
    samples = []
    try:
        for k in range(1, count + 1):
            reply = await call.read()
            if not isinstance(reply, node_pb2.ProbeReply):  # grpc.aio.EOF: the peer ended the stream with OK
                raise ProtocolError("the peer ended the Probe stream early", remedy="update splitnet on the other node")
            if reply.received_bytes != size:
                raise ProtocolError(f"Probe: sent {size} bytes, {reply.received_bytes} were acknowledged")
            samples.append(LinkSample(k * size, time.perf_counter() - start))
        await writing  # not cancelled: gRPC would take that for the end of the call
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)  # what breaks the stream is raised by `read`
    return tuple(samples)


async def _write(call: Any, message: node_pb2.ProbeRequest, count: int) -> None:
    for _ in range(count):
        await call.write(message)


def _expected_s(pings: Sequence[float], last: Train, size: int) -> float:
    """How long a train of `size` is expected to take after that one: what the link was like before does not count."""
    round_trip = float(np.median(pings))
    return round_trip + max(last[-1].seconds - round_trip, 0.0) * size / last[-1].bytes


def fit_link(pings: Sequence[float], trains: Sequence[Train]) -> LinkMeasurement:
    """Fits seconds = round trip + bytes / bandwidth, see above. Needs a round trip and a train of two messages; raises ValueError otherwise."""
    if not pings or not any(len(train) > 1 for train in trains):
        raise ValueError("a link needs a round trip, and a train of at least two messages")
    round_trip = float(np.median(pings))
    jitter = float(np.median(np.abs(np.array(pings) - round_trip)))
    pairs = [pair for train in _settled(trains) for pair in itertools.combinations(train[(len(train) - 1) // 2 :], 2)]
    distances = np.array([b.bytes - a.bytes for a, b in pairs], dtype=np.float64)
    slope = _weighted_median(np.array([b.seconds - a.seconds for a, b in pairs]) / distances, distances)
    # Where noise hides the slope, the longest train took no longer to transmit than the noise: the link is at least that fast.
    floor = max(jitter, 1e-6 * round_trip, 1e-9) / max(train[-1].bytes for train in trains)
    samples = (*(LinkSample(1, seconds) for seconds in pings), *itertools.chain.from_iterable(trains))
    return LinkMeasurement(round_trip_s=round_trip, bandwidth_bytes_per_s=1.0 / max(slope, floor), jitter_s=jitter, samples=samples)


def _settled(trains: Sequence[Train]) -> list[Train]:
    """The trains to read a bandwidth off, see above."""
    longest = max(train[-1].bytes for train in trains)
    long = [train for train in trains if 2 * train[-1].bytes >= longest]
    lengths = [train[-1].bytes for train in long]
    again = [train for k, train in enumerate(long) if lengths[k] in lengths[:k]]
    return again or [long[lengths.index(longest)]]


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
