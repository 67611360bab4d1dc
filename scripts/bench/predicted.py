"""Predicted latency and throughput beside measured ones: plans with random cuts on the testbed's presets, models of three kinds.

    python scripts/bench/predicted.py [--beds gigabit-lan,4g,...] [--models cnn,vit,bert] [--seed 0] [--json FILE]

Links are probed and operators timed by the nodes themselves, under their CPU shares; nothing is fitted to the outcome. Operators are timed
before, between and after the rounds in which plans are measured, because the speed of a shared box drifts. An error is
predicted / measured - 1; the means are of its absolute value. About half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from testbed.bed import Testbed
from testbed.cpu import hurried
from testbed.exactness import measure_exactness
from testbed.measuring import Outcome, Subject, probed
from testbed.models import KINDS
from testbed.spec import load

import partitioner
from partitioner.structure import Structure
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text, table
from splitnet.plan import Plan

# How many stages on which preset: one node, two and three.
BEDS = {"gigabit-lan": (3, 2), "home-wifi": (2,), "4g": (2,), "factory": (3,), "two-tier": (1, 2)}
_SPREAD = {1: [], 2: [(0.25, 0.75)], 3: [(0.2, 0.45), (0.55, 0.8)]}  # where in the model's time the cuts may fall


def random_plan(subject: Subject, cluster: Cluster, stages: int, generator: random.Random) -> Plan:
    """Any nodes in any order, cut anywhere in the middle."""
    nodes = generator.sample([node.name for node in cluster.nodes], stages)
    if stages == 1:
        return subject.alone(cluster, nodes[0])
    structure = subject.profile.structure
    cuts = [cut_at(structure, subject.profile.columns[""].seconds, generator.uniform(*span)) for span in _SPREAD[stages]]
    return subject.cut_at(cluster, cuts, nodes)


def cut_at(structure: Structure, seconds: tuple[float, ...], share: float) -> str:
    """The first costly operator after that share of the model's time."""
    elapsed = list(itertools.accumulate(seconds))
    behind = (i for i, vertex in enumerate(structure.vertices) if elapsed[i] >= share * elapsed[-1] and not vertex.cheap)
    return structure.vertices[next(behind)].name


def run_bed(preset: str, kinds: list[str], generator: random.Random) -> list[tuple[str, str, Outcome]]:
    spec = dataclasses.replace(load(preset), client_at="")  # the client stands at the ingress, as a plan assumes
    outcomes = []
    with Testbed(spec) as bed:
        for note in bed.notes:
            print(f"note: {note}")
        print(f"\n{preset}: {spec.description}")
        print(measure_exactness(bed.relay, [spec.shape(*pair) for pair in spec.pairs()]).text(), flush=True)
        cluster = probed(bed)
        for kind in kinds:
            model = partitioner.load_model(f"py:testbed.models:{kind}")
            subject = Subject.measure(bed, model, cluster)
            plans = [random_plan(subject, cluster, stages, generator) for stages in BEDS[preset]]
            for outcome in subject.outcomes(cluster, plans):
                outcomes.append((preset, kind, outcome))
                print("\n".join(outcome.lines(f"{kind} on {preset}")), flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beds", default=",".join(BEDS), help="presets, comma-separated")
    parser.add_argument("--models", default=",".join(KINDS), help="of cnn, vit, bert")
    parser.add_argument("--seed", type=int, default=0, help="of cuts and nodes")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    generator = random.Random(arguments.seed)
    with hurried() as ahead:
        if not ahead:
            print("note: this process cannot go before others; on a busy machine its latencies are longer")
        outcomes = [o for preset in arguments.beds.split(",") for o in run_bed(preset, arguments.models.split(","), generator)]
    rows = [("testbed", "model", "stages on", "latency predicted", "measured", "error", "per s predicted", "measured", "error")]
    for preset, kind, o in outcomes:
        nodes = ", ".join(stage.node for stage in o.plan.stages)
        latency = (seconds_text(o.predicted_latency_s), seconds_text(o.latency_s), f"{o.latency_error:+.1%}")
        rows.append((preset, kind, nodes, *latency, f"{o.predicted_per_s:.3g}", f"{o.per_s:.3g}", f"{o.throughput_error:+.1%}"))
    latency = statistics.mean(abs(o.latency_error) for *_, o in outcomes)
    throughput = statistics.mean(abs(o.throughput_error) for *_, o in outcomes)
    print("\n" + "\n".join(table(rows)))
    print(
        f"\n{len(outcomes)} combinations; mean error of latency {latency:.1%}, of throughput {throughput:.1%}, of both {(latency + throughput) / 2:.1%}"
    )
    if arguments.json:
        figures = [{"testbed": preset, "model": kind, **o.figures()} for preset, kind, o in outcomes]
        arguments.json.write_text(json.dumps({"latency_error": latency, "throughput_error": throughput, "outcomes": figures}, indent=1))


if __name__ == "__main__":
    main()
