"""A full pipeline against what bounds it: the slowest stage alone, and the bytes of each link over its bandwidth.

    python scripts/bench/pipelined.py [--mbit 5 20 100 1000] [--models cnn vit wide] [--codecs raw zstd bf16-zstd adaptive] [--rounds 1]

Two nodes on the testbed, each with a share of a processor of its own, the client beside the first (its way is not shaped); the model is cut where
half of its time has passed. The stages alone, each deployed by itself on its node with a client that keeps it busy (a stage that runs now and then is quicker: its node has saved
up time), and the full pipeline with each codec are deployed at once and take turns: a machine that others use is not the same one a minute later. The bytes of a link
are its counters' (payloads after the codec; frames and HTTP/2 come on top and count against the pipeline); its rate is what the relay was seen to
let through before, when nothing but bytes was sent. The bound is the smaller of the two rates, with the stages alone before and after the pipeline's turn; the ratio is the median of the rounds' own.
Beside it stand the slowest stage while the other one works, too, but for itself ("together": what the two take from each other without any pipeline), and which part of its processor share the
busiest node used while the pipeline was full: at 100% no scheduling of ours could do more.

"adaptive" is the plan as the planner makes it, where links choose among codecs that the plan permits; all others are one codec on every transfer. "wide" makes 4 MiB
out of little, and is bounded by the link at every bandwidth. Aim: at least 0.9.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
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
_WARM_UP, _ALONE = 10, 5  # requests before it counts, at once and one by one: the nodes learn how many fill the pipeline
_SPAN_S, _FEWEST = 3.0, 20  # of a full pipeline

Inputs = Mapping[str, np.ndarray]


class Wide(torch.nn.Module):
    """4 MiB cross a cut in its middle; computing takes little beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.unsqueeze(-1) * self.weight).mean(-1)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One turn of a full pipeline."""

    link_s: float  # of the busiest link: bytes per request over the rate
    request_bytes: int  # over that link
    per_s: float
    used: float  # the part of its share that the busiest node used


@dataclasses.dataclass(frozen=True)
class Round:
    seen: Seen
    slowest_s: float  # of the stages, alone
    together_s: float  # of the stages, each by itself, at the same time

    @property
    def bound_s(self) -> float:
        return max(self.slowest_s, self.seen.link_s)

    @property
    def ratio(self) -> float:
        return self.seen.per_s * self.bound_s


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


def alone_plan(plan: Plan, stage: StageSpec) -> Plan:
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


def measured(bed: Testbed, plan: Plan, client: splitnet.Client, inputs: Inputs, bytes_per_s: float) -> Seen:
    def sent() -> dict[str, int]:
        return {f"{node.name}->{link.target}": link.sent_bytes for node in splitnet.status(plan) for link in node.links}

    before, used = sent(), Used(bed)
    per_s, count = full(client, inputs, _SPAN_S)
    share = used.shares()
    most = max(size - before.get(link, 0) for link, size in sent().items()) / count
    return Seen(most / bytes_per_s, round(most), per_s, max(share.values()))


class Used:
    """Which part of its share each node has used since this was made."""

    def __init__(self, bed: Testbed) -> None:
        self._bed = bed
        self._at_s, self._before = time.perf_counter(), self._read()

    def _read(self) -> dict[str, float]:
        return {node.name: processor_s(self._bed.pid(node.name)) for node in self._bed.spec.nodes}

    def shares(self) -> dict[str, float]:
        past_s, now = time.perf_counter() - self._at_s, self._read()
        return {node.name: (now[node.name] - self._before[node.name]) / past_s / (node.cpu or 1.0) for node in self._bed.spec.nodes}


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def together(alone: Sequence[tuple[splitnet.Client, Inputs]]) -> float:
    """Seconds per request of the slowest stage, when each has its node's share and no stage waits for another."""
    with concurrent.futures.ThreadPoolExecutor(len(alone)) as pool:
        return max(1 / per_s for per_s, _ in pool.map(lambda one: full(*one, _SPAN_S / 2), alone))


