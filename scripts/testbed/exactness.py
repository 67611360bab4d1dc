"""How exact the relay is on this machine now: measured through it, before anything else is."""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from splitnet.explain import seconds_text, table
from testbed.bed import RelayProcess
from testbed.shaping import UNSHAPED, LinkShape
from testbed.spec import CLIENT

__all__ = ["Exactness", "ShapeCheck", "measure_exactness"]

_TARGET = "-exactness"  # no node is called so
_HEADER = struct.Struct("!Q")
_PINGS = 150
_SENDING_S = 0.3  # at the link's rate
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 25
_CALIBRATION = LinkShape(latency_s=0.001)  # a delay: waking up in time is most of what the relay takes


@dataclass(frozen=True, slots=True)
class ShapeCheck:
    """What was asked of a link in both directions, and what was measured: half the round trip of one byte, and bytes per second."""

    shape: LinkShape
    latency_s: float
    bandwidth_bytes_per_s: float

    @property
    def expected_s(self) -> float:
        return self.shape.latency_s + self.shape.jitter_s / 2


@dataclass(frozen=True)
class Exactness:
    """`overhead_s`: what the way through the relay takes by itself, one way. It is taken off the links' latencies, so a link of less is
    slower than asked for."""

    overhead_s: float
    checks: tuple[ShapeCheck, ...]

    def text(self) -> str:
        rows = [("link", "latency", "measured", "bandwidth", "measured", "error")]
        for check in self.checks:
            asked = check.shape.bandwidth_bytes_per_s
            error = "" if math.isinf(asked) else f"{check.bandwidth_bytes_per_s / asked - 1:+.1%}"
            rows.append(
                (
                    "unshaped" if check.shape == UNSHAPED else "shaped",
                    seconds_text(check.expected_s) if check.expected_s else "-",
                    seconds_text(check.latency_s),
                    "-" if math.isinf(asked) else _rate_text(asked),
                    _rate_text(check.bandwidth_bytes_per_s),
                    error,
                )
            )
        return "\n".join([f"the relay itself takes {self.overhead_s * 1e6:.0f} us one way, which is taken off each latency", *table(rows)])


def measure_exactness(relay: RelayProcess, shapes: Iterable[LinkShape]) -> Exactness:
    """Measures the relay's own delay against a direct connection, has it taken off from now on, and tries each of the shapes. About a
    second for each."""
    with contextlib.closing(_Echo()) as echo:
        relay_address = relay.listen([_TARGET])[_TARGET]
        relay.connect({_TARGET: echo.address}, {})
        with contextlib.closing(_Caller(echo.address)) as direct, contextlib.closing(_Caller(relay_address)) as through:
            direct_s = direct.round_trip_s()
            relay.set_links({(CLIENT, _TARGET): _CALIBRATION, (_TARGET, CLIENT): _CALIBRATION})
            overhead_s = max((through.round_trip_s() - direct_s) / 2 - _CALIBRATION.latency_s, 0.0)
            relay.set_overhead(overhead_s)
            checks = [_check(relay, through, shape, direct_s) for shape in dict.fromkeys((UNSHAPED, *shapes))]
    return Exactness(overhead_s, tuple(checks))


def _check(relay: RelayProcess, through: _Caller, shape: LinkShape, direct_s: float) -> ShapeCheck:
    relay.set_links({(CLIENT, _TARGET): shape, (_TARGET, CLIENT): shape})
    round_trip_s = through.round_trip_s()
    size = int(min(max(shape.bandwidth_bytes_per_s * _SENDING_S, _LEAST_BYTES), _MOST_BYTES))
    took_s = min(through.seconds(size) for _ in range(2)) - round_trip_s
    return ShapeCheck(shape, max(round_trip_s - direct_s, 0.0) / 2, size / max(took_s, 1e-9))


class _Echo:
    """Takes messages (length, bytes) and answers each with one byte."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    @staticmethod
    def _serve(peer: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 18))
        with peer, contextlib.suppress(ConnectionError):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while len(header := peer.recv(_HEADER.size, socket.MSG_WAITALL)) == _HEADER.size:
                (left,) = _HEADER.unpack(header)
                while left:
                    left -= peer.recv_into(buffer, min(left, len(buffer)))
                peer.sendall(b"+")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class _Caller:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def seconds(self, size: int) -> float:
        """From sending so many bytes to the answer."""
        message = _HEADER.pack(size) + bytes(size)
        started = time.perf_counter()
        self._socket.sendall(message)
        self._socket.recv(1)
        return time.perf_counter() - started

    def round_trip_s(self, longest_s: float = 0.6) -> float:
        end = time.perf_counter() + longest_s
        samples = [self.seconds(1) for _ in range(3)]
        while len(samples) < _PINGS and time.perf_counter() < end:
            samples.append(self.seconds(1))
        return statistics.median(samples)

    def close(self) -> None:
        self._socket.close()


def _rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e6:.4g} Mbit/s"
