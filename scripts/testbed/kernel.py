"""Links made by the kernel: each node in a network namespace, a veth cable per pair of nodes, and a token bucket filter (tbf) at each end.

Nothing of ours stands in the way of a byte, so this is what the relay is checked against. Needs root. It limits rates and does not delay:
for that the kernel needs netem, and the relay does it anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from splitnet.errors import BadInput, ServiceError
from testbed.shaping import UNSHAPED, LinkShape
from testbed.spec import CLIENT, BedSpec

__all__ = ["PORT", "KernelNetwork", "check_kernel"]

PORT = 7000  #: every node's, at an address of its own
_TCP_SHARE = 1448 / 1514  # of an Ethernet frame's bytes, which tbf counts, those that a TCP stream carries
_BURST_S, _LEAST_BURST_BYTES = 0.002, 3100  # two full frames at the least
_QUEUE_S = 0.1  # what may wait at the sender; TCP fills it
_MOST_NODES = 200


def check_kernel(spec: BedSpec) -> None:
    """Raises BadInput for what the kernel cannot be asked."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        raise BadInput('shaping = "kernel" needs root, and the commands ip and tc', remedy='take shaping = "relay", which needs neither')
    for a, b in spec.pairs():
        shape = spec.shape(a, b)
        if shape.latency_s or shape.jitter_s:
            raise BadInput(
                f'the link {a or "client"} -> {b or "client"} has a latency; shaping = "kernel" limits rates only',
                remedy='set latency_ms = 0 (a cable), or take shaping = "relay"',
            )
    if len(spec.nodes) > _MOST_NODES:
        raise BadInput(f'shaping = "kernel" takes at most {_MOST_NODES} nodes, got {len(spec.nodes)}')


class KernelNetwork:
    """Namespaces and cables, from `__init__` to `close`. Names and addresses hold this process's id, so that two testbeds may run."""

    def __init__(self, spec: BedSpec) -> None:
        self._space = {CLIENT: "", **{name: f"stb{os.getpid()}n{i}" for i, name in enumerate(spec.names)}}
        self._subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        numbers = {CLIENT: 254, **{name: i + 1 for i, name in enumerate(spec.names)}}
        self._ip = {name: f"{self._subnet}.{number}" for name, number in numbers.items()}
        self._device: dict[tuple[str, str], str] = {}
        self._shapes: dict[tuple[str, str], LinkShape] = {}
        try:
            for name, space in self._space.items():
                if space:
                    _run("ip", "netns", "add", space)
                    self._in(name, "ip", "link", "set", "lo", "up")
                self._in(name, "ip", "address", "add", f"{self._ip[name]}/32", "dev", "lo")
            for k, (a, b) in enumerate(itertools.combinations(self._space, 2)):
                self._cable(a, b, f"s{os.getpid()}x{k}")
        except BaseException:
            self.close()
            raise

    def command(self, name: str) -> list[str]:
        """What stands before a command that is to run where the node is."""
        return ["ip", "netns", "exec", self._space[name]]

    def address(self, name: str) -> str:
        return f"{self._ip[name]}:{PORT}"

    def set_links(self, shapes: Mapping[tuple[str, str], LinkShape]) -> None:
        """From now on, until they are set again."""
        for pair, shape in shapes.items():
            device = self._device[pair]
            if not math.isinf(shape.bandwidth_bytes_per_s):
                rate = shape.bandwidth_bytes_per_s / _TCP_SHARE
                burst, limit = max(rate * _BURST_S, _LEAST_BURST_BYTES, shape.burst_bytes), max(rate * _QUEUE_S, 1 << 16)
                self._in(
                    pair[0], "tc", "qdisc", "replace", "dev", device, "root", "tbf",
                    "rate", f"{rate * 8:.0f}bit", "burst", f"{burst:.0f}", "limit", f"{limit:.0f}",
                )  # fmt: skip
            elif self._shapes.get(pair, UNSHAPED) != UNSHAPED:
                self._in(pair[0], "tc", "qdisc", "delete", "dev", device, "root")
            self._shapes[pair] = shape

    def report(self) -> dict[str, Any]:
        """The bytes that each cable's end has sent, headers included, by "a->b"; the links that are limited now."""
        sent = {}
        for (a, b), device in self._device.items():
            counted = int(self._in(a, "cat", f"/sys/class/net/{device}/statistics/tx_bytes"))
            sent[f"{a}->{b}"] = counted
        delayed = sorted(f"{a}->{b}" for (a, b), shape in self._shapes.items() if shape != UNSHAPED)
        return {"carried_bytes": sent, "delayed": delayed}

    def close(self) -> None:
        """Deleting a namespace deletes its ends of the cables, and with them the other ends."""
        for space in self._space.values():
            if space:
                with contextlib.suppress(ServiceError):  # made or not
                    _run("ip", "netns", "delete", space)
        with contextlib.suppress(ServiceError):
            _run("ip", "address", "delete", f"{self._ip[CLIENT]}/32", "dev", "lo")

    def _cable(self, a: str, b: str, name: str) -> None:
        ends = {a: f"{name}a", b: f"{name}b"}
        _run("ip", "link", "add", ends[a], "type", "veth", "peer", "name", ends[b])
        for end, device in ends.items():
            if self._space[end]:
                _run("ip", "link", "set", device, "netns", self._space[end])
            self._in(end, "ip", "link", "set", device, "up")
        for end, other in ((a, b), (b, a)):
            self._in(end, "ip", "route", "add", self._ip[other], "dev", ends[end], "src", self._ip[end])
            self._device[end, other] = ends[end]

    def _in(self, name: str, *command: str) -> str:
        return _run(*(self.command(name) if self._space[name] else ()), *command)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"`{' '.join(command)}` failed: {done.stderr.strip()}", remedy='take shaping = "relay"')
    return done.stdout