def slowest(alone: Sequence[tuple[splitnet.Client, Inputs]]) -> float:
    return max(1 / full(client, inputs, _SPAN_S / 2)[0] for client, inputs in alone)


def rounds_of(
    subject: Subject, cluster: Cluster, shapes: Mapping[float, BedSpec], rates: Mapping[float, float], codecs: Sequence[str], rounds: int
) -> dict[tuple[float, str], list[Round]]:
    """By Mbit/s and codec. All are deployed at once and take turns: before and after each turn of a pipeline the stages alone, whose mean is what the
    machine could do meanwhile."""
    bed, found = subject.bed, dict[tuple[float, str], list[Round]]()
    plans = {}
    for mbit, spec in shapes.items():
        known = dataclasses.replace(cluster, links=spec.cluster(bed.addresses).links)  # the links as configured, the nodes as measured
        plans[mbit] = subject.cut_at(known, [cut_of(subject)], ["a", "b"])
    some, widest = next(iter(plans.values())), shapes[max(shapes)]
    with tempfile.TemporaryDirectory(prefix="splitnet-pipelined-") as folder, contextlib.ExitStack() as stack:
        shards = partitioner.cut(subject.model, some, folder)
        bed.reshape(widest)
        alone = [
            stack.enter_context(served(bed, alone_plan(some, stage), {stage.name: shards[stage.name]}, f"{NAME}-{stage.name}"))
            for stage in some.stages
        ]
        for mbit, plan in plans.items():
            bed.reshape(shapes[mbit])
            with contextlib.ExitStack() as served_here:
                serving = {codec: served_here.enter_context(served(bed, with_codec(plan, codec), shards, NAME + codec)) for codec in codecs}
                for _ in range(rounds):
                    bed.reshape(widest)
                    before_s, both_s = slowest(alone), together(alone)
                    for codec, (client, inputs) in serving.items():
                        bed.reshape(shapes[mbit])
                        seen = measured(bed, plan, client, inputs, rates[mbit])
                        bed.reshape(widest)
                        after_s = slowest(alone)
                        one = Round(seen, (before_s + after_s) / 2, both_s)
                        found.setdefault((mbit, codec), []).append(one)
                        print(
                            f"  {mbit:g} Mbit/s, {codec}: {seen.per_s * one.bound_s:.3f} of {seconds_text(one.bound_s)}; together "
                            f"{seconds_text(both_s)}, link {seconds_text(seen.link_s)}, busiest node at {seen.used:.0%} of its share",
                            flush=True,
                        )
                        before_s = after_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[5.0, 20.0, 100.0, 1000.0])
    parser.add_argument("--latency-ms", type=float, default=2.0, help="one way")
    parser.add_argument("--models", nargs="+", default=["cnn", "vit", "wide"], choices=("cnn", "vit", "bert", "wide"))
    parser.add_argument("--codecs", nargs="+", default=["raw", "bf16-zstd", ADAPTIVE])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu", type=float, default=0.5, help="each node's share of a processor: relay and client need the rest of two")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("model", "link", "codec", "bytes", "stage alone", "together", "link", "bound", "seen", "share used", "ratio", "rounds")]
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
                seen, bound = middle.seen, "stage" if middle.slowest_s > middle.seen.link_s else "link"
                rows.append(
                    (
                        kind, f"{mbit:g} Mbit/s", codec, bytes_text(seen.request_bytes), seconds_text(middle.slowest_s), seconds_text(middle.together_s),
                        seconds_text(seen.link_s), bound, f"{seen.per_s:.2f}/s", f"{seen.used:.0%}", f"{ratios[-1]:.3f}", " ".join(f"{r.ratio:.2f}" for r in found),
                    )
                )  # fmt: skip
                print("  ".join(rows[-1]), flush=True)
    print("\n" + "\n".join(table(rows)))
    print(
        f"\nleast {min(ratios):.3f}, median {statistics.median(ratios):.3f} (aim {AIM}); {sum(r < AIM for r in ratios)} of {len(ratios)} below it"
    )


if __name__ == "__main__":
    main()
