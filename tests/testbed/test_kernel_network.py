"""Links made by the kernel: what is refused, and real namespaces with a real rate where this machine lets us."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from testbed.bed import Testbed
from testbed.kernel import KernelNetwork, check_kernel
from testbed.shaping import LinkShape
from testbed.spec import CLIENT, BedSpec, NodeSpec

import splitnet
from splitnet.errors import BadInput, ServiceError

NODES = (NodeSpec("a"), NodeSpec("b"))
RATE = 4e6
SPEC = BedSpec(NODES, {(CLIENT, "a"): LinkShape(RATE), ("a", "b"): LinkShape(RATE)}, shaping="kernel")


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def _why_not() -> str:
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        return "needs root, ip and tc"
    try:
        KernelNetwork(SPEC).close()
    except ServiceError as error:
        return error.message
    return ""


WHY_NOT = _why_not()
here = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can")


@pytest.fixture
def network() -> Iterator[KernelNetwork]:
    made = KernelNetwork(SPEC)
    yield made
    made.close()


@pytest.mark.skipif(bool(os.geteuid()), reason="what is refused first is the lack of root")
def test_a_latency_is_refused() -> None:
    with pytest.raises(BadInput, match="a -> b has a latency") as caught:
        check_kernel(BedSpec(NODES, {("a", "b"): LinkShape(1e6, 0.01)}, shaping="kernel"))
    assert "relay" in caught.value.remedy


def test_without_root_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BadInput, match="needs root"), Testbed(SPEC):
        pass


@here
def test_the_kernel_keeps_the_rate(network: KernelNetwork) -> None:
    network.set_links({pair: SPEC.shape(*pair) for pair in SPEC.pairs()})
    assert network.report()["delayed"] == ["->a", "a->b"]
    host = network.address("a").rpartition(":")[0]
    code = f"import socket; s = socket.create_server(('{host}', 7000)); print('up', flush=True); c, _ = s.accept(); n = 0\n"
    code += "while n < 800_000: n += len(c.recv(1 << 16))\nc.sendall(b'+')"
    with subprocess.Popen([*network.command("a"), sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with socket.create_connection((host, 7000), timeout=20) as near:
            started = time.monotonic()
            near.sendall(bytes(800_000))
            assert near.recv(1) == b"+"
            took_s = time.monotonic() - started
    assert 0.18 < took_s < 3.0  # 0.2 s, less what its bucket holds; nothing bounds what a busy machine adds
    assert network.report()["carried_bytes"]["->a"] > 800_000
    network.set_links({(CLIENT, "a"): LinkShape()})
    assert network.report()["delayed"] == ["a->b"]


@here
def test_nodes_run_in_namespaces_and_leave_none() -> None:
    with Testbed(SPEC) as bed:
        assert [(node.name, node.error) for node in splitnet.status(bed.cluster())] == [("a", ""), ("b", "")]
        assert bed.relay is None
        assert f"stb{os.getpid()}n1" in namespaces()
        assert bed.report()["carried_bytes"]["->b"] > 0
    assert f"stb{os.getpid()}" not in namespaces()
