"""What a deployment reserves of a node besides memory is refused to others before anything is loaded, and given back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_models import Split, chain, split, stages_by

from nodes.testing import LocalCluster
from splitnet.commands.install import status as status_command
from splitnet.errors import AlreadyExists, InsufficientMemory
from splitnet.install import deploy, status, undeploy
from splitnet.plan import Plan
from splitnet.rollout import update


@pytest.fixture(scope="module")
def limited() -> Iterator[LocalCluster]:
    with LocalCluster(1, sessions=40) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cut(limited: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(chain(), limited.cluster(), tmp_path_factory.mktemp("shards"), stages_by(a="*"))


def reserving(cut: Split, sessions: int, *, exclusive: bool = False) -> Plan:
    return cut.plan.reserving(sessions, exclusive=exclusive)


def test_sessions_of_all_deployments_are_bounded_and_generations_share_theirs(limited: LocalCluster, cut: Split, tmp_path: Path) -> None:
    deploy(reserving(cut, 30), cut.shards, name="one")
    with pytest.raises(
        InsufficientMemory, match=r"'two' reserves 11 requests at once; of this node's limit of 40, 30 are reserved by 'one'"
    ) as caught:
        deploy(reserving(cut, 11), cut.shards, name="two")
    assert "--sessions" in caught.value.remedy
    update(reserving(cut, 25), cut.shards, name="one")  # both are loaded, and a request is in one of them
    deploy(reserving(cut, 10), cut.shards, name="two")
    (node,) = status(limited.cluster())
    assert (node.sessions_reserved, node.sessions_limit) == (40, 40)
    limited.cluster().save(tmp_path / "cluster.toml")
    shown = CliRunner().invoke(status_command, ["--cluster", str(tmp_path / "cluster.toml")]).output
    assert "a has reserved 40 of 40 requests at once\n" in shown
    for name in ("one", "two"):
        undeploy(limited.cluster(), name)
    deploy(reserving(cut, 40), cut.shards, name="three")
    undeploy(limited.cluster(), "three")


def test_threads_may_be_had_exclusively(limited: LocalCluster, cut: Split) -> None:
    deploy(reserving(cut, 1), cut.shards, name="shared")
    with pytest.raises(AlreadyExists, match="'alone' wants the threads of this node exclusively; here are 'shared'"):
        deploy(reserving(cut, 1, exclusive=True), cut.shards, name="alone")
    undeploy(limited.cluster(), "shared")
    deploy(reserving(cut, 1, exclusive=True), cut.shards, name="alone")
    with pytest.raises(AlreadyExists, match="'alone' has the threads of this node exclusively"):
        deploy(reserving(cut, 1), cut.shards, name="shared")
    update(reserving(cut, 2, exclusive=True), cut.shards, name="alone")
    (node,) = status(limited.cluster())
    assert all(d.exclusive for d in node.deployments)
    undeploy(limited.cluster(), "alone")


def test_a_plan_that_reserves_nothing_in_particular_reads_and_hashes_as_before(cut: Split) -> None:
    assert "exclusive" not in cut.plan.to_json()
    alone = dataclasses.replace(cut.plan, exclusive=True)
    assert Plan.from_json(alone.to_json()) == alone
    assert alone.sha256 != cut.plan.sha256
