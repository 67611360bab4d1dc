"""The simulator beside real nodes: latency and throughput of random plans on the testbed, with more and more requests in flight.

    python scripts/bench/simulated.py [--beds home-wifi,gigabit-lan] [--models cnn,bert] [--windows 1,2,4,16] [--seed 0] [--json FILE]

Three figures for each: the closed form of partitioner.cost (max of bottleneck and latency / window), the simulator, and what the nodes
did. The simulator is played with the stage times of the profile, as a plan's timeline is; and again with those that the nodes
counted while they were measured, which leaves its own errors. An error is simulated / measured - 1. About four minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from testbed.bed import Testbed
from testbed.measuring import Subject, probed
from testbed.spec import load

import partitioner
import splitnet
from partitioner.benching import random_inputs
from partitioner.constants import Goal, codec_figures, machines, outside_bytes, overheads
from partitioner.simulation import simulate
from splitnet.cluster import Cluster
from splitnet.explain import table
from splitnet.install import status
from splitnet.plan import Plan

NAME = "simulated"
_SECONDS = 3.0  # for each window
_FEWEST, _MOST = 8, 80
_CUTS = (0.3, 0.7)  # where in the model's time they may fall


@dataclass(frozen=True)
class Row:
    """Batches per second of one plan with so many in flight."""

    bed: str
    model: str
    nodes: str
    window: int
    closed_per_s: float
    simulated_per_s: float
    corrected_per_s: float  # simulated with the stage times that were counted
    measured_per_s: float

    @property
    def error(self) -> float:
        return self.simulated_per_s / self.measured_per_s - 1

    @property
    def own_error(self) -> float:
        return self.corrected_per_s / self.measured_per_s - 1


def two_stages(subject: Subject, cluster: Cluster, generator: random.Random) -> Plan:
    """On any two nodes, cut anywhere in the middle."""
    structure = subject.profile.structure
    seconds = subject.profile.columns[""].seconds
    share = generator.uniform(*_CUTS) * math.fsum(seconds)
    elapsed = np.cumsum(seconds)
    cut = next(v.name for v, t in zip(structure.vertices, elapsed, strict=True) if t >= share and not v.cheap)
    return subject.cut_at(cluster, [cut], generator.sample([node.name for node in cluster.nodes], 2))


def predicted_s(subject: Subject, plan: Plan, cluster: Cluster, window: int) -> dict[str, float]:
    """Each stage's seconds by the profile. A plan has those of a node with pauses; one that is kept busy takes `Column.sustained` times as long."""
    sustained = {name: subject.profile.on(cluster.node(name)).sustained if window > 1 else 1.0 for name in (s.node for s in plan.stages)}
    return {stage.name: stage.seconds * sustained[stage.node] for stage in plan.stages}


def played(plan: Plan, cluster: Cluster, window: int, requests: int, seconds: dict[str, float]) -> float:
    """Batches per second in the simulator: with the constants for latency where there is one request at a time, else with those for throughput."""
    used = [cluster.node(node.name) for node in plan.nodes]
    links = {(link.source, link.target): link for link in cluster.links}
    shared = machines(cluster)
    goal: Goal = "throughput" if window > 1 else "latency"
    figures = {
        "codecs": codec_figures(used, goal, shared),
        "overheads": overheads(used, goal, shared, outside_bytes(plan.transfers)),
        "machines": shared,
    }
    return simulate(plan, links, requests=requests, max_in_flight=window, seconds=seconds, **figures).throughput_per_s


def counted(plan: Plan) -> dict[str, tuple[int, float]]:
    """Of each stage: requests and seconds of computing, so far."""
    found = {}
    for node in status(plan):
        for deployment in node.deployments:
            if deployment.name == NAME:
                found |= {stage.name: (stage.requests, stage.compute_s) for stage in deployment.stages}
    return found


def measured(client: splitnet.Client, inputs: dict[str, np.ndarray], window: int, requests: int) -> float:
    """Batches per second of the nodes, counted as the simulator counts them."""

    def feed() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(requests):
            yield inputs

    done = []
    for _ in client.stream(feed(), window=window):
        done.append(time.perf_counter())
    first = min(window, len(done) // 4)
    return (len(done) - 1 - first) / (done[-1] - done[first])


def rows_of(subject: Subject, plan: Plan, cluster: Cluster, bed: str, model: str, windows: list[int]) -> Iterator[Row]:
    assert plan.prediction is not None
    prediction = plan.prediction
    nodes = " ".join(stage.node for stage in plan.stages)
    with subject.deployed(plan, NAME) as served, splitnet.Client(served.ingress.address, deployment=NAME) as client:
        inputs = random_inputs(served, prediction.symbols)
        for _ in range(3):
            client.infer(inputs)
        for window in windows:
            pace_s = max(1 / prediction.throughput_per_s, prediction.latency_s / window)
            requests = min(max(math.ceil(_SECONDS / pace_s), _FEWEST), _MOST)
            before = counted(served)
            per_s = measured(client, inputs, window, requests)
            after = counted(served)
            took = {name: (s - before[name][1]) / (n - before[name][0]) for name, (n, s) in after.items()}
            simulated = [
                played(served, cluster, window, max(requests, 4 * window), seconds)
                for seconds in (predicted_s(subject, served, cluster, window), took)
            ]
            yield Row(bed, model, nodes, window, 1 / pace_s, *simulated, per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beds", default="home-wifi,gigabit-lan", help="presets, comma-separated")
    parser.add_argument("--models", default="cnn,bert", help="of cnn, vit, bert")
    parser.add_argument("--windows", default="1,2,4,16", help="requests in flight, comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of cuts and nodes")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    generator = random.Random(arguments.seed)
    windows = [int(window) for window in arguments.windows.split(",")]
    rows: list[Row] = []
    for preset in arguments.beds.split(","):
        with Testbed(dataclasses.replace(load(preset), client_at="")) as bed:  # the client stands at the ingress, as a plan assumes
            for note in bed.notes:
                print(f"note: {note}")
            cluster = probed(bed)
            for kind in arguments.models.split(","):
                subject = Subject.measure(bed, partitioner.load_model(f"py:testbed.models:{kind}"), cluster)
                for row in rows_of(subject, two_stages(subject, cluster, generator), cluster, preset, kind, windows):
                    rows.append(row)
                    print(f"  {preset} {kind} window {row.window}: {row.simulated_per_s:.3g} -> {row.measured_per_s:.3g}/s", flush=True)
    lines = [("testbed", "model", "nodes", "in flight", "closed form", "simulated", "measured", "error", "with counted stage times")]
    for row in rows:
        figures = (f"{row.closed_per_s:.3g}/s", f"{row.simulated_per_s:.3g}/s", f"{row.measured_per_s:.3g}/s")
        lines.append((row.bed, row.model, row.nodes, str(row.window), *figures, f"{row.error:+.1%}", f"{row.own_error:+.1%}"))
    mean = statistics.mean(abs(row.error) for row in rows)
    own = statistics.mean(abs(row.own_error) for row in rows)
    print("\n" + "\n".join(table(lines)))
    print(f"\n{len(rows)} measurements; mean error {mean:.1%}, with the stage times that were counted {own:.1%}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"error": mean, "own_error": own, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
