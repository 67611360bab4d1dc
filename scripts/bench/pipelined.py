"""A full pipeline against what bounds it: the slowest stage alone, and the bytes of each link over its bandwidth.

    python scripts/bench/pipelined.py [--mbit 5 20 100 1000] [--models cnn vit wide] [--codecs raw zstd bf16-zstd adaptive] [--rounds 1]

Two nodes on the testbed, each with a share of a processor of its own, the client beside the first (its way is not shaped); the model is cut where
half of its time has passed. In each round, in the same minute: each stage alone, deployed by itself on its node, with a client that keeps it busy (a stage that runs now
and then is quicker: its node has saved up time); then the full pipeline with each codec, whose answers are counted while it is full. The bytes of a link
are its counters' (payloads after the codec; frames and HTTP/2 come on top and count against the pipeline); its rate is what the relay was seen to
let through before, when nothing but bytes was sent. The bound is the smaller of the two rates, the ratio is the median of the rounds' own.

"adaptive" is the plan as the planner makes it, where links choose among codecs that the plan permits; all others are one codec on every transfer. "wide" makes 4 MiB
out of little, and is bounded by the link at every bandwidth. Aim: at least 0.9.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from testbed.bed import Testbed
from testbed.cpu import hurried
from testbed.exactness import measure_exactness
from testbed.measuring import Subject, probed
from testbed.spec import BedSpec, parse

import partitioner
import splitnet
from partitioner.benching import random_inputs
from partitioner.graph import ModelGraph
from splitnet.cluster import Cluster
from splitnet.explain import bytes_text, seconds_text, table
from splitnet.plan import CLIENT, OutputSpec, Plan, StageSpec, Transfer
from splitnet.shard import Shard

AIM = 0.9
ADAPTIVE = "adaptive"
NAME = "pipelined"
_WARM_UP, _ALONE = 12, 6  # requests before it counts, at once and one by one: the nodes learn how many fill the pipeline
_SPAN_S, _FEWEST = 3.0, 24  # of a full pipeline

Inputs = Mapping[str, np.ndarray]


class Wide(torch.nn.Module):
    """4 MiB cross a cut in its middle; computing takes little beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.unsqueeze(-1) * self.weight).mean(-1)


@dataclasses.dataclass(frozen=True)
class Round:
    slowest_s: float  # of the stages, alone
    link_s: float  # of the links: bytes per request over the rate
    request_bytes: int  # over the busiest link
    per_s: float

    @property
    def ratio(self) -> float:
        return self.per_s * max(self.slowest_s, self.link_s)


def bed_of(mbit: float, latency_ms: float, cpu: float) -> BedSpec:
    link = {"bandwidth_mbit_per_s": mbit, "latency_ms": latency_ms}
    return parse({"nodes": [{"name": name, "cpu": cpu} for name in ("a", "b")], "default_link": link})


def loaded(kind: str) -> ModelGraph:
    if kind != "wide":
        return partitioner.load_model(f"py:testbed.models:{kind}")
    torch.manual_seed(0)
    return partitioner.capture(Wide().eval(), (torch.randn(1, 1024),), name="wide")


def cut_of(subject: Subject) -> str:
    """Where half of the time has passed, at a place that few bytes cross; for `wide` where the most do."""
    vertices = subject.profile.structure.vertices
    if subject.model.name == "wide":
        return next(vertex.name for vertex in vertices if "mean" in vertex.op)
    elapsed = list(itertools.accumulate(subject.profile.columns[""].seconds))
    return next(v.name for i, v in enumerate(vertices) if elapsed[i] >= 0.5 * elapsed[-1] and not v.cheap)


def with_codec(plan: Plan, codec: str) -> Plan:
    """That codec for good on every transfer between the nodes; the client's own way and integers stay as they are."""
    if codec == ADAPTIVE:
        return plan
    between = {spec.name: spec.dtype for stage in plan.stages for spec in stage.outputs}

    def takes(tensors: Sequence[str]) -> bool:
        return all(between.get(name, "").startswith(("float", "bfloat")) for name in tensors)

    return dataclasses.replace(
        plan, transfers=tuple(dataclasses.replace(t, codec=codec if takes(t.tensors) else "raw", codecs=()) for t in plan.transfers)
    )


def alone(plan: Plan, stage: StageSpec) -> Plan:
    """That stage and no other, on its node, between the client and the client."""
    outputs = tuple(OutputSpec(spec.name, spec) for spec in stage.outputs)
    there = Transfer(CLIENT, stage.name, tuple(spec.name for spec in stage.inputs))
    back = Transfer(stage.name, CLIENT, tuple(spec.name for spec in stage.outputs))
    node = plan.node(stage.node)
    return dataclasses.replace(plan, nodes=(node,), stages=(stage,), transfers=(there, back), inputs=stage.inputs, outputs=outputs)


@contextlib.contextmanager
def served(bed: Testbed, plan: Plan, shards: Mapping[str, Shard], name: str) -> Iterator[tuple[splitnet.Client, Inputs]]:
    """Deployed and warm, with inputs for it."""
    assert plan.prediction is not None
    inputs = random_inputs(plan, {**plan.prediction.symbols, "batch": plan.prediction.batch})
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    with bed.free_for_clients():
        splitnet.deploy(plan, shards, name=name)
    try:
        with splitnet.Client(plan.ingress.address, name, timeout_s=120) as client:
            for _ in client.stream(itertools.repeat(inputs, _WARM_UP)):
                pass
            for _ in range(_ALONE):
                client.infer(inputs)  # the nodes see how long one takes with nobody else there
            yield client, inputs
    finally:
        splitnet.undeploy(plan, name)


