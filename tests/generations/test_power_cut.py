"""Nodes that lost their power serve again what they served, from their own disks; and what they have slept through does not come back."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import Split, same

import splitnet
from nodes.records import FamilyRecord, Records
from nodes.testing import LocalCluster
from splitnet.errors import BadPlan, NodeUnavailable, Overloaded
from splitnet.install import deploy, undeploy
from splitnet.rollout import go_back, update

Make = Callable[[int, str], Split]


def states(cluster: LocalCluster, name: str, node: str) -> dict[int, str]:
    (status,) = [s for s in splitnet.status(cluster.cluster()) if s.name == node]
    return {d.generation: d.state for d in status.generations(name)}


def told(cluster: LocalCluster, name: str, node: str) -> list[tuple[str, str]]:
    return [(e.kind, e.text) for e in cluster.server(node).ledger.events if name in (e.deployment, e.deployment.partition("@")[0])]


def cut_power(cluster: LocalCluster, *names: str) -> None:
    for name in names:
        cluster.kill(name)


def restored(cluster: LocalCluster, *names: str) -> None:
    """Starts them again, and waits until each has looked at all that it had."""
    for name in names:
        cluster.restart(name)
    until(lambda: all(cluster.server(name)._restoring.done() for name in names))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answers(cut: Split, address: str, name: str) -> bool:
    with splitnet.Client(address, name) as client:
        inputs = cut.inputs(2)
        return same(client.infer(inputs, retry=True), cut.whole(inputs))


def test_all_nodes_lose_their_power_and_serve_again_canary_and_all(cluster: LocalCluster, made: Make, name: str, clients: Any) -> None:
    versions = {1: made(1, "ab"), 2: made(2, "ac")}
    deploy(versions[1].plan, versions[1].shards, name=name)
    update(versions[2].plan, versions[2].shards, name=name, canary=0.5)
    cut_power(cluster, "a", "b", "c")
    restored(cluster, "c", "a", "b")
    assert states(cluster, name, "a") == {1: "active", 2: "canary"}
    assert ("restored", "from this node's disk: generation 1, 2") in told(cluster, name, "a")
    until(lambda: _whole(cluster, name))
    with clients(versions[1].address, name, versions) as load:
        load.wait_for(1)
        load.wait_for(2)
    assert (load.failed, load.mixed) == ([], 0)

    update(versions[2].plan, versions[2].shards, name=name)
    cut_power(cluster, "a", "b", "c")
    restored(cluster, "a", "b", "c")
    assert states(cluster, name, "a") == {1: "kept", 2: "active"}
    assert answers(versions[2], versions[1].address, name)
    assert go_back(cluster.cluster(), name).generation == 1
    assert answers(versions[1], versions[1].address, name)
    assert states(cluster, name, "a") == {1: "active"}


def _whole(cluster: LocalCluster, name: str) -> bool:
    """Its links are up: a request that came before would be told who is missing."""
    mine = [d for d in cluster.server("a").ledger.deployments.values() if d.family == name]
    return all(link.connected for d in mine for link in d.links.values())


def test_what_a_node_has_slept_through_does_not_come_back_and_the_way_back_gives_it_its_stage_again(
    cluster: LocalCluster, made: Make, name: str
) -> None:
    old, new = made(1, "ab"), made(2, "ac")
    deploy(old.plan, old.shards, name=name)
    cut_power(cluster, "b")
    update(new.plan, new.shards, name=name)
    restored(cluster, "b")
    until(lambda: states(cluster, name, "b").get(1) == "kept")  # its ingress gives it to it, to go back to
    assert ("unrestored", f"generation 2 took its place meanwhile; requests go to {old.address}") in told(cluster, name, "b")
    assert answers(new, old.address, name)
    assert go_back(cluster.cluster(), name).generation == 1
    assert answers(old, old.address, name)


def test_the_way_back_is_there_after_a_standby_has_taken_over(cluster: LocalCluster, made: Make, name: str) -> None:
    """The generation that recovery has made keeps what the update has kept."""
    old, new = made(1, "ab"), made(2, "ab")
    stages = tuple(dataclasses.replace(s, replicas=("c",)) if s.node == "b" else s for s in new.plan.stages)
    deploy(old.plan, old.shards, name=name)
    update(dataclasses.replace(new.plan, stages=stages), new.shards, name=name)
    cut_power(cluster, "b")
    until(lambda: states(cluster, name, "a").get(3) == "active")
    assert answers(new, old.address, name)
    restored(cluster, "b")
    assert states(cluster, name, "a")[1] == "kept"
    assert go_back(cluster.cluster(), name).generation == 1
    assert answers(old, old.address, name)


def test_an_ingress_that_was_replaced_sends_its_clients_on(cluster: LocalCluster, made: Make, name: str) -> None:
    old, new = made(1, "ab"), made(2, "bc")
    deploy(old.plan, old.shards, name=name)
    cut_power(cluster, "a")
    update(new.plan, new.shards, name=name, where=cluster.cluster())
    restored(cluster, "a")
    assert answers(new, cluster.addresses["a"], name)
    cut_power(cluster, "a")
    restored(cluster, "a")
    assert answers(new, cluster.addresses["a"], name), "that is written down, too"


def test_what_was_taken_off_meanwhile_is_not_restored(cluster: LocalCluster, made: Make, name: str) -> None:
    cut = made(1, "ab")
    deploy(cut.plan, cut.shards, name=name)
    cut_power(cluster, "a")
    with pytest.raises(NodeUnavailable, match="may still be on node 'a'"):
        undeploy(cluster.cluster(), name, drain_s=0.0)
    restored(cluster, "a")
    assert states(cluster, name, "a") == {}
    assert ("unrestored", "b hold nothing of it any more: it was taken off meanwhile") in told(cluster, name, "a")
    cut_power(cluster, "a", "b")
    restored(cluster, "a", "b")
    assert states(cluster, name, "a") == {}, "its record has gone"
    deploy(cut.plan, cut.shards, name=name)
    assert answers(cut, cut.address, name)


def test_a_shard_that_changed_on_the_disk_is_not_served(cluster: LocalCluster, made: Make, name: str) -> None:
    cut = made(3, "ab")
    deploy(cut.plan, cut.shards, name=name)
    weights = cluster.config("b").directory / "blobs" / cut.shards["stage1"].manifest.members["weights.safetensors"].sha256
    cut_power(cluster, "b")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    restored(cluster, "b")
    (text,) = [text for kind, text in told(cluster, name, "b") if kind == "unrestored"]
    assert "was changed on disk" in text
    assert not weights.exists()
    until(lambda: _whole(cluster, name))
    with splitnet.Client(cut.address, name) as client, pytest.raises(NodeUnavailable, match="deploy"):
        client.infer(cut.inputs(2), timeout_s=10)
    deploy(cut.plan, cut.shards, name=name)
    assert answers(cut, cut.address, name)


def test_a_damaged_record_is_set_aside(cluster: LocalCluster, made: Make, name: str) -> None:
    cut = made(1, "a")
    deploy(cut.plan, cut.shards, name=name)
    directory = cluster.config("a").directory / "deployments"
    (path,) = [p for p in directory.glob("*.json") if f'"{name}"'.encode() in p.read_bytes()]
    assert path.stat().st_mode & 0o077 == 0
    cut_power(cluster, "a")
    path.write_bytes(path.read_bytes()[:-100])
    (directory / f".{path.name}.0123abcd.part").write_bytes(b"half")
    restored(cluster, "a")
    (event,) = [e for e in cluster.server("a").ledger.events if e.kind == "unrestored" and path.stem in e.text]
    assert "not a record of a deployment" in event.text
    assert [p.suffix for p in directory.iterdir() if path.stem in p.name] == [".damaged"]
    assert states(cluster, name, "a") == {}


def test_a_node_may_be_told_to_begin_with_nothing(cluster: LocalCluster, made: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = made(1, "a")
    deploy(cut.plan, cut.shards, name=name)
    with monkeypatch.context() as patched:
        patched.setitem(cluster._options, "restore", False)
        cut_power(cluster, "a")
        restored(cluster, "a")
        assert states(cluster, name, "a") == {}
    cut_power(cluster, "a")
    restored(cluster, "a")
    assert states(cluster, name, "a") == {}


def test_who_asks_too_early_is_told_to_wait(cluster: LocalCluster, made: Make, name: str) -> None:
    cut = made(1, "a")
    deploy(cut.plan, cut.shards, name=name)
    families = cluster.server("a").ledger.families
    with splitnet.Client(cut.address, name) as client:
        families.restoring[name] = FamilyRecord(name, active=1)
        try:
            with pytest.raises(Overloaded, match="is being loaded from this node's disk") as caught:
                client.infer(cut.inputs(2))
            assert caught.value.retry_after_s > 0
            with pytest.raises(Overloaded, match="try again"):
                undeploy(cluster.cluster(), name)
        finally:
            del families.restoring[name]
        assert client.infer(cut.inputs(2), retry=True)


def test_a_record_is_read_as_it_was_written(made: Make, tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.read() == ([], [])
    record = FamilyRecord("x", 2, 3, 0.25, 1, "10.0.0.1:7001", True, 7, {})
    records.write("x", record)
    assert records.read() == ([record], [])
    good = record.to_bytes()
    for bad in (good.replace(b'"term": 7', b'"term": 8'), good[:-2], b"[]\n", b"", good.replace(b'"version": 1', b'"version": 2')):
        with pytest.raises(BadPlan):
            FamilyRecord.from_bytes(bad)
    records.write("x", None)
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "deployments").iterdir()) == []
