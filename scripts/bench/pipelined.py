"""A full pipeline against what bounds it: the slowest stage alone, and the bytes of each link over its bandwidth.

    python scripts/bench/pipelined.py [--mbit 5 20 100 1000] [--models cnn vit wide] [--codecs raw zstd bf16-zstd adaptive] [--rounds 3]

Two nodes on the testbed, each with a share of a processor of its own, the client beside the first (its way is not shaped); the model is cut where
half of its time has passed. In each round, in the same minute: requests one by one, of which the nodes' own counters say what each stage takes alone (its
engine, decoding and encoding aside); then a full pipeline, whose answers are counted from when it is full until the last request has been sent. The bytes of a link
are its counters' (payloads after the codec; frames and HTTP/2 come on top and count against the pipeline); its rate is what the relay was seen to
let through before, when nothing but bytes was sent. The bound is the smaller of the two rates, the ratio is the median of the rounds' own.

"adaptive" is the plan as the planner makes it, where links choose among codecs that the plan permits; all others are one codec on every transfer. "wide" makes 4 MiB
out of little, and is bounded by the link at every bandwidth. Aim: at least 0.9.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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
from splitnet.explain import bytes_text, seconds_text, table
from splitnet.node_status import NodeStatus
from splitnet.plan import Plan

AIM = 0.9
ADAPTIVE = "adaptive"
NAME = "pipelined"
_ALONE = 8  # requests one by one, per round
_WARM_UP = 12  # requests before the first round: the nodes learn how many fill the pipeline
_SPAN_S, _FEWEST, _MOST = 4.0, 12, 300  # of a full pipeline, per round
_BYTES_PER_MBIT = 1e6 / 8


class Wide(torch.nn.Module):
    """4 MiB cross a cut in its middle; computing takes little beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.unsqueeze(-1) * self.weight).mean(-1)


@dataclasses.dataclass(frozen=True)
class Count:
    """What the nodes have counted so far."""

    stage_s: Mapping[str, float]
    runs: Mapping[str, int]
    link_bytes: Mapping[str, int]

    @classmethod
    def of(cls, nodes: Sequence[NodeStatus]) -> Count:
        stages = [stage for node in nodes for d in node.deployments if d.name == NAME for stage in d.stages]
        return cls(
            {stage.name: stage.compute_s for stage in stages},
            {stage.name: stage.requests for stage in stages},
            {f"{node.name}->{link.target}": link.sent_bytes for node in nodes for link in node.links},
        )


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


def cut_of(model: ModelGraph, subject: Subject) -> str:
    """Where half of the time has passed, at a place that few bytes cross; for `wide` where the most do."""
    vertices = subject.profile.structure.vertices
    if model.name == "wide":
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


def measured_round(plan: Plan, client: splitnet.Client, inputs: Mapping[str, np.ndarray], rates: Mapping[str, float]) -> Round:
    before = Count.of(splitnet.status(plan))
    started = time.perf_counter()
    for _ in range(_ALONE):
        client.infer(inputs)
    each_s = (time.perf_counter() - started) / _ALONE
    after = Count.of(splitnet.status(plan))
    slowest_s = max((after.stage_s[name] - before.stage_s[name]) / (after.runs[name] - before.runs[name]) for name in after.runs)
    count = min(max(int(2 * _SPAN_S / each_s), _FEWEST), _MOST)
    filled = client.max_in_flight
    arrivals = []
    for _ in client.stream(itertools.repeat(inputs, filled + count)):
        arrivals.append(time.perf_counter())
    full = Count.of(splitnet.status(plan))
    sent = {link: (size - after.link_bytes.get(link, 0)) / (filled + count) for link, size in full.link_bytes.items()}
    return Round(
        slowest_s,
        max(size / rates[link] for link, size in sent.items()),
        round(max(sent.values())),
        (count - 1) / (arrivals[count - 1 + filled // 2] - arrivals[filled // 2]),
    )


def run(subject: Subject, plan: Plan, rates: Mapping[str, float], rounds: int) -> list[Round]:
    assert plan.prediction is not None
    inputs = random_inputs(plan, {**plan.prediction.symbols, "batch": plan.prediction.batch})
    with subject.deployed(plan, NAME, fixed=False) as served, splitnet.Client(served.ingress.address, NAME, timeout_s=120) as client:
        for _ in client.stream(itertools.repeat(inputs, _WARM_UP)):
            pass
        return [measured_round(served, client, inputs, rates) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[5.0, 20.0, 100.0, 1000.0])
    parser.add_argument("--latency-ms", type=float, default=2.0, help="one way")
    parser.add_argument("--models", nargs="+", default=["cnn", "vit", "wide"], choices=("cnn", "vit", "bert", "wide"))
    parser.add_argument("--codecs", nargs="+", default=["raw", "bf16-zstd", ADAPTIVE])
    parser.add_argument("--rounds", type=int, default=3)
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
        for kind in arguments.models:
            model = loaded(kind)
            bed.reshape(shapes[arguments.mbit[-1]])
            subject = Subject.measure(bed, model, probed(bed, 0.3), 1.0)
            for mbit, spec in shapes.items():
                bed.reshape(spec)
                rates = dict.fromkeys(("a->b", "b->a"), rate_of[spec.default])
                planned = subject.cut_at(spec.cluster(bed.addresses), [cut_of(model, subject)], ["a", "b"])
                for codec in arguments.codecs:
                    found = run(subject, with_codec(planned, codec), rates, arguments.rounds)
                    ratio = statistics.median(r.ratio for r in found)
                    ratios.append(ratio)
                    middle = sorted(found, key=lambda r: r.ratio)[len(found) // 2]
                    bound = "stage" if middle.slowest_s > middle.link_s else "link"
                    rows.append(
                        (
                            kind, f"{mbit:g} Mbit/s", codec, bytes_text(middle.request_bytes), seconds_text(middle.slowest_s), seconds_text(middle.link_s), bound,
                            f"{middle.per_s:.2f}/s", f"{ratio:.3f}", " ".join(f"{r.ratio:.2f}" for r in found),
                        )
                    )  # fmt: skip
                    print("  ".join(rows[-1]), flush=True)
    print("\n" + "\n".join(table(rows)))
    print(
        f"\nleast {min(ratios):.3f}, median {statistics.median(ratios):.3f} (aim {AIM}); {sum(r < AIM for r in ratios)} of {len(ratios)} below it"
    )


if __name__ == "__main__":
    main()