def full(client: splitnet.Client, inputs: Inputs, span_s: float) -> tuple[float, int]:
    """Answers per second while the pipeline is full, and how many requests were sent in all."""
    filled, arrivals, first_s = client.max_in_flight, list[float](), time.perf_counter()

    def given() -> Iterator[Inputs]:
        while len(arrivals) < _FEWEST or time.perf_counter() - first_s < span_s:
            yield inputs

    for _ in client.stream(given()):
        arrivals.append(time.perf_counter())
    steady = arrivals[min(filled, len(arrivals) // 4) : len(arrivals) - min(filled, len(arrivals) // 4)]
    return (len(steady) - 1) / (steady[-1] - steady[0]), len(arrivals)


def stages_alone(bed: Testbed, plan: Plan, shards: Mapping[str, Shard]) -> float:
    """Seconds per request of the slowest stage, when it has its node's whole share for as long as it wants."""
    slowest_s = 0.0
    for stage in plan.stages:
        with served(bed, alone(plan, stage), {stage.name: shards[stage.name]}, f"{NAME}-{stage.name}") as (client, inputs):
            slowest_s = max(slowest_s, 1 / full(client, inputs, _SPAN_S / 2)[0])
    return slowest_s


def measured(plan: Plan, slowest_s: float, client: splitnet.Client, inputs: Inputs, bytes_per_s: float) -> Round:
    def sent() -> dict[str, int]:
        return {f"{node.name}->{link.target}": link.sent_bytes for node in splitnet.status(plan) for link in node.links}

    before = sent()
    per_s, count = full(client, inputs, _SPAN_S)
    most = max(size - before.get(link, 0) for link, size in sent().items()) / count
    return Round(slowest_s, most / bytes_per_s, round(most), per_s)


def rounds_of(
    subject: Subject, cluster: Cluster, shapes: Mapping[float, BedSpec], rates: Mapping[float, float], codecs: Sequence[str], rounds: int
) -> dict[tuple[float, str], list[Round]]:
    """By Mbit/s and codec. The stages alone before and after each round: of two figures the quicker, which is what the machine could do."""
    bed, found = subject.bed, dict[tuple[float, str], list[Round]]()
    plans = {}
    for mbit, spec in shapes.items():
        known = dataclasses.replace(cluster, links=spec.cluster(bed.addresses).links)  # the links as configured, the nodes as measured
        plans[mbit] = subject.cut_at(known, [cut_of(subject)], ["a", "b"])
    some = next(iter(plans.values()))
    with tempfile.TemporaryDirectory(prefix="splitnet-pipelined-") as folder:
        shards = partitioner.cut(subject.model, some, folder)
        for _ in range(rounds):
            before_s, seen = stages_alone(bed, some, shards), dict[tuple[float, str], Round]()
            for (mbit, plan), codec in itertools.product(plans.items(), codecs):
                bed.reshape(shapes[mbit])
                with served(bed, with_codec(plan, codec), shards, NAME) as (client, inputs):
                    seen[mbit, codec] = measured(plan, before_s, client, inputs, rates[mbit])
            slowest_s = min(before_s, stages_alone(bed, some, shards))
            for case, one in seen.items():
                found.setdefault(case, []).append(dataclasses.replace(one, slowest_s=slowest_s))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[5.0, 20.0, 100.0, 1000.0])
    parser.add_argument("--latency-ms", type=float, default=2.0, help="one way")
    parser.add_argument("--models", nargs="+", default=["cnn", "vit", "wide"], choices=("cnn", "vit", "bert", "wide"))
    parser.add_argument("--codecs", nargs="+", default=["raw", "bf16-zstd", ADAPTIVE])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu", type=float, default=0.75, help="each node's share of a processor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("model", "link", "codec", "bytes", "stage alone", "link", "bound", "seen", "ratio", "rounds")]
    ratios = []
    with hurried(), Testbed(bed_of(arguments.mbit[0], arguments.latency_ms, arguments.cpu)) as bed:
        for note in bed.notes:
            print(f"note: {note}")
        assert bed.relay is not None
        shapes = {mbit: bed_of(mbit, arguments.latency_ms, arguments.cpu) for mbit in arguments.mbit}
        exact = measure_exactness(bed.relay, [spec.default for spec in shapes.values()])
        print(exact.text(), flush=True)
        rate_of = {check.shape: min(check.bandwidth_bytes_per_s, check.shape.bandwidth_bytes_per_s) for check in exact.checks}
        rates = {mbit: rate_of[spec.default] for mbit, spec in shapes.items()}
        for kind in arguments.models:
            bed.reshape(shapes[arguments.mbit[-1]])
            cluster = probed(bed, 0.5)
            subject = Subject.measure(bed, loaded(kind), cluster, 1.0)
            for (mbit, codec), found in rounds_of(subject, cluster, shapes, rates, arguments.codecs, arguments.rounds).items():
                ratios.append(statistics.median(r.ratio for r in found))
                middle = sorted(found, key=lambda r: r.ratio)[len(found) // 2]
                bound = "stage" if middle.slowest_s > middle.link_s else "link"
                rows.append(
                    (
                        kind, f"{mbit:g} Mbit/s", codec, bytes_text(middle.request_bytes), seconds_text(middle.slowest_s), seconds_text(middle.link_s), bound,
                        f"{middle.per_s:.2f}/s", f"{ratios[-1]:.3f}", " ".join(f"{r.ratio:.2f}" for r in found),
                    )
                )  # fmt: skip
                print("  ".join(rows[-1]), flush=True)
    print("\n" + "\n".join(table(rows)))
    print(
        f"\nleast {min(ratios):.3f}, median {statistics.median(ratios):.3f} (aim {AIM}); {sum(r < AIM for r in ratios)} of {len(ratios)} below it"
    )


if __name__ == "__main__":
    main()
