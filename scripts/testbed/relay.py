"""The relay: one process between the nodes, which delays what they send each other as the links of a testbed would.

Each node listens where only the relay goes; everybody else is given the relay's address for it. A plan has one address per node, and
a link is a pair of nodes: so the relay looks up which process opened a connection (`owner`). All connections between two nodes share the
one transmitter of each direction (`shaping`), as they would share a cable.

One thread, one `select` (its time limit is exact to the microsecond, that of epoll to the millisecond), commands as lines of JSON on
standard input, one line of JSON back for each; it ends when standard input does. Bytes are neither lost nor reordered; the end of one
direction of a stream (a half close) and a reset are passed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.cpu import hurried
from testbed.owner import find_owner
from testbed.shaping import UNSHAPED, DelayLine, LinkShape, Shaper

__all__ = ["CLIENT", "Relay", "hastened", "main"]

CLIENT = ""  #: whoever is not one of the nodes
_CONNECT_S = 2.0
_RECEIVE_BYTES = 1 << 18  # a window that carries 1 Gbit/s over loopback, and hides little from the sender
_BACKLOG = 64
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() resets


@dataclass(eq=False)
class Direction:
    """One way of one connection: from `source`, over the line, to `sink`."""

    source: socket.socket
    sink: socket.socket
    line: DelayLine
    ended: bool = False  # the source has sent all
    blocked: bool = False  # the sink takes nothing now
    finished: bool = False  # and it has been passed on

    def read(self, now_s: float) -> None:
        """Raises OSError when the connection is broken."""
        try:
            data = self.source.recv(self.line.shaper.block_bytes)
        except BlockingIOError:
            return
        self.ended = not data
        self.line.put(now_s, data)

    def deliver(self, now_s: float) -> None:
        """Hands on what has arrived. Raises OSError when the connection is broken."""
        self.blocked = False
        while (block := self.line.arrived(now_s)) is not None:
            if not block:
                self.line.taken(0)
                self.finished = True
                self.sink.shutdown(socket.SHUT_WR)
                return
            try:
                self.line.taken(self.sink.send(block))
            except BlockingIOError:
                self.blocked = True
                return


@dataclass(eq=False)
class Connection:
    there: Direction
    back: Direction
    directions: tuple[Direction, Direction] = field(init=False)

    def __post_init__(self) -> None:
        self.directions = (self.there, self.back)

    @property
    def finished(self) -> bool:
        return self.there.finished and self.back.finished

    def close(self, *, reset: bool = False) -> None:
        for direction in self.directions:
            if reset:
                _set_reset(direction.source)
            direction.source.close()


class Relay:
    """`listen` names the targets, `connect` says where each really is and which process it is, `set_link` shapes; `step` does the work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listeners: dict[socket.socket, str] = {}
        self._upstream: dict[str, tuple[str, int]] = {}
        self._pids: dict[str, int] = {}
        self._shapers: dict[tuple[str, str], Shaper] = {}
        self._connections: list[Connection] = []
        self._overhead_s = 0.0
        self.accepted: dict[tuple[str, str], int] = {}

    def listen(self, target: str) -> str:
        """The address that others are to be given for `target`."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)  # inherited by what is accepted
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._listeners[listener] = target
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def connect(self, upstream: Mapping[str, str], pids: Mapping[str, int]) -> None:
        for name, address in upstream.items():
            host, _, port = address.rpartition(":")
            self._upstream[name] = (host, int(port))
        self._pids.update(pids)

    def set_link(self, source: str, target: str, shape: LinkShape) -> None:
        """From now on; what is under way already keeps its time."""
        self.shaper(source, target).shape = shape

    def set_overhead(self, overhead_s: float) -> None:
        self._overhead_s = overhead_s
        for shaper in self._shapers.values():
            shaper.overhead_s = overhead_s

    def shaper(self, source: str, target: str) -> Shaper:
        if (source, target) not in self._shapers:
            self._shapers[source, target] = Shaper(UNSHAPED, self._overhead_s, seed=len(self._shapers))
        return self._shapers[source, target]

    def carried(self) -> dict[str, int]:
        """Bytes of each link so far, by "source->target"."""
        return {f"{a}->{b}": shaper.carried_bytes for (a, b), shaper in self._shapers.items() if shaper.carried_bytes}

    def delayed(self) -> list[str]:
        """The links that are shaped now, as "source->target"."""
        return sorted(f"{a}->{b}" for (a, b), shaper in self._shapers.items() if shaper.shape != UNSHAPED)

    def step(self, also: list[Any], longest_s: float = math.inf) -> list[Any]:
        """Waits until something is to be done, and does it. Returns those of `also` (files) that can be read."""
        now_s = self._clock()
        readers, writers, wake_s = [*also, *self._listeners], [], now_s + longest_s
        ways = {}
        for connection in self._connections:
            for way in connection.directions:
                if way.blocked:
                    writers.append(way.sink)
                else:
                    wake_s = min(wake_s, way.line.next_s)
                if way.ended:
                    continue
                from_s = way.line.takes_from_s()
                if from_s <= now_s:
                    readers.append(way.source)
                    ways[way.source] = way
                else:
                    wake_s = min(wake_s, from_s)
        timeout_s = None if math.isinf(wake_s) else max(wake_s - now_s, 0.0)
        readable, _, _ = select.select(readers, writers, [], timeout_s)
        ready = set(readable)
        for listener in ready & self._listeners.keys():
            self._accept(listener)
        # In turns: the first to be asked takes what the transmitter has room for.
        self._connections = self._connections[1:] + self._connections[:1]
        for connection in list(self._connections):
            self._serve(connection, [way for way in connection.directions if ways.get(way.source) is way and way.source in ready])
        return [file for file in also if file in ready]

    def _serve(self, connection: Connection, readable: list[Direction]) -> None:
        try:
            for way in readable:
                now_s = self._clock()
                if way.line.takes_from_s() <= now_s:  # another connection may have been quicker
                    way.read(now_s)
            for way in connection.directions:
                way.deliver(self._clock())
        except OSError:
            connection.close(reset=True)
            self._connections.remove(connection)
            return
        if connection.finished:
            connection.close()
            self._connections.remove(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            near, (_, port) = listener.accept()
        except OSError:
            return  # gone again
        target = self._listeners[listener]
        source = find_owner(port, listener.getsockname()[1], self._pids) or CLIENT
        try:
            far = socket.create_connection(self._upstream[target], timeout=_CONNECT_S)
        except (OSError, KeyError):  # KeyError: nobody there yet
            _set_reset(near)
            near.close()
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted[source, target] = self.accepted.get((source, target), 0) + 1
        there = Direction(near, far, DelayLine(self.shaper(source, target)))
        self._connections.append(Connection(there, Direction(far, near, DelayLine(self.shaper(target, source)))))

    def close(self) -> None:
        for connection in self._connections:
            connection.close(reset=True)
        for listener in self._listeners:
            listener.close()


def _set_reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


# ---------------------------------------------------------------------------------------------------------------- its process


def _obey(relay: Relay, command: Mapping[str, Any]) -> dict[str, Any]:
    """One command with its argument, as `bed` sends them."""
    ((verb, argument),) = command.items()
    if verb == "listen":
        return {name: relay.listen(name) for name in argument}
    if verb == "connect":
        relay.connect(argument["addresses"], argument["pids"])
        return {}
    if verb == "links":
        for link in argument:
            shape = LinkShape(link["bandwidth_bytes_per_s"], link["latency_s"], link["jitter_s"], link["burst_bytes"])
            relay.set_link(link["source"], link["target"], shape)
        return {}
    if verb == "overhead_s":
        relay.set_overhead(argument)
        return {}
    if verb == "report":
        used = resource.getrusage(resource.RUSAGE_SELF)
        accepted = {f"{a}->{b}": count for (a, b), count in relay.accepted.items()}
        return {"carried_bytes": relay.carried(), "accepted": accepted, "delayed": relay.delayed(), "cpu_s": used.ru_utime + used.ru_stime}
    raise ValueError(f"no command {verb!r}")


@contextlib.contextmanager
def hastened() -> Iterator[str]:
    """Within the block this process runs when it wants to, where that is permitted: it works little, but on time. In a control group of its own no
    process is given real-time priority; there a group beside those of the nodes keeps them from going before it."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: wake up within a nanosecond, not 50 us, of the time asked for
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with hurried() as ahead:
            how = "as the nodes'" if ahead else "ordinary"
            yield f"{how} priority: on a busy machine delays are less exact"
    else:
        yield "real-time priority"


def main() -> None:
    relay = Relay()
    try:
        with hastened() as priority:
            _serve(relay, priority)
    finally:
        relay.close()


def _serve(relay: Relay, priority: str) -> None:
    """Until its input ends."""
    commands = open(sys.stdin.fileno(), "rb", buffering=0)  # noqa: SIM115 # unbuffered: select knows all that is there
    pending = b""
    sys.stdout.write(json.dumps({"priority": priority}) + "\n")
    sys.stdout.flush()
    while True:
        if not relay.step([commands]):
            continue
        data = commands.read(1 << 16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            sys.stdout.write(json.dumps(_obey(relay, json.loads(line))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
