"""Real nodes over a link whose bandwidth changes while they serve."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_models import Split, at_rest, chain, split, stages_by
from testbed.relay import Relay
from testbed.shaping import LinkShape

import splitnet
from nodes.testing import LocalCluster
from splitnet.cli import cli, run_command
from splitnet.cluster import Cluster
from splitnet.install import deploy, status, undeploy
from splitnet.node_status import LinkStatus
from splitnet.plan import CodecOption, Plan

FAST, SLOW = LinkShape(1e8, 0.001), LinkShape(1e6, 0.001)
PATIENCE_S = 15.0  # on a machine that does other things
ROWS = 2000  # of 16 numbers: 128 KB
OPTIONS = (CodecOption("raw", 1.0, 1e12, 1e12), CodecOption("zstd", 1.3, 8e8, 2e9), CodecOption("bf16", 2.0, 1e9, 1e9))
LOSSLESS = OPTIONS[:2]


class Bend:
    """A relay before node b, in a thread of this process."""

    def __init__(self, address: str) -> None:
        self._relay = Relay()
        self.address = self._relay.listen("b")
        self._relay.connect({"b": address}, {})
        self._ended = False
        self.set(FAST)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set(self, shape: LinkShape) -> None:
        self._relay.set_link("", "b", shape)

    def _run(self) -> None:
        while not self._ended:
            self._relay.step([], 0.05)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._relay.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(2) as started:
        yield started
        at_rest(started)


@pytest.fixture
def bend(nodes: LocalCluster) -> Iterator[Bend]:
    bent = Bend(nodes.addresses["b"])
    yield bent
    for deployed in {d.name for node in status(nodes.cluster()) for d in node.deployments}:  # also where a test has failed
        undeploy(nodes.cluster(), deployed)
    bent.close()


def serve(nodes: LocalCluster, bend: Bend, folder: Path, options: tuple[CodecOption, ...]) -> Split:
    """The second stage is on b, which everybody reaches over the link."""
    cluster = Cluster(tuple(dataclasses.replace(n, address=bend.address) if n.name == "b" else n for n in nodes.cluster().nodes))
    cut = split(chain(), cluster, folder, stages_by(a="linear relu", b="*"), max_in_flight=8)
    plan = dataclasses.replace(
        cut.plan,
        objective="throughput",
        stages=tuple(dataclasses.replace(stage, seconds=6e-5) for stage in cut.plan.stages),  # 60 ms for ROWS
        transfers=tuple(dataclasses.replace(t, codecs=options if t.target == "stage1" else ()) for t in cut.plan.transfers),
    )
    with_shards = Plan.from_json(plan.to_json())
    deploy(with_shards, cut.shards, name=folder.name)
    return dataclasses.replace(cut, plan=with_shards)


def link(served: Split) -> LinkStatus:
    return next(found for node in status(served.plan) if node.name == "a" for found in node.links if found.target == "b")


class Load:
    """Keeps a pipeline full, and holds each answer against the whole model's."""

    def __init__(self, served: Split, name: str) -> None:
        self._given = [served.inputs(ROWS, seed) for seed in range(3)]
        self._expected = [served.whole(given) for given in self._given]
        self._served, self._name = served, name
        self.answered = self.exact = 0
        self.worst = 0.0
        self._ended = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    def _requests(self) -> Iterator[dict[str, np.ndarray]]:
        for number in itertools.count():
            if self._ended:
                return
            yield self._given[number % len(self._given)]

    def _run(self) -> None:
        with splitnet.Client(self._served.address, self._name) as client:
            for number, answer in enumerate(client.stream(self._requests())):  # in the order of the requests, or it raises
                for name, expected in self._expected[number % len(self._given)].items():
                    self.worst = max(self.worst, float(np.abs(answer[name] - expected).max()))
                    self.exact += np.array_equal(answer[name], expected)
                self.answered += 1


def until(served: Split, codec: str, limit_s: float) -> float:
    """How long it took to change to that codec."""
    started = time.monotonic()
    while (now := link(served)).codecs[0].codec != codec:
        assert time.monotonic() - started < limit_s, f"still {now}"
        time.sleep(0.02)
    return time.monotonic() - started


def test_the_codec_follows_the_bandwidth_and_nothing_is_lost(nodes: LocalCluster, bend: Bend, tmp_path: Path) -> None:
    served = serve(nodes, bend, tmp_path, (OPTIONS[0], OPTIONS[2]))
    with Load(served, tmp_path.name) as load:
        time.sleep(0.7)
        until(served, "raw", PATIENCE_S)
        assert load.exact > 0
        bend.set(SLOW)
        until(served, "bf16", PATIENCE_S)
        time.sleep(1.0)
        seen = link(served)
        assert 1e5 < seen.goodput_bytes_per_s < 2e6  # never faster; how much slower is the machine's affair
        bend.set(FAST)
        until(served, "raw", PATIENCE_S)
    assert load.answered > 20
    assert load.exact < load.answered
    assert 0 < load.worst < 0.05


def test_a_plan_that_permits_no_loss_stays_exact(nodes: LocalCluster, bend: Bend, tmp_path: Path) -> None:
    served = serve(nodes, bend, tmp_path, LOSSLESS)
    with Load(served, tmp_path.name) as load:
        time.sleep(0.3)
        bend.set(SLOW)
        until(served, "zstd", PATIENCE_S)
        time.sleep(0.3)
    assert load.exact == load.answered > 0


def test_a_plan_without_alternatives_keeps_its_codec(nodes: LocalCluster, bend: Bend, tmp_path: Path) -> None:
    bend.set(SLOW)
    served = serve(nodes, bend, tmp_path, ())
    with Load(served, tmp_path.name) as load:
        while load.answered < 8:
            time.sleep(0.05)
        seen = link(served)
    assert seen.codecs == ()
    assert 1e5 < seen.goodput_bytes_per_s < 2e6  # never faster; how much slower is the machine's affair
    assert load.exact == load.answered > 0


def test_status_shows_what_the_link_does(nodes: LocalCluster, bend: Bend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve(nodes, bend, tmp_path, OPTIONS)
    served.plan.save(tmp_path / "plan.json")
    with Load(served, tmp_path.name) as load:
        while load.answered < 8:
            time.sleep(0.05)
    assert run_command(cli, ["status", "--cluster", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "goodput" in shown
    assert re.search(r"[KM]iB/s", shown)
    assert run_command(cli, ["status", "--cluster", str(tmp_path / "plan.json"), "--json"]) == 0
    links = [found for node in json.loads(capsys.readouterr().out) for found in node["links"] if found["codecs"]]
    assert [found["target"] for found in links] == ["b"]
    assert links[0]["goodput_bytes_per_s"] > 0
    assert 0 < links[0]["round_trip_s"] < 10
    assert (links[0]["codecs"][0]["source"], links[0]["codecs"][0]["target"]) == ("stage0", "stage1")
    assert "(or zstd, bf16, as the link allows)" in served.plan.explain()
    assert all(not t.codecs for t in served.plan.with_fixed_codecs().transfers)
