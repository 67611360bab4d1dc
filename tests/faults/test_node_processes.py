"""Nodes as processes of their own: started wrongly, asked to stop, killed in the middle of a request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from small_models import Split, diamond, slow, split, stages_by

import splitnet
from nodes.cli import node
from nodes.testing import LocalCluster
from partitioner.graph import ModelGraph
from splitnet.cli import run_command
from splitnet.errors import NodeUnavailable, SplitnetError
from splitnet.install import deploy, status
from splitnet.node_status import describe_node

HEAVY = 4000  # rows; some 0.4 s of computing in the second stage
PATIENCE_S = 20.0


def middle(model: ModelGraph) -> str:
    """All operators but the first two and the last."""
    return " ".join(v.name for v in model.structure.vertices[3:-1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3, processes=True, drain_s=60.0) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cut(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(slow(), cluster.cluster(), tmp_path_factory.mktemp("slow"), stages_by(a="linear relu", b=middle(slow()), c="*"))


@pytest.fixture
def served(cluster: LocalCluster, cut: Split) -> Split:
    """Deployed on all three nodes; those that an earlier test has ended are started again."""
    for name in cluster.names:
        if not cluster.alive(name):
            cluster.restart(name)
    deploy(cut.plan, cut.shards, name="slow")
    return cut


async def in_flight(cluster: LocalCluster, node: str) -> None:
    """Returns when a request has arrived at that node."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        (found,) = [n for n in await asyncio.to_thread(status, cluster.cluster()) if n.name == node]
        if any(d.in_flight for d in found.deployments):
            return
    raise AssertionError(f"nothing arrived at {node!r}")


def test_a_frozen_process_is_found_out_and_taken_in_again_when_it_thaws(cluster: LocalCluster, served: Split) -> None:
    """SIGSTOP: its connections stay open, and nothing comes."""
    given = served.inputs()
    with splitnet.Client(served.address, "slow") as client:
        assert np.array_equal(client.infer(given)["output"], served.whole(given)["output"])
        os.kill(cluster.pid("b"), signal.SIGSTOP)
        try:
            with pytest.raises(NodeUnavailable, match="nothing was heard from") as caught:
                client.infer(given, timeout_s=PATIENCE_S)
            assert (caught.value.node, caught.value.stage) == ("b", "stage1")
        finally:
            os.kill(cluster.pid("b"), signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert np.array_equal(client.infer(given)["output"], served.whole(given)["output"])
                break
            except NodeUnavailable:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    (seen,) = [each for each in status(cluster.cluster()) if each.name == "a"]
    assert {"lost", "back"} <= {event.kind for event in seen.events if event.node == "b"}


def test_a_node_that_says_nothing_for_a_moment_loses_nothing(cluster: LocalCluster, served: Split) -> None:
    """Taken for gone, and there again: a false alarm, as a busy box gives one. Nobody could take its place, and no request fails."""
    given = served.inputs()

    def lost() -> int:
        seen = asyncio.run(describe_node("a", served.address))  # the others are not asked: one of them sleeps
        return sum(event.kind == "lost" and event.node == "b" for event in seen.events)

    with splitnet.Client(served.address, "slow") as client:
        before = lost()
        os.kill(cluster.pid("b"), signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(client.infer, given, timeout_s=PATIENCE_S)
                deadline = time.monotonic() + PATIENCE_S
                while lost() == before:
                    assert time.monotonic() < deadline
                os.kill(cluster.pid("b"), signal.SIGCONT)
                assert np.array_equal(asked.result()["output"], served.whole(given)["output"])
        finally:
            os.kill(cluster.pid("b"), signal.SIGCONT)


def test_an_ingress_that_says_nothing_for_a_moment_is_asked_again(cluster: LocalCluster, served: Split) -> None:
    given = served.inputs()
    with splitnet.Client(served.address, "slow") as client, ThreadPoolExecutor(1) as pool:
        os.kill(cluster.pid("a"), signal.SIGSTOP)
        try:
            asked = pool.submit(client.infer, given, timeout_s=PATIENCE_S)
            time.sleep(0.9)  # it is given up after 0.45 s of silence
        finally:
            os.kill(cluster.pid("a"), signal.SIGCONT)
        assert np.array_equal(asked.result()["output"], served.whole(given)["output"])


@pytest.mark.parametrize("killed", ["b", "c"])
async def test_a_node_killed_midway_fails_its_requests_at_once_and_by_name(
    cluster: LocalCluster, served: Split, tmp_path: Path, killed: str
) -> None:
    beside = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="*"))
    await asyncio.to_thread(deploy, beside.plan, beside.shards, name=f"beside-{killed}")
    async with splitnet.AsyncClient(served.address, "slow") as client, splitnet.AsyncClient(beside.address, f"beside-{killed}") as other:
        asked = [asyncio.create_task(client.infer(served.inputs(HEAVY))) for _ in range(3)]
        await in_flight(cluster, "b")
        cluster.kill(killed)
        started = time.monotonic()
        failures = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - started < 1.0
        for failure in failures:
            assert isinstance(failure, NodeUnavailable), failure
            assert failure.node == killed
            assert failure.stage == {"b": "stage1", "c": "stage2"}[killed]
            assert cluster.addresses[killed] in failure.message
            assert "start the node" in failure.remedy
        assert (await other.infer(beside.inputs()))["early"].shape == (2, 16)
        await asyncio.to_thread(cluster.restart, killed)
        await asyncio.to_thread(deploy, served.plan, served.shards, name="slow")
        small = served.inputs(2)
        assert np.array_equal((await client.infer(small))["output"], served.whole(small)["output"])


