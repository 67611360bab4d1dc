"""A node's disk is full, its memory ends, its clock jumps, a name stops resolving: a clear error or recovery each time, and nothing is lost.

Limits are set on a running process by prlimit(2), as a full disk or a small box would set them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import Chain, Split, captured, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.cluster import Cluster, ClusterNode
from splitnet.errors import EngineFailure, InsufficientMemory, NodeUnavailable, StorageFailure
from splitnet.install import deploy, status
from splitnet.security.addresses import INSECURE, forget_address, know_address
from splitnet.security.audit import verify_audit

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit(2)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, processes=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def versions(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> list[Split]:
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(split(captured(Chain(), torch.randn(2, 16)), cluster.cluster(), tmp_path_factory.mktemp("shards"), stages_by(a="*")))
    return made


@contextmanager
def limited(pid: int, what: int, most: int) -> Iterator[None]:
    resource.prlimit(pid, what, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_on_a_full_disk_nothing_new_is_taken_what_serves_goes_on_and_nothing_is_lost(cluster: LocalCluster, versions: list[Split]) -> None:
    one, two = versions
    deploy(one.plan, one.shards, name="one")
    pid, directory = cluster.pid("a"), cluster.config("a").directory
    inputs = one.inputs(2)
    for most in (0, 100, (directory / "audit.jsonl").stat().st_size + 700):  # nothing can be written; nearly nothing; no blob
        with limited(pid, resource.RLIMIT_FSIZE, most):
            with pytest.raises(StorageFailure, match="the disk is full") as caught:
                deploy(two.plan, two.shards, name="two")
            assert "deploy again" in caught.value.remedy
            with splitnet.Client(one.address, "one") as client:
                assert np.array_equal(client.infer(inputs)["output"], one.whole(inputs)["output"])
    assert deploy(two.plan, two.shards, name="two").sent_bytes["a"] > 0
    report = verify_audit(directory / "audit.jsonl")
    assert report.fault == ""
    with splitnet.Client(one.address, "two") as client:
        assert np.array_equal(client.infer(inputs)["output"], two.whole(inputs)["output"])


def test_what_cannot_be_written_down_serves_and_says_so_and_is_written_later(cluster: LocalCluster, versions: list[Split]) -> None:
    """The shards are there already: only the record of the deployment is new."""
    one, _ = versions
    deploy(one.plan, one.shards, name="one")
    with limited(cluster.pid("a"), resource.RLIMIT_FSIZE, 100):
        deploy(one.plan, one.shards, name="again")
        (node,) = status(cluster.cluster())
        (event,) = [event for event in node.events if event.kind == "unwritten"]
        assert event.deployment == "again"
        assert "after a restart it would not be served again" in event.text
    deploy(one.plan, one.shards, name="third")  # writes what was left over, too
    cluster.kill("a")
    cluster.restart("a")
    with splitnet.Client(one.address, "again") as client:
        assert client.infer(one.inputs(2), retry=True)


def test_a_request_that_the_memory_does_not_hold_fails_alone(cluster: LocalCluster, versions: list[Split]) -> None:
    one, _ = versions
    deploy(one.plan, one.shards, name="one")
    pid = cluster.pid("a")
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    small = one.inputs(2)
    large = {name: np.zeros((1 << 20, *array.shape[1:]), array.dtype) for name, array in small.items()}
    with splitnet.Client(one.address, "one") as client:
        for more in (32 << 20, 96 << 20):  # the tensor does not fit; it does, and what is computed from it does not
            with limited(pid, resource.RLIMIT_AS, used + more):
                with pytest.raises((InsufficientMemory, EngineFailure)) as caught:
                    client.infer(large, timeout_s=30)
                assert "memory" in caught.value.message
                assert client.infer(small)
        assert np.array_equal(client.infer(small)["output"], one.whole(small)["output"])
        (node,) = status(cluster.cluster())
        assert [d.in_flight for d in node.deployments if d.name == "one"] == [0]
        assert client.infer(large), "and everything that it held was given back"


def test_a_clock_that_jumps_changes_no_deadline_and_no_order(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten years forth and back while requests are answered: what is waited for goes by a clock that does not jump, the audit log by its chain."""
    from datetime import UTC, datetime

    from nodes import events, guard
    from splitnet.security import audit

    year_s, jump_s = 31_557_600.0, 0.0

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromtimestamp(time.time() + jump_s, UTC)

    clocks = SimpleNamespace(time=lambda: time.time() + jump_s, monotonic=time.monotonic)
    monkeypatch.setattr(audit, "datetime", Jumping)
    for module in (guard, events):
        monkeypatch.setattr(module, "time", clocks)
    with LocalCluster(2) as nodes:
        cut = split(
            captured(Chain(), torch.randn(2, 16)), nodes.cluster(), tmp_path_factory.mktemp("clock"), stages_by(a="linear relu", b="*")
        )
        deploy(cut.plan, cut.shards, name="clock")
        inputs = cut.inputs(2)
        with splitnet.Client(cut.address, "clock", timeout_s=10) as client:
            for years in (10, -10, 0):
                jump_s = years * year_s
                for _ in range(3):
                    assert np.array_equal(client.infer(inputs)["output"], cut.whole(inputs)["output"])
                deploy(cut.plan, cut.shards, name=f"clock{years}")
        report = verify_audit(nodes.config("a").directory / "audit.jsonl")
        assert (report.fault, report.lines > 3) == ("", True)
        (told,) = [s.events for s in status(nodes.cluster()) if s.name == "a"]
        assert [e.kind for e in told if e.kind in ("lost", "replaced")] == []


def test_a_name_that_does_not_resolve_is_told_with_its_node() -> None:
    know_address("attic.invalid:7001", INSECURE, "attic")
    try:
        (found,) = status(Cluster((ClusterNode("attic", "attic.invalid:7001"),), ()))
    finally:
        forget_address("attic.invalid:7001")
    assert found.name == "attic"
    assert "attic.invalid" in found.error
    with pytest.raises(NodeUnavailable, match=r"attic\.invalid"), splitnet.Client("attic.invalid:7001", timeout_s=10, credentials=INSECURE):
        pass


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path, versions: list[Split]) -> None:
    """The disk is full in the middle: in a process of its own, for the limit holds for all its files."""
    path = tmp_path / "plan.json"
    versions[0].plan.save(path)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys\nfrom splitnet import Plan\nfrom splitnet.errors import StorageFailure\nplan = Plan.load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    plan.save(sys.argv[1])\nexcept StorageFailure as error:\n    sys.exit('refused: ' + error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert "refused: cannot write" in done.stderr
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
