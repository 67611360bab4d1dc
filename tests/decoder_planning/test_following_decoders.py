"""`splitnet watch` and `splitnet deploy --update` where text is generated: another plan takes over, and nobody's tokens change."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_decoders import WORKLOAD, cluster_of, save_tiny

import splitnet
from nodes.testing import LocalCluster
from partitioner.decoders.figures import DecoderProfile
from partitioner.decoders.follower import price_decoder
from partitioner.decoders.model import DecoderModel, load_decoder
from partitioner.decoders.outcome import objective_s
from partitioner.decoders.planning import OBJECTIVES, plan_decoder
from partitioner.decoders.weights import Weights
from partitioner.decoders.writing import cut_decoder
from partitioner.observing import Observer
from splitnet.cli import main
from splitnet.cluster import Cluster
from splitnet.errors import BadPlan
from splitnet.node_status import DeploymentStatus, NodeStatus, StageStatus
from splitnet.plan import Plan

FLOAT = Weights("float32")


def plan_of(model: DecoderModel, profile: DecoderProfile, cluster: Cluster, **asked: object) -> Plan:
    return plan_decoder(model, profile, cluster, WORKLOAD, weights=FLOAT, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_plan_costs_what_was_predicted_of_it(llama: DecoderModel, profile_of: Callable[..., DecoderProfile], objective: str) -> None:
    profile, cluster = profile_of(llama, {"a": 1.0, "b": 0.5}, {"float32/float32": 1.0}), cluster_of({"a": 1 << 30, "b": 1 << 30})
    plan = plan_of(llama, profile, cluster, objective=objective, at=["layers.2"])
    assert plan.generation is not None
    assert plan.generation.expected is not None
    assert price_decoder(llama, profile, cluster, plan) == pytest.approx(objective_s(plan.generation.expected, objective))
    slower = dataclasses.replace(cluster, links=tuple(dataclasses.replace(link, bandwidth_bytes_per_s=1e4) for link in cluster.links))
    assert price_decoder(llama, profile, slower, plan) > 1.5 * price_decoder(llama, profile, cluster, plan)
    assert price_decoder(llama, profile, dataclasses.replace(cluster, links=()), plan) == math.inf
    assert price_decoder(llama, profile, dataclasses.replace(cluster, nodes=cluster.nodes[:1], links=()), plan) == math.inf


def test_a_node_that_turned_slow_is_planned_with_as_it_is(llama: DecoderModel, profile_of: Callable[..., DecoderProfile]) -> None:
    profile, cluster = profile_of(llama, {"a": 1.0, "b": 1.0}, {"float32/float32": 1.0}), cluster_of({"a": 1 << 30, "b": 1 << 30})
    plan = plan_of(llama, profile, cluster, at=["layers.2"])
    observer = Observer(cluster, profile)

    def statuses(passes: int, factors: dict[str, float]) -> list[NodeStatus]:
        found = []
        for stage in plan.stages:
            spent_s = passes * factors[stage.node] * profile.stage_s(cluster.node(stage.node), plan, stage)
            told = StageStatus(stage.name, "decoder", passes, 0, 0.0, 0.0, spent_s, 0.0, 0.0, 0, 0)
            held = DeploymentStatus("tiny", plan.model, plan.sha256, stage.name == "stage0", 16, 0, (told,))
            found.append(NodeStatus(stage.node, "", deployments=(held,)))
        return found

    observer.look(statuses(10, {"a": 1.0, "b": 1.0}), "tiny", plan, 0.0)
    observer.look(statuses(20, {"a": 1.0, "b": 1.0}), "tiny", plan, 1.0)
    assert observer.changed() == []
    for k in range(3, 12):  # passes of any size: how much slower one node is than the other is what counts
        observer.look(statuses(10 * k, {"a": 5.0, "b": 20.0}), "tiny", plan, float(k))
    assert any(note.startswith("node b: ") for note in observer.changed())
    before, now = (plan_of(llama, each, cluster, objective="throughput", stages=2) for each in (profile, observer.profile()))
    assert sum(len(s.operators) for s in now.stages if s.node == "b") < sum(len(s.operators) for s in before.stages if s.node == "b")


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(2) as cluster:
        yield cluster


def written(folder: Path, nodes: LocalCluster, profile_of: Callable[..., DecoderProfile]) -> tuple[Path, Path, Path]:
    """plan.json with its shards (cut in two), other.json (on one node), and a cluster file that calls the links bad, with profile.json beside."""
    model = load_decoder(str(save_tiny(folder / "tiny")))
    profile = profile_of(model, {"a": 1.0, "b": 1.0}, {"float32/float32": 1.0})
    cluster = nodes.cluster()
    paths = []
    for name, asked in (("plan", {"at": ["layers.2"]}), ("other", {"at": ["layers.1"]})):
        made = plan_of(model, profile, cluster, **asked)
        shards = cut_decoder(model, made, folder / f"{name}.shards")
        paths.append(folder / f"{name}.json")
        made.with_shards({stage: shard.sha256 for stage, shard in shards.items()}).save(paths[-1])
    bad = dataclasses.replace(cluster, links=tuple(dataclasses.replace(link, bandwidth_bytes_per_s=1e3) for link in cluster.links))
    bad.save(folder / "cluster.toml")
    profile.save(folder / "profile.json")
    return paths[0], paths[1], folder / "cluster.toml"


def test_text_goes_on_while_another_plan_takes_over(
    nodes: LocalCluster, tmp_path: Path, profile_of: Callable[..., DecoderProfile], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, other, cluster = written(tmp_path, nodes, profile_of)
    assert main(["deploy", str(plan)]) == 0
    address = Plan.load(plan).ingress.address
    prompt = [5, 6, 7]
    with splitnet.Client(address, "tiny") as client:
        expected = list(client.generate(prompt, 24, ignore_eos=True))
    ended, wrong, answers = threading.Event(), [], [0]

    def ask() -> None:
        with splitnet.Client(address, "tiny") as client:
            while not ended.is_set():
                if list(client.generate(prompt, 24, ignore_eos=True, retry=True)) != expected:
                    wrong.append("other tokens")
                answers[0] += 1

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        assert main(["deploy", str(other), "--update"]) == 0
        assert "generation 2" in capsys.readouterr().out
        usual = [
            "watch",
            str(other),
            "--cluster",
            str(cluster),
            "--profile",
            str(tmp_path / "profile.json"),
            "--for",
            "0",
            "--steady",
            "0",
            "--json",
        ]
        assert main([*usual, "--dry-run"]) == 0
        would = json.loads(capsys.readouterr().out)
        assert (would["generation"], would["would_switch"], would["switched"]) == (2, True, None)
        assert main(usual) == 0
        look = json.loads(capsys.readouterr().out)
        assert (look["error"], look["switched"]["generation"]) == ("", 3)
        assert [stage["node"] for stage in look["best"]] == [Plan.load(plan).ingress.name]
        done = answers[0]
        with splitnet.Client(address, "tiny") as client:
            assert list(client.generate(prompt, 24, ignore_eos=True)) == expected
    finally:
        ended.set()
        for thread in asking:
            thread.join()
        assert main(["unload", "tiny", "--cluster", str(cluster)]) == 0
    assert wrong == []
    assert done > 0


def test_what_does_not_fit_together_is_told(
    llama: DecoderModel, tied: DecoderModel, profile_of: Callable[..., DecoderProfile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, cluster = profile_of(llama, {"a": 1.0}, {"float32/float32": 1.0}), cluster_of({"a": 1 << 30})
    plan = plan_of(llama, profile, cluster)
    with pytest.raises(BadPlan, match="tokens cached"):
        price_decoder(llama, dataclasses.replace(profile, cached_tokens=3), cluster, plan)
    plan.save(tmp_path / "plan.json")
    cluster.save(tmp_path / "cluster.toml")
    profile_of(tied, {"a": 1.0}, {"float32/float32": 1.0}).save(tmp_path / "tied.json")
    arguments = [
        "watch",
        str(tmp_path / "plan.json"),
        "--cluster",
        str(tmp_path / "cluster.toml"),
        "--profile",
        str(tmp_path / "tied.json"),
    ]
    assert main([*arguments, "--dry-run", "--for", "0"]) == 2
    assert "another model" in capsys.readouterr().err
