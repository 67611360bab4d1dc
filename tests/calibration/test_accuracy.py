"""A plan keeps to the loss that is allowed: what it may use without a calibration, with one, and what is measured before it is handed out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import captured
from trained_digits import Trained

import splitnet
from nodes.testing import LocalCluster
from partitioner.accuracy import lossy_links
from partitioner.calibrating import Task, calibrate
from partitioner.calibration import UNMEASURED, Calibration
from partitioner.constants import codec_figures
from partitioner.cutting import cut
from partitioner.layout import lay_out_again
from partitioner.planning import plan
from partitioner.profiling import HERE, Column, Profile
from partitioner.samples import load_samples
from partitioner.splitting import SplitModel
from splitnet.cli import cli, run_command
from splitnet.cluster import Cluster, ClusterNode, CodecSpeed, Link
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput, BadPlan, NoPlan
from splitnet.plan import Plan

SLOW, FAST = 1e5, 1e9
SOME = ("raw", "zstd", "bf16", "int8", "int4")


def profile_of(trained: Trained) -> Profile:
    structure = trained.graph.structure
    seconds = tuple(0.0 if v.op == "input" else 0.001 for v in structure.vertices)
    return Profile(structure, {HERE: Column(seconds, "given")}, "a test", 1, "2", 1, math.fsum(seconds), reference_s=0.010)


def cluster(bandwidth: float = SLOW, names: str = "ab", codecs: tuple[str, ...] = SOME) -> Cluster:
    speeds = tuple(CodecSpeed(name, 5e8, 5e8, {"raw": 1.0, "zstd": 1.1, "bf16": 2.0, "int8": 3.9}.get(name, 7.0)) for name in codecs)
    nodes = tuple(ClusterNode(n, f"127.0.0.1:{7000 + k}", reference_s=0.010, codecs=speeds) for k, n in enumerate(names))
    return Cluster(nodes, tuple(Link(a, b, bandwidth, 1e-4) for a, b in itertools.permutations(names, 2)))


@pytest.fixture(scope="module")
def task(trained: Trained) -> Task:
    return Task.make(trained.graph, load_samples(trained.data, trained.graph.structure, most=60, batch=20), "mse")


@pytest.fixture(scope="module")
def calibration(task: Task) -> Calibration:
    return calibrate(task, codecs=SOME)


def best(trained: Trained, bandwidth: float = SLOW, names: str = "ab", **wishes: Any) -> Plan:
    wishes = {"stages": 2, "objective": "throughput", **wishes}
    return plan(profile_of(trained), cluster(bandwidth, names), **wishes)


def used(chosen: Plan) -> set[str]:
    return {codec for _, _, codec in lossy_links(chosen)}


def rate(chosen: Plan) -> float:
    assert chosen.prediction is not None
    return chosen.prediction.throughput_per_s


def test_without_a_calibration_only_the_default_class_is_used_and_said_to_be(trained: Trained) -> None:
    slow = best(trained)
    assert used(slow) == {"bf16"}  # int8 and int4 would be faster
    assert "not the whole model's bits: bf16 on " in slow.explain()
    assert "--lossless forbids it" in slow.explain()
    exact = best(trained, lossless=True)
    assert not used(exact)
    assert "whole model's bits" not in exact.explain()
    assert rate(exact) < rate(slow)
    assert not used(best(trained, bandwidth=FAST))  # nothing to gain
    assert not used(best(trained, tolerance=0.99))  # too little to gain
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1000
    for name in codec_names(default=True):  # what rounds as finely as bfloat16, whatever the values
        assert (get_codec(name).error_bound(values) <= np.abs(values) * 2.0**-8 * 1.001).all(), name


def test_a_loss_can_be_allowed_only_where_it_was_measured(trained: Trained, calibration: Calibration) -> None:
    with pytest.raises(BadInput, match=r"was not measured\n.*splitnet calibrate"):
        best(trained, max_accuracy_loss=0.01)
    assert not used(best(trained, max_accuracy_loss=0.0))
    other = Calibration.from_json(calibration.to_json().replace(trained.graph.sha256, "0" * 64))
    with pytest.raises(BadPlan, match="another model"):
        best(trained, calibration=other)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_the_plan_that_is_chosen_keeps_to_the_budget(trained: Trained, task: Task, calibration: Calibration, names: str) -> None:
    rates, codecs = [], []
    for budget in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        chosen = best(
            trained,
            names=names,
            stages=len(names),
            max_accuracy_loss=budget,
            calibration=calibration,
            measure_loss=task.loss,
            tolerance=0.0,
        )
        loss = task.loss(chosen)
        assert loss <= budget
        assert chosen.prediction is not None
        assert chosen.prediction.loss == loss
        if used(chosen):
            assert f"loses {loss:.3%}" in chosen.explain()
            assert "mse on 60 samples" in chosen.explain()
            assert Plan.from_json(chosen.to_json()) == chosen
        rates.append(rate(chosen))
        codecs.append(used(chosen))
    assert rates == sorted(rates)
    assert codecs[0] == set()
    assert codecs[-1] == {"int4"}
    assert len({frozenset(c) for c in codecs}) > 2


def test_bytes_are_predicted_by_what_was_measured_at_the_cut(trained: Trained, task: Task, calibration: Calibration) -> None:
    """zstd takes less after a ReLU than what normal deviates say, and so the plan cuts there."""
    plain, known = best(trained, lossless=True), best(trained, lossless=True, calibration=calibration)
    assert rate(known) > rate(plain) * 1.1
    transfer = next(t for t in known.transfers if t.source and t.target)
    assert transfer.codec == "zstd"
    ratio = next(c.ratio("zstd") for c in calibration.cuts if c.tensors == transfer.tensors)
    assert rate(known) == pytest.approx(SLOW * ratio / transfer.bytes, rel=1e-9)


def test_a_plan_that_loses_more_than_its_cuts_do_is_chosen_again(trained: Trained, calibration: Calibration) -> None:
    asked: list[set[str]] = []

    def measure(chosen: Plan) -> float:
        asked.append(used(chosen))
        return 0.5 if "int4" in used(chosen) else 1e-9

    chosen = best(trained, max_accuracy_loss=0.1, calibration=calibration, measure_loss=measure)
    assert asked[:2] == [{"int4"}, {"int8"}]  # then what the nodes may change to
    assert used(chosen) == {"int8"}
    assert "1 other was better, and lost more than 0.1" in chosen.explain()
    assert not used(best(trained, max_accuracy_loss=0.1, calibration=calibration, measure_loss=lambda _: math.inf))
    told = best(trained, max_accuracy_loss=0.1, calibration=calibration)
    assert "was not measured as a whole" in told.explain()
    ends = {pair: ["int4"] for pair in itertools.permutations("ab", 2)}
    with pytest.raises(NoPlan, match=r"loses more than 0.1: the last one 0.5"):
        best(trained, max_accuracy_loss=0.1, calibration=calibration, measure_loss=measure, link_codecs=ends)


@settings(max_examples=8)
@given(losses=st.lists(st.floats(0, 1), min_size=12, max_size=12), budget=st.floats(0, 1))
def test_whatever_is_measured_no_plan_over_the_budget_is_handed_out(
    trained: Trained, calibration: Calibration, losses: list[float], budget: float
) -> None:
    measured: list[float] = []

    def measure(chosen: Plan) -> float:
        measured.append(losses[len(measured)])
        return measured[-1]

    chosen = best(trained, max_accuracy_loss=budget, calibration=calibration, measure_loss=measure)
    assert chosen.prediction is not None
    assert not used(chosen) or (chosen.prediction.loss in measured and chosen.prediction.loss <= budget)


def test_what_is_measured_is_what_nodes_answer(trained: Trained, task: Task, calibration: Calibration, tmp_path: Path) -> None:
    """Bit for bit: the same codec, chunk by chunk, between the same operators."""
    with LocalCluster(2) as nodes:
        hand = cluster()
        there = Cluster(tuple(ClusterNode(n.name, n.address, codecs=hand.nodes[0].codecs) for n in nodes.cluster().nodes), hand.links)
        wishes: dict[str, Any] = {"stages": 2, "objective": "throughput", "max_accuracy_loss": 1.0}
        chosen = plan(profile_of(trained), there, calibration=calibration, measure_loss=task.loss, **wishes)
        assert used(chosen) == {"int4"}
        shards = cut(trained.graph, chosen, tmp_path)
        chosen = chosen.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
        splitnet.deploy(chosen, shards)
        inputs = {trained.input: trained.images[:20]}
        with splitnet.Client(chosen.ingress.address) as client:
            answer = client.infer(inputs)
        expected = SplitModel(trained.graph, lay_out_again(trained.graph.structure, chosen.stages)).run(inputs, {(0, 1): "int4"})
        assert answer.keys() == expected.keys()
        assert all(np.array_equal(answer[name], expected[name]) for name in expected)
        whole = trained.graph.run({trained.input: torch.from_numpy(trained.images[:20])})
        assert not any(np.array_equal(answer[name], whole[name].numpy()) for name in expected)


def test_from_samples_to_a_plan_by_commands(trained: Trained, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster().save(tmp_path / "cluster.toml")
    profile_of(trained).save(tmp_path / "p.json")
    asked = ["plan", trained.spec, "--cluster", str(tmp_path / "cluster.toml"), "--profile", str(tmp_path / "p.json"), "--stages", "2"]
    asked += ["--objective", "throughput", "-o", str(tmp_path / "plan.json"), "--max-accuracy-loss", "0.5%"]
    assert run_command(cli, asked) == 2
    assert "run `splitnet calibrate`" in capsys.readouterr().err
    moved = tmp_path / "moved.npz"
    moved.write_bytes(trained.data.read_bytes())
    calibrated = ["calibrate", trained.spec, "--data", str(moved), "--metric", "top1", "--batch", "50", "--codec", "int4"]
    assert run_command(cli, calibrated) == 0
    capsys.readouterr()
    assert run_command(cli, asked) == 0
    said = capsys.readouterr().out
    chosen = Plan.load(tmp_path / "plan.json")
    assert used(chosen) == {"int4"}
    assert chosen.prediction is not None
    assert chosen.prediction.loss <= 0.005
    assert "by int4 on " in said
    assert "top1 on 200 samples; 0.005 allowed (the whole plan, measured)" in said
    moved.unlink()
    assert run_command(cli, asked) == 2
    assert "are not there; a plan is measured with them" in capsys.readouterr().err
    assert run_command(cli, [*asked, "--data", str(trained.data)]) == 0
    np.savez(moved, **{trained.input: trained.images[:50]})
    capsys.readouterr()
    assert run_command(cli, asked) == 2
    assert "are not the samples of the calibration" in capsys.readouterr().err
    assert run_command(cli, [*asked, "--lossless"]) == 2
    assert "contradict each other" in capsys.readouterr().err
    assert run_command(cli, [*asked, "--max-accuracy-loss", "much"]) == 2
    assert "neither a percentage as 0.5% nor a share" in capsys.readouterr().err


def test_what_is_no_float_passes_unharmed_wherever_it_is_cut(tmp_path: Path) -> None:
    """A mask that crosses beside a measured activation does not forbid what was allowed for that."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.where(x > 0, self.first(x), 0.0))

    graph = captured(Masked().eval(), torch.randn(4, 8))
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    found = calibrate(Task.make(graph, load_samples(data, graph.structure), "mse"), codecs=("raw", "int8"))
    structure = graph.structure
    (mask,) = (v.name for v in structure.vertices if v.values[0].dtype == "bool")
    only = dataclasses.replace(found, cuts=tuple(c for c in found.cuts if not any(structure.value[t].dtype == "bool" for t in c.tensors)))
    figures = only.figures(structure, codec_figures(cluster().nodes))
    assert figures["int8"].error_of(mask) == 0.0
    beside = next(v.name for v in structure.vertices if 0.0 < figures["int8"].error_of(v.name) < UNMEASURED)
    assert figures["int8"].sent_bytes(1000.0, (mask, beside)) == figures["int8"].sent_bytes(1000.0, (beside,)) < 400
    assert figures["int8"].sent_bytes(1000.0, (mask,)) == 1000.0
    assert figures["int8"].best_ratio < 10
    assert UNMEASURED in {figures["int8"].error_of(v.name) for v in structure.vertices}
