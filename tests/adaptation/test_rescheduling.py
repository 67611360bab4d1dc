"""`splitnet watch` on real nodes: a plan that has become a bad one is left for a better one, while clients are being answered."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import Split, chain, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from partitioner.followers import CapturedFollower
from partitioner.profiling import HERE, Column, Profile
from partitioner.rescheduling import Watch
from partitioner.watch_command import watch
from partitioner.watching import Rules
from splitnet import background
from splitnet.cluster import Cluster
from splitnet.errors import BadPlan, NotFound
from splitnet.install import deploy, undeploy
from splitnet.rollout import go_back

AT_ONCE = Rules(margin=0.2, steady_s=0.0, pause_s=0.0)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def profile() -> Profile:
    structure = chain().structure
    return Profile(structure, {HERE: Column((1e-3,) * len(structure.vertices), "made up")}, "cpu", 1, "", 1, 1e-3, 0.01)


@pytest.fixture
def served(nodes: LocalCluster, tmp_path: Path) -> Iterator[Split]:
    """Cut where a link is used; deployed as "chain"."""
    cut = split(chain(), nodes.cluster(), tmp_path / "shards", stages_by(a="linear relu", b="*"))
    deploy(cut.plan, cut.shards, name="chain")
    yield cut
    undeploy(nodes.cluster(), "chain", drain_s=0.0)


def slow(nodes: LocalCluster) -> Cluster:
    """What the file says of links makes any cut a bad one."""
    cluster = nodes.cluster()
    return dataclasses.replace(cluster, links=tuple(dataclasses.replace(link, bandwidth_bytes_per_s=1e3) for link in cluster.links))


def follow(nodes: LocalCluster, profile: Profile, folder: Path, rules: Rules = AT_ONCE, *, dry: bool = False) -> Watch[Profile]:
    return Watch("chain", slow(nodes), profile, follower=CapturedFollower(None if dry else chain(), profile), folder=folder, rules=rules)


def test_a_better_plan_takes_over_and_nobody_notices(nodes: LocalCluster, served: Split, profile: Profile, tmp_path: Path) -> None:
    given, ended, wrong = served.inputs(3), threading.Event(), []
    expected = served.whole(given)["output"]

    def ask() -> None:
        with splitnet.Client(served.address, "chain") as client:
            while not ended.is_set():
                if not np.array_equal(client.infer(given)["output"], expected):
                    wrong.append("mixed")

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        watching = follow(nodes, profile, tmp_path / "watch")
        look = background.run(watching.look())
        assert look.error == ""
        assert look.switched is not None
        assert look.present_s > 0.1 > look.best_s
        assert look.best is not None
        assert {stage.node for stage in look.best.stages} == {"a"}, "requests enter where they did"
        assert (tmp_path / "watch" / "generation-2.json").is_file()
        again = background.run(watching.look())
        assert (again.generation, again.switched) == (2, None)
        assert "as good" in again.why
        assert go_back(nodes.cluster(), "chain").generation == 1
    finally:
        ended.set()
        for thread in asking:
            thread.join()
    assert wrong == []


def test_what_it_would_do(nodes: LocalCluster, served: Split, profile: Profile, tmp_path: Path) -> None:
    served.plan.save(tmp_path / "plan.json")
    slow(nodes).save(tmp_path / "cluster.toml")
    profile.save(tmp_path / "profile.json")
    usual = [str(tmp_path / "plan.json"), "--cluster", str(tmp_path / "cluster.toml"), "--profile", str(tmp_path / "profile.json")]
    usual += ["--name", "chain", "--dry-run", "--for", "0"]
    said = CliRunner().invoke(watch, [*usual, "--steady", "0", "--json"], catch_exceptions=False)
    document = json.loads(said.output)
    assert (document["generation"], document["would_switch"], document["switched"]) == (1, True, None)
    assert document["gain"] > 1
    said = CliRunner().invoke(watch, usual, catch_exceptions=False)
    assert "for 0 of 5 s" in said.output
    (status,) = [s for s in splitnet.status(nodes.cluster()) if s.name == "a"]
    assert [d.generation for d in status.generations("chain")] == [1]


def test_a_plan_that_waits_for_its_time_is_not_switched_to(nodes: LocalCluster, served: Split, profile: Profile, tmp_path: Path) -> None:
    look = background.run(follow(nodes, profile, tmp_path, Rules(steady_s=60.0)).look())
    assert (look.switched, look.would) == (None, False)
    assert not (tmp_path / "watch").exists()


def test_a_node_that_is_gone_is_done_without(profile: Profile, tmp_path: Path) -> None:
    with LocalCluster(2) as nodes:
        cut = split(chain(), nodes.cluster(), tmp_path / "shards", stages_by(a="linear relu", b="*"))
        deploy(cut.plan, cut.shards, name="chain")
        watching = Watch(
            "chain", nodes.cluster(), profile, follower=CapturedFollower(chain(), profile), folder=tmp_path / "watch", rules=Rules()
        )
        assert background.run(watching.look()).switched is None
        nodes.kill("b")
        look = background.run(watching.look())
        assert look.error == ""
        assert look.switched is not None
        assert look.switched.kept == 0, "there is no way back to a node that is gone"
        given = cut.inputs(1)
        with splitnet.Client(cut.address, "chain") as client:
            assert np.array_equal(client.infer(given)["output"], cut.whole(given)["output"])
        nodes.kill("a")
        assert "no node answers" in background.run(watching.look()).error


def test_what_a_user_gets_wrong(nodes: LocalCluster, profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing is deployed"):
        background.run(follow(nodes, profile, tmp_path).look())
    other = dataclasses.replace(profile, structure=dataclasses.replace(profile.structure, sha256="0" * 64))
    with pytest.raises(BadPlan, match="another model"):
        CapturedFollower(chain(), other)
