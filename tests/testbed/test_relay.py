"""The relay with real sockets: every byte, in order, ends and resets passed on, and by whom a connection was opened."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import cpu
from testbed.owner import find_owner
from testbed.relay import CLIENT, Relay, hastened
from testbed.shaping import LinkShape


class Server:
    """Accepts connections for a test to talk to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(5)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        peer, _ = self.listener.accept()
        peer.settimeout(5)
        return peer


class Running:
    """A relay in a thread, with one target `server`."""

    def __init__(self) -> None:
        self.relay = Relay()
        self.server = Server()
        self.address = self.relay.listen("server")
        self.relay.connect({"server": self.server.address}, {})
        self._stop, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self.relay.step([self._stop]):
            pass
        self.relay.close()

    def connect(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5)

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for end in (self._stop, self._wake, self.server.listener):
            end.close()


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.close()


def receive(end: socket.socket, count: int = -1) -> bytes:
    """So many bytes, or all until the end of the stream."""
    out = bytearray()
    while count < 0 or len(out) < count:
        data = end.recv(1 << 16 if count < 0 else min(1 << 16, count - len(out)))
        if not data:
            break
        out += data
    return bytes(out)


def test_bytes_arrive_whole_and_in_order_both_ways(running: Running) -> None:
    running.relay.set_link(CLIENT, "server", LinkShape(4e7, 0.002, 0.002))
    running.relay.set_link("server", CLIENT, LinkShape(2e7, 0.001))
    there, back = random.Random(1).randbytes(700_001), random.Random(2).randbytes(300_007)
    with running.connect() as near, running.server.accept() as far:

        def talk() -> None:
            for at in range(0, len(there), 50_021):
                near.sendall(there[at : at + 50_021])
            near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=talk)
        sender.start()
        far.sendall(back)
        assert receive(far) == there
        assert receive(near, len(back)) == back
        sender.join()
    assert running.relay.carried() == {"->server": len(there), "server->": len(back)}


def test_one_direction_may_end_before_the_other(running: Running) -> None:
    running.relay.set_link(CLIENT, "server", LinkShape(latency_s=0.02))
    with running.connect() as near, running.server.accept() as far:
        near.sendall(b"question")
        near.shutdown(socket.SHUT_WR)
        assert receive(far) == b"question"
        far.sendall(b"answer, later")
        far.shutdown(socket.SHUT_WR)
        assert receive(near) == b"answer, later"


def test_a_reset_is_passed_on(running: Running) -> None:
    with running.connect() as near, running.server.accept() as far:
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_a_target_that_is_gone_resets(running: Running) -> None:
    running.server.listener.close()
    with running.connect() as near, pytest.raises(ConnectionResetError):
        near.recv(1)
    running.server = Server()
    running.relay.connect({"server": running.server.address}, {})
    with running.connect() as near, running.server.accept() as far:
        near.sendall(b"again")
        assert far.recv(5) == b"again"


def test_never_faster_than_its_rate_and_about_as_fast(running: Running) -> None:
    """One coarse run; the arithmetic is tested exactly elsewhere."""
    running.relay.set_link(CLIENT, "server", LinkShape(2e6, 0.01))
    with running.connect() as near, running.server.accept() as far:
        started = time.monotonic()
        near.sendall(bytes(400_000))
        assert len(receive(far, 400_000)) == 400_000
        took_s = time.monotonic() - started
    assert 0.205 < took_s < 1.0  # 0.2 s + 0.01 s; nothing bounds what a busy machine adds


def test_links_do_not_share_a_transmitter(running: Running) -> None:
    running.relay.set_link(CLIENT, "server", LinkShape(1e3))
    running.relay.set_link("server", CLIENT, LinkShape(1e8))
    with running.connect() as near, running.server.accept() as far:
        near.sendall(bytes(100_000))  # 100 s
        started = time.monotonic()
        far.sendall(bytes(1_000_000))
        receive(near, 1_000_000)
        assert time.monotonic() - started < 5


def test_the_process_at_the_other_end_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # An IPv6 socket, as gRPC opens them for IPv4 addresses.
        code = f"import socket; s = socket.socket(socket.AF_INET6); s.connect(('::ffff:127.0.0.1', {port})); s.recv(1)"
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            peer, address = listener.accept()
            with peer:
                assert find_owner(address[1], port, {"other": os.getpid(), "child": child.pid}) == "child"
                assert find_owner(address[1], port, {"other": os.getpid(), "gone": 2**22 + 1}) is None
        with socket.create_connection(("127.0.0.1", port)) as near:
            peer, address = listener.accept()
            with peer:
                assert find_owner(address[1], port, {"other": 1, "this": os.getpid()}) == "this"
                assert near.getsockname() == address


def test_connections_are_told_apart_by_process(running: Running) -> None:
    running.relay.connect({}, {"node": os.getpid()})
    running.relay.set_link("node", "server", LinkShape(latency_s=0.15))
    with running.connect() as near, running.server.accept() as far:
        started = time.monotonic()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        assert time.monotonic() - started > 0.14
    assert running.relay.accepted == {("node", "server"): 1}


@pytest.mark.skipif(isinstance(cpu.controller(), str), reason=f"no CPU shares here: {cpu.controller()}")
def test_without_real_time_priority_nodes_do_not_go_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    groups = Path("/proc/self/cgroup")
    before = groups.read_text()
    with hastened() as priority:
        assert priority.startswith("as the nodes' priority")
        assert f"splitnet-testbed-{os.getpid()}-" in groups.read_text()
    assert groups.read_text() == before