async def test_when_the_ingress_is_killed_the_client_hears_of_it_and_the_others_let_go(cluster: LocalCluster, served: Split) -> None:
    async with splitnet.AsyncClient(served.address, "slow") as client:
        asked = asyncio.create_task(client.infer(served.inputs(HEAVY)))
        await in_flight(cluster, "b")
        cluster.kill("a")
        with pytest.raises(NodeUnavailable):
            await asked
    deadline = time.monotonic() + 2.0
    while True:
        rest = [n for n in await asyncio.to_thread(status, cluster.cluster()) if n.name in "bc"]
        if not any(d.in_flight for n in rest for d in n.deployments):
            break
        assert time.monotonic() < deadline, rest


async def test_sigterm_finishes_what_is_in_flight_and_takes_nothing_new(cluster: LocalCluster, served: Split) -> None:
    async with splitnet.AsyncClient(served.address, "slow") as client:
        given = served.inputs(3 * HEAVY)
        asked = asyncio.create_task(client.infer(given))
        await in_flight(cluster, "b")
        cluster.terminate("a")
        with pytest.raises(NodeUnavailable, match="being stopped"):
            while True:  # the signal takes a moment to arrive
                await client.infer(served.inputs(1))
        answer = await asked
        assert np.array_equal(answer["output"], served.whole(given)["output"])
        assert await asyncio.to_thread(cluster.wait_stopped, "a") == 0
    log = cluster.log("a")
    assert '"draining"' in log
    assert '"stopped"' in log
    assert "Traceback" not in log


async def test_sigterm_at_the_last_stage_loses_nothing_of_what_was_in_flight_there(cluster: LocalCluster, served: Split) -> None:
    async with splitnet.AsyncClient(served.address, "slow") as client:
        given = served.inputs(3 * HEAVY)
        asked = asyncio.create_task(client.infer(given))
        await in_flight(cluster, "c")
        cluster.terminate("c")
        answer = await asked
        assert np.array_equal(answer["output"], served.whole(given)["output"])
        assert await asyncio.to_thread(cluster.wait_stopped, "c") == 0


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with LocalCluster(1, processes=True, drain_s=60.0) as nodes:
        cut = split(slow(), nodes.cluster(), tmp_path, stages_by(a="*"))
        await asyncio.to_thread(deploy, cut.plan, cut.shards, name="slow")
        async with splitnet.AsyncClient(cut.address, "slow") as client:
            asked = asyncio.create_task(client.infer(cut.inputs(10 * HEAVY)))
            await in_flight(nodes, "a")
            nodes.terminate("a")
            await asyncio.sleep(0.3)
            nodes.terminate("a")
            with pytest.raises(NodeUnavailable, match="stopped"):
                await asked
        assert await asyncio.to_thread(nodes.wait_stopped, "a") == 0


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    """`splitnet node` with flags that must not let it start."""
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-m", "nodes", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = start("--listen", address, "--data", str(tmp_path))
    assert ended.returncode == 2
    assert f"cannot listen on {address}" in ended.stderr
    assert "--listen" in ended.stderr
    assert ended.stderr.startswith("error: cannot listen"), "gRPC has its own say before"
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:7001", "attic.example:7001"])
def test_plaintext_on_an_open_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(node, ["--listen", address]) == 2
    said = capsys.readouterr().err
    assert "neither encrypted nor authenticated" in said
    assert "--insecure" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--listen", "7001"), "is not HOST:PORT"),
        (("--listen", "127.0.0.1:99999"), "port 99999 does not exist"),
        (("--memory", "lots"), "'lots' is not a size"),
        (("--name", "../x"), "--name '../x'"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_wrong_flags(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(node, list(flags)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_an_open_address_on_demand_is_shown_as_such(tmp_path: Path) -> None:
    announced = tmp_path / "address"
    command = [
        sys.executable,
        "-m",
        "nodes",
        "--listen",
        "0.0.0.0:0",
        "--insecure",
        "--announce",
        str(announced),
        "--data",
        str(tmp_path / "data"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not announced.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        host, port = announced.read_text().strip().rsplit(":", 1)
        assert host == "0.0.0.0"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            described = splitnet.rpc.v1.node_pb2_grpc.NodeStub(channel).Describe(splitnet.rpc.v1.node_pb2.DescribeRequest())
        assert described.insecure
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "open to the network" in log
    assert os.stat(tmp_path / "data").st_mode & 0o077 == 0


def test_health_and_reflection_are_served() -> None:
    with LocalCluster(1, processes=True) as nodes:
        healthy_until_it_drains(nodes)
        assert nodes.wait_stopped("a") == 0


def healthy_until_it_drains(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.addresses["a"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "splitnet.rpc.v1.Node"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        found = ProtoReflectionDescriptorDatabase(channel)
        assert "splitnet.rpc.v1.Node" in found.get_services()
        assert "Describe" in str(found.FindFileContainingSymbol("splitnet.rpc.v1.Node"))
        watched = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=PATIENCE_S)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        threading.Timer(0.1, cluster.terminate, ("a",)).start()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()


def test_a_node_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SplitnetError, match="data directory"), LocalCluster(1, processes=True, data_dir=tmp_path / "file" / "data"):
        pass
