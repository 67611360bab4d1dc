"""A sweep on real nodes: the choice is measured beside each device alone, and the client's way counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_models import captured
from testbed.bed import Testbed
from testbed.measuring import Subject, probed
from testbed.spec import parse
from testbed.sweep import points_json, sweep, sweep_text
from testbed.turns import measure_in_turns

import splitnet
from partitioner.graph import ModelGraph

BED = {
    "nodes": [{"name": "device"}, {"name": "server"}],
    "default_link": {"bandwidth_mbit_per_s": 1000, "latency_ms": 30},
    "client": {"at": "device"},
}


class Layers(torch.nn.Module):
    """Two equal layers, which take some milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(512, 512)
        self.two = torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def model() -> ModelGraph:
    torch.manual_seed(0)
    return captured(Layers(), torch.randn(64, 512))


@pytest.fixture(scope="module")
def subject(model: ModelGraph) -> Iterator[Subject]:
    with Testbed(parse(BED)) as bed:
        yield Subject.measure(bed, model, probed(bed, 0.2), 0.4)


def test_each_device_alone_and_the_choice(model: ModelGraph) -> None:
    said: list[str] = []
    (point,) = sweep(parse(BED), model, [5e7], "latency", said.append, budget_s=0.8)
    device, server = point.alone
    assert (device.nodes, server.nodes) == (("device",), ("server",))
    # A round trip of 60 ms for what takes some milliseconds: the device keeps it, and the server's figure holds the way there and back.
    assert point.chosen.nodes == ("device",)
    assert point.chosen is device
    assert point.reason
    assert point.ratio == 1.0
    assert server.predicted_s > device.predicted_s + 0.055
    assert server.sent_bytes == 2 * 64 * 512 * 4
    assert device.sent_bytes == 0
    assert server.measured_s is None or server.measured_s > 0.06
    assert device.measured_s is not None
    (document,) = json.loads(points_json([point]))
    assert document["chosen"]["nodes"] == ["device"]
    assert document["alone"][0]["measured_s"] == device.measured_s
    assert document["reason"] == point.reason
    assert "device alone" in sweep_text([point])


def test_plans_are_served_together_and_measured_in_turns(subject: Subject) -> None:
    bed = subject.bed
    bed.reshape(parse(BED))
    plans = [subject.alone(bed.cluster(), name) for name in ("device", "server")]
    latency = measure_in_turns(subject, plans, "latency", 0.3)
    throughput = measure_in_turns(subject, plans, "throughput", 0.3)
    assert [node.deployments for node in splitnet.status(bed.cluster())] == [(), ()]
    assert bed.report()["delayed"] == ["->server", "device->server", "server->", "server->device"]  # shaped again
    assert latency[1] > 0.06  # the client's way to the server and back
    assert all(0 < seconds < latency[1] for seconds in throughput)  # many are under way at once


def test_a_cut_by_hand_is_served_and_measured(subject: Subject) -> None:
    subject.bed.reshape(replace(parse(BED), client_at=""))
    second = next(v.name for v in subject.model.structure.vertices if v.op.startswith("aten.linear") and v.scope.startswith("two"))
    outcome = subject.outcome(subject.cut_at(subject.bed.cluster(), [second], ["server", "device"]), budget_s=0.8)
    assert [stage.node for stage in outcome.plan.stages] == ["server", "device"]
    sent = outcome.report.bytes_per_link
    assert set(sent) == {"server->device", "device->server"}
    assert all(0 < size <= 64 * 512 * 4 for size in sent.values())  # less where the plan has a codec
    assert outcome.latency_s > 0.06  # 30 ms there, 30 ms back to the ingress
    assert outcome.predicted_latency_s > 0.055
    assert outcome.latency_error == pytest.approx(outcome.predicted_latency_s / outcome.latency_s - 1)
    assert len(outcome.lines("x")) == 1
