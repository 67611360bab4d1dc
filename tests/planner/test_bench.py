"""`splitnet bench`: predicted beside measured, one node alone, and what was measured fed back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_models import chain, diamond, split, stages_by

import partitioner
import splitnet
from nodes.testing import LocalCluster
from partitioner import cli
from partitioner.bench_report import Alone, BenchReport, report_text
from partitioner.benching import bench, random_inputs
from partitioner.feedback import corrected
from partitioner.merging import merge, on_one_node
from partitioner.profiling import HERE, Profile
from splitnet.cli import run_command
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, NotFound
from splitnet.plan import NodeRef, Prediction


@pytest.fixture(scope="module")
def boxes() -> Iterator[LocalCluster]:
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.mark.parametrize("model", [chain, diamond], ids=["chain", "diamond"])
def test_merged_stages_are_the_model(boxes: LocalCluster, tmp_path: Path, model: object) -> None:
    graph = model()  # type: ignore[operator]
    names = [v.name for v in graph.structure.vertices if v.op != "input"]
    thirds = {"a": names[: len(names) // 3], "b": names[len(names) // 3 : 2 * len(names) // 3], "c": ["*"]}
    cut = split(graph, boxes.cluster(), tmp_path / "parts", stages_by(**{n: " ".join(ops) for n, ops in thirds.items()}))
    whole = merge(cut.plan, cut.shards, tmp_path / "whole")
    plan = on_one_node(cut.plan, NodeRef("b", boxes.addresses["b"])).with_shards({"whole": whole.sha256})
    splitnet.deploy(plan, {"whole": whole}, name="whole")
    try:
        for batch in (2, 3):
            inputs = cut.inputs(batch)
            with splitnet.Client(boxes.addresses["b"], "whole") as client:
                answer = client.infer(inputs)
            expected = cut.whole(inputs)
            assert {k: v.tobytes() for k, v in answer.items()} == {k: v.tobytes() for k, v in expected.items()}
    finally:
        splitnet.undeploy(plan, "whole")


@pytest.fixture(scope="module")
def planned(boxes: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile]:
    """plan.json and plan.shards of a chain over three nodes."""
    folder = tmp_path_factory.mktemp("bench")
    graph = chain()
    profile = partitioner.profile(graph, repeats=2, cluster=boxes.cluster(), scale=True)
    names = [v.name for v in graph.structure.vertices if "linear" in v.op]
    plan = partitioner.plan(profile, boxes.cluster(), at=names[1:], nodes=["a", "b", "c"])
    shards = partitioner.cut(graph, plan, folder / "plan.shards")
    plan.with_shards({name: shard.sha256 for name, shard in shards.items()}).save(folder / "plan.json")
    return folder / "plan.json", profile


def test_a_plan_that_is_not_deployed_is_served_for_the_while(
    boxes: LocalCluster, planned: tuple[Path, Profile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, profile = planned
    boxes.cluster().save(tmp_path / "cluster.toml")
    measured = tmp_path / "measured.json"
    arguments = [str(file), "--requests", "6", "--against", "one-node", "-o", str(measured), "--cluster", str(tmp_path / "cluster.toml")]
    assert run_command(cli.bench, arguments) == 0
    shown = capsys.readouterr().out
    for text in (
        "it was for this, and was taken off again",
        "one node alone",
        "the best node alone",
        "memory a",
        "bytes a->b",
        "one request at a time",
    ):
        assert text in shown
    assert not any(node.deployments for node in splitnet.status(boxes.cluster()))
    report = BenchReport.load(measured)
    assert report.deployed_for_this
    assert [alone.node for alone in report.alone] == ["a", "b", "c"]
    assert all(alone.latency_p95_s >= alone.latency_p50_s > 0 and alone.throughput_per_s > 0 for alone in report.alone)
    assert all(s.compute_s > 0 and s.wait_s > 0 and s.send_s > 0 for s in report.stages_alone[:2])
    assert report.stages_alone[1].decode_s > 0
    assert set(report.reserved_bytes) == {"a", "b", "c"}
    assert BenchReport.from_json(report.to_json()) == report
    assert run_command(cli.bench, [str(file), "--requests", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["requests"] == 2

    better, cluster = corrected(profile, boxes.cluster(), report)
    assert "corrected" in better.columns["a"].how
    plan = splitnet.Plan.load(file)
    place = {v.name: i for i, v in enumerate(profile.structure.vertices)}
    for stage, seen in zip(plan.stages, report.stages_alone, strict=True):
        assert sum(better.columns[stage.node].seconds[place[n]] for n in stage.operators) == pytest.approx(seen.compute_s)
    again = partitioner.plan(better, cluster, at=[s.operators[0] for s in plan.stages[1:]], nodes=["a", "b", "c"])
    assert again.prediction is not None
    assert Cluster.from_document({"nodes": [dataclasses.asdict(n) | {"codecs": []} for n in cluster.nodes]}).nodes


def test_without_shards_and_deployment_it_says_what_to_do(boxes: LocalCluster, planned: tuple[Path, Profile], tmp_path: Path) -> None:
    plan = splitnet.Plan.load(planned[0])
    with pytest.raises(NotFound, match="no deployment 'chain'") as error:
        bench(plan, requests=2)
    assert "splitnet deploy" in error.value.remedy
    with pytest.raises(BadInput, match="needs the plan's shards"):
        bench(plan, requests=2, against=plan.nodes)


def test_a_node_that_is_too_small_alone_is_named(planned: tuple[Path, Profile]) -> None:
    plan, shards = splitnet.Plan.load(planned[0]), planned[0].with_suffix(".shards")
    with LocalCluster(1, names=("tiny",), memory_bytes=2000) as small:
        report = bench(
            plan, shards={s.name: shards / s.name for s in plan.stages}, against=[NodeRef("tiny", small.addresses["tiny"])], requests=2
        )
    assert report.alone[0].why_not
    assert "not possible" in report_text(plan, report)
    assert "No node can serve the model alone" in report_text(plan, report)


def made_up(profile: Profile, plan: splitnet.Plan, **changes: object) -> BenchReport:
    seconds = {"wait_s": 0.0, "decode_s": 0.0, "encode_s": 0.0, "send_s": 0.0}
    from partitioner.bench_report import StageTime

    stages = tuple(StageTime(s.name, s.node, s.seconds, 0.001 * (i + 1), **seconds) for i, s in enumerate(plan.stages))
    report = BenchReport(
        plan.model, plan.model_sha256, plan.to_json(), 10, 2, 0.02, 0.03, 100.0, 0.001, {"a->b": 128}, {}, {}, stages, stages
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def test_a_benchmark_corrects_the_pace_of_a_full_pipeline(boxes: LocalCluster, planned: tuple[Path, Profile]) -> None:
    plan, profile = splitnet.Plan.load(planned[0]), planned[1]
    for throughput in (200.0, 90.0):
        better, cluster = corrected(profile, boxes.cluster(), made_up(profile, plan, throughput_per_s=throughput, latency_p50_s=0.0075))
        again = partitioner.plan(better, cluster, at=[s.operators[0] for s in plan.stages[1:]], nodes=["a", "b", "c"])
        assert again.prediction is not None
        assert again.prediction.throughput_per_s == pytest.approx(throughput, rel=0.01)


def test_a_client_on_the_nodes_machine_takes_of_the_shared_cores(boxes: LocalCluster, planned: tuple[Path, Profile]) -> None:
    plan, profile = splitnet.Plan.load(planned[0]), planned[1]
    assert plan.prediction is not None
    apart = dataclasses.replace(plan.prediction, throughput_per_s=100.0, bottleneck="node a")
    together = dataclasses.replace(apart, bottleneck="2 cores shared by nodes a, b")
    report = made_up(profile, plan, client_cpu_s=0.01)
    assert report.expected_per_s(apart) == 100.0
    assert report.expected_per_s(together) == pytest.approx(50.0)
    assert "leaves 10.0 ms of the shared cores" in report_text(dataclasses.replace(plan, prediction=together), report)


def test_feedback_by_hand(boxes: LocalCluster, planned: tuple[Path, Profile]) -> None:
    plan, profile = splitnet.Plan.load(planned[0]), planned[1]
    seconds = tuple(0.0 if v.op == "input" else 0.0005 for v in profile.structure.vertices)
    profile = dataclasses.replace(profile, columns={name: dataclasses.replace(c, seconds=seconds) for name, c in profile.columns.items()})
    better, cluster = corrected(profile, boxes.cluster(), made_up(profile, plan))
    # the latency that nothing explains is the ingress's: 20 ms - 1 ms of the client's - 1, 2 and 3 ms of computing - three links' latency
    links = sum(cluster.link(a, b).latency_s + t.bytes / 1e9 for a, b, t in _moves(cluster, plan))  # type: ignore[union-attr]
    assert cluster.node("a").request_s == pytest.approx(0.020 - 0.001 - 0.006 - links)
    assert cluster.node("b").request_s == 0.0
    assert better.columns[HERE] == profile.columns[HERE]
    saturated = made_up(profile, plan)
    busy = tuple(dataclasses.replace(s, send_s=0.0095) for s in saturated.stages)
    _, cluster = corrected(profile, boxes.cluster(), dataclasses.replace(saturated, stages=busy))
    assert cluster.link("a", "b").bandwidth_bytes_per_s == pytest.approx(12_800)  # type: ignore[union-attr]
    assert cluster.link("b", "a").bandwidth_bytes_per_s == 1e9  # type: ignore[union-attr]
    with pytest.raises(BadInput, match="of another model"):
        corrected(profile, boxes.cluster(), made_up(profile, plan, model_sha256="0" * 64))
    slow = tuple(dataclasses.replace(s, compute_s=9.0) for s in saturated.stages_alone)
    with pytest.raises(BadInput, match="times what was profiled"):
        corrected(profile, boxes.cluster(), made_up(profile, plan, stages_alone=slow))


def _moves(cluster: Cluster, plan: splitnet.Plan) -> list[tuple[str, str, splitnet.plan.Transfer]]:
    home = {stage.name: stage.node for stage in plan.stages} | {"": plan.ingress.name}
    return [(home[t.source], home[t.target], t) for t in plan.transfers if home[t.source] != home[t.target]]


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        BenchReport.load(tmp_path / "nothing.json")
    (tmp_path / "x.json").write_text('{"version": 7}')
    with pytest.raises(BadInput, match="x.json: the report has version 7"):
        BenchReport.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"version": 1, "stages": 3}')
    with pytest.raises(BadInput, match="not what `splitnet bench -o` writes"):
        BenchReport.load(tmp_path / "x.json")


def test_random_inputs_fit(planned: tuple[Path, Profile]) -> None:
    plan = splitnet.Plan.load(planned[0])
    inputs = random_inputs(plan, {"batch": 5})
    assert inputs["x"].shape == (5, 16)
    assert inputs["x"].dtype == np.float32
    assert np.array_equal(random_inputs(plan, {"batch": 5})["x"], inputs["x"])
    with pytest.raises(BadInput, match="the size of dimension 'batch' is not known"):
        random_inputs(plan, {})


def test_a_verdict_in_words(planned: tuple[Path, Profile]) -> None:
    plan = dataclasses.replace(splitnet.Plan.load(planned[0]), prediction=Prediction(2, 0.01, 50.0))
    report = made_up(planned[1], plan).with_alone((Alone("a", 0.04, 0.05, 25.0), Alone("b", 0.03, 0.05, 20.0)))
    text = report_text(plan, report)
    assert "Measured: 1.50x the speed and 4.00x the throughput of the best node alone (b, a)." in text
    assert "latency p50" in text
    assert "1.82" in text  # 20 ms measured, 10 ms predicted + 1 ms for the client's way
