"""probe, profile, plan and bench on real nodes, through the commands and through the library."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster
from partitioner import bandwidth, cli
from partitioner.bandwidth import probe
from partitioner.benching import random_inputs
from partitioner.profiling import HERE, Profile
from partitioner.resizing import at_sizes
from splitnet.cli import run_command
from splitnet.cluster import Cluster
from splitnet.errors import BadCluster, BadInput, BadPlan, NodeUnavailable, NotFound
from splitnet.plan import Plan


class Residual(torch.nn.Module):
    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


def build() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Residual(), (torch.randn(2, 64),)


@pytest.fixture(scope="module")
def boxes() -> Iterator[LocalCluster]:
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model() -> Any:
    return partitioner.capture(*build(), name="residual")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module that `py:` can import, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "planner_shop.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_planner_commands import build\n"
    )
    return tmp_path


def run(command: Any, *arguments: str) -> int:
    return run_command(command, list(arguments))


def test_the_whole_way_by_commands(boxes: LocalCluster, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [part for address in boxes.addresses.values() for part in ("--node", address)]
    assert run(cli.probe, *nodes, "--budget", "0.2", "-o", "cluster.toml") == 0
    shown, warned = capsys.readouterr()
    assert "from \\ to" in shown
    assert "MB/s" in shown
    cluster = Cluster.load("cluster.toml")
    assert [node.name for node in cluster.nodes] == ["a", "b", "c"]
    assert len(cluster.links) == 6, warned
    assert all(node.reference_s > 0 for node in cluster.nodes)
    assert all(0 < link.latency_s < 1 and link.bandwidth_bytes_per_s > 1e5 for link in cluster.links)

    assert (
        run(
            cli.profile,
            "py:planner_shop:build",
            "--cluster",
            "cluster.toml",
            "-o",
            "m.profile.json",
            "--repeats",
            "3",
            "--batch",
            "4",
            "--budget",
            "0.2",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "aten.linear.default" in shown
    assert "for a batch of 4" in shown
    measured = Profile.load("m.profile.json")
    assert set(measured.columns) == {HERE, "a", "b", "c"}
    assert measured.columns["a"].how.startswith("measured on node 'a', engine torch-graph, 1 thread")

    planning = [
        "py:planner_shop:build",
        "--cluster",
        "cluster.toml",
        "--profile",
        "m.profile.json",
        "--stages",
        "3",
        "--lossless",
        "-o",
        "plan.json",
    ]
    assert run(cli.plan, *planning) == 0
    assert "3 stages on 3 nodes" in capsys.readouterr().out
    plan = Plan.load("plan.json")
    assert all(stage.shard for stage in plan.stages)
    assert plan.prediction is not None
    assert dict(plan.prediction.symbols) == {"batch": 4}

    deployed = splitnet.deploy(plan, {s.name: Path("plan.shards") / s.name for s in plan.stages}, name="residual")
    try:
        assert run(cli.bench, "plan.json", "--name", "residual", "--requests", "12", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        figures = report["measured"]
        assert figures["latency_p95_s"] >= figures["latency_p50_s"] > 0
        assert figures["throughput_per_s"] > 0
        assert figures["batch"] == 4
        assert [stage["stage"] for stage in figures["stages"]] == ["stage0", "stage1", "stage2"]
        assert all(stage["compute_s"] > 0 for stage in figures["stages"])
        assert set(figures["bytes_per_link"]) == set(report["predicted"]["bytes_per_link"])
        for link, size in report["predicted"]["bytes_per_link"].items():
            raw = all(t.codec == "raw" for t in plan.transfers)
            assert figures["bytes_per_link"][link] == size if raw else figures["bytes_per_link"][link] > 0
        assert run(cli.bench, "plan.json", "--name", "residual", "--requests", "8") == 0
        shown = capsys.readouterr().out
        assert "measured / predicted" in shown
        assert "latency p50" in shown
        with splitnet.Client(deployed.ingress, "residual") as client:
            inputs = random_inputs(plan, {"batch": 3})
            answer = client.infer(inputs)["output"]
        module, _ = build()
        with torch.no_grad():
            assert (torch.from_numpy(answer) == module(torch.from_numpy(inputs["x"]))).all()
    finally:
        splitnet.undeploy(plan, "residual")
    Path("plan.shards").rename("elsewhere")
    assert run(cli.bench, "plan.json", "--name", "residual") == 2
    assert "no deployment 'residual'" in capsys.readouterr().err


def test_plan_measures_by_itself_and_writes_json(boxes: LocalCluster, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes.cluster().save("cluster.toml")
    planning = ["py:planner_shop:build", "--cluster", "cluster.toml", "-o", "p.json", "--budget", "0.2"]
    assert run(cli.plan, *planning, "--json") == 0
    assert Plan.from_json(capsys.readouterr().out) == Plan.load("p.json")
    assert run(cli.plan, *planning) == 0
    assert "One machine alone is best for latency" in capsys.readouterr().out


def test_commands_say_what_is_wrong(boxes: LocalCluster, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes.cluster().save("cluster.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert run(cli.probe, "--node", next(iter(boxes.addresses.values())), "--node", address, "-o", "new.toml") == 1
    error = capsys.readouterr().err
    assert address in error
    assert "remedy: start `splitnet node`" in error
    assert "Traceback" not in error
    assert not Path("new.toml").exists()
    assert run(cli.plan, "py:nowhere:build", "--cluster", "cluster.toml", "-o", "p.json") == 2
    assert "nowhere" in capsys.readouterr().err
    assert run(cli.plan, "py:planner_shop:build", "--cluster", "missing.toml", "-o", "p.json") == 2
    assert "missing.toml" in capsys.readouterr().err
    assert run(cli.profile, "py:planner_shop:build", "-o", "x.json", "--size", "sequence=4") == 2
    assert "no symbolic size 'sequence'; it has batch" in capsys.readouterr().err
    assert run(cli.bench, "p.json", "--size", "batch") == 2
    assert "SYMBOL=N" in capsys.readouterr().err


def test_a_profile_of_another_model_is_refused(boxes: LocalCluster, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes.cluster().save("cluster.toml")
    other = partitioner.capture(Residual(width=8), (torch.randn(2, 8),), name="other")
    partitioner.profile(other, repeats=1).save("other.json")
    assert run(cli.plan, "py:planner_shop:build", "--cluster", "cluster.toml", "--profile", "other.json", "-o", "p.json") == 2
    assert "is of another model (other)" in capsys.readouterr().err


def test_probe_by_library(boxes: LocalCluster) -> None:
    seen: list[tuple[int, int, str]] = []
    addresses = list(boxes.addresses.values())[:2]
    cluster = probe(addresses, budget_s=0.2, on_progress=lambda *step: seen.append(step))
    assert [node.address for node in cluster.nodes] == addresses
    assert [step[2] for step in seen] == ["speed of a", "speed of b", "a -> b", "b -> a", ""]
    with pytest.raises(BadInput, match="is given twice"):
        probe([addresses[0], addresses[0]])
    with pytest.raises(BadInput, match="not HOST:PORT"):
        probe(["nonsense"])


def test_a_link_that_fails_once_is_measured_again(boxes: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = bandwidth._measure, set[str]()

    async def breaks_once(node: Any, request: Any, budget_s: float) -> Any:
        if request.peer_address and node.name not in failed:
            failed.add(node.name)
            raise NodeUnavailable("the connection broke", node=node.name)
        return await real(node, request, budget_s)

    monkeypatch.setattr(bandwidth, "_measure", breaks_once)
    cluster = probe(list(boxes.addresses.values())[:2], budget_s=0.1)
    assert failed == {"a", "b"}
    assert len(cluster.links) == 2


def test_two_nodes_of_one_name() -> None:
    with LocalCluster(1) as first, LocalCluster(1) as second, pytest.raises(BadCluster, match="are both called 'a'"):
        probe([*first.addresses.values(), *second.addresses.values()], budget_s=0.1)


def test_a_profile_adds_up_to_the_whole_run(model: Any) -> None:
    steps: list[tuple[int, int]] = []
    measured = partitioner.profile(model, repeats=5, on_progress=lambda *step: steps.append(step))
    column = measured.columns[HERE]
    assert column.how == "measured here"
    assert sum(column.seconds) == pytest.approx(measured.whole_s)
    linear = [s for s, v in zip(column.seconds, measured.structure.vertices, strict=True) if "linear" in v.op]
    assert len(linear) == 4
    assert min(linear) > 0
    assert measured.threads == 1
    assert steps[-1] == (7, 7, "operators here")
    assert Profile.from_json(measured.to_json()) == measured
    with pytest.raises(BadInput, match="repeats must be at least 1"):
        partitioner.profile(model, repeats=0)


def test_profiling_leaves_the_thread_count(model: Any) -> None:
    before = torch.get_num_threads()
    partitioner.profile(model, repeats=1, threads=2)
    assert torch.get_num_threads() == before


def test_a_model_at_another_batch(model: Any) -> None:
    eight = at_sizes(model, {"batch": 8})
    assert eight.structure.batch == 8
    assert eight.sha256 == model.sha256
    assert eight.example_inputs["x"].shape == (8, 64)
    assert (eight.example_inputs["x"][2:4] == model.example_inputs["x"]).all()
    before = {v.name: v for v in model.structure.vertices}
    for vertex in eight.structure.vertices:
        if vertex.op != "size":
            assert vertex.output_bytes == 4 * before[vertex.name].output_bytes
            assert vertex.flops == 4 * before[vertex.name].flops
            assert vertex.activation_bytes == 4 * before[vertex.name].activation_bytes
    assert at_sizes(model, {"batch": 2}) is model
    with pytest.raises(BadInput, match="must be at least 1, got 0"):
        at_sizes(model, {"batch": 0})


def test_bench_refuses_another_plan_and_a_lost_node(boxes: LocalCluster, model: Any, tmp_path: Path) -> None:
    measured = partitioner.profile(model, repeats=1)
    plan = partitioner.plan(measured, boxes.cluster(), stages=2)
    shards = partitioner.cut(model, plan, tmp_path)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    splitnet.deploy(plan, shards, name="one")
    try:
        report = partitioner.bench(plan, deployment="one", requests=4)
        assert report.batch == 2
        other = partitioner.plan(
            measured, boxes.cluster(), stages=1, forbid=[n.name for n in boxes.cluster().nodes if n.name != plan.ingress.name]
        )
        with pytest.raises(BadPlan, match="serves another plan"):
            partitioner.bench(other, deployment="one", requests=4)
        with pytest.raises(BadInput, match="requests must be at least 2"):
            partitioner.bench(plan, deployment="one", requests=1)
        with pytest.raises(NotFound, match="no deployment 'two'"):
            partitioner.bench(plan, deployment="two", requests=4)
    finally:
        splitnet.undeploy(plan, "one")


def test_bench_without_a_node(model: Any) -> None:
    with LocalCluster(1) as gone:
        plan = partitioner.plan(partitioner.profile(model, repeats=1), gone.cluster())
    with pytest.raises(NodeUnavailable):
        partitioner.bench(plan, requests=2, timeout_s=5)


@pytest.mark.parametrize("command", [cli.probe, cli.profile, cli.plan, cli.bench])
def test_help_has_an_example(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"splitnet {command.name}" in capsys.readouterr().out
