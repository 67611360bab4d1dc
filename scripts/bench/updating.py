"""Rolling updates under load: how many requests failed, how many saw two versions, and what the others noticed.

    python scripts/bench/updating.py [--updates 20] [--clients 4]

Three nodes, each a process of its own, and clients that ask without a pause, one request after another each. Versions of one model (other weights) and other cuts
take each other's place; every answer is held against the bits of each version: one that is none of them is mixed. Then a way back, and a canary with a
tenth of the requests. Aim: 0 failed, 0 mixed. About a minute.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text
from splitnet.plan import Plan
from splitnet.rollout import go_back, update
from splitnet.shard import Shard

NAME = "updating"
_WIDTH, _LAYERS = 512, 6
_CANARY = 0.1


@dataclass(frozen=True)
class Version:
    """One model (`weights`), cut one way."""

    weights: str
    plan: Plan
    shards: dict[str, Shard]
    expected: np.ndarray = field(repr=False)


@dataclass
class Load:
    """Clients that ask until they are told to end."""

    address: str
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    answers: Counter[str] = field(default_factory=Counter)
    times: list[tuple[float, float]] = field(default_factory=list)  # when it was asked, and how long it took
    mixed: int = 0
    failed: list[str] = field(default_factory=list)
    ended: bool = False

    def run(self) -> None:
        with splitnet.Client(self.address, NAME) as client:
            while not self.ended:
                asked_s = time.monotonic()
                try:
                    (output,) = client.infer(self.inputs, retry=True).values()
                except splitnet.SplitnetError as error:
                    self.failed.append(str(error))
                    continue
                self.times.append((asked_s, time.monotonic() - asked_s))
                which = next((name for name, bits in self.expected.items() if np.array_equal(output, bits)), None)
                self.mixed += which is None
                self.answers[which or "mixed"] += 1

    def quantiles(self, spans: list[tuple[float, float]]) -> str:
        """Of the requests that were asked within these spans of the clock."""
        took = [took_s for asked_s, took_s in self.times if any(a <= asked_s < b for a, b in spans)]
        if not took:
            return "none"
        return ", ".join(f"p{q} {seconds_text(float(np.percentile(took, q)))}" for q in (50, 99, 100)) + f" of {len(took)}"


def model(seed: int) -> partitioner.ModelGraph:
    torch.manual_seed(seed)
    layers = [layer for _ in range(_LAYERS) for layer in (torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.ReLU())]
    return partitioner.capture(torch.nn.Sequential(*layers).eval(), (torch.randn(4, _WIDTH),), name="layers")


def version(
    weights: str, graph: partitioner.ModelGraph, inputs: dict[str, torch.Tensor], cluster: Cluster, at: int, nodes: list[str], folder: Path
) -> Version:
    profile = partitioner.profile(graph, repeats=2, cluster=cluster, scale=True)
    linear = [vertex.name for vertex in graph.structure.vertices if vertex.param_bytes]
    plan = partitioner.plan(profile, cluster, at=[linear[at]], nodes=nodes, lossless=True)
    shards = partitioner.cut(graph, plan, folder)
    (expected,) = graph.run(inputs).values()
    return Version(weights, plan.with_shards({s: shard.sha256 for s, shard in shards.items()}), dict(shards), expected.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--between", type=float, default=0.6, help="seconds between two updates")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (
        LocalCluster(3, processes=True) as cluster,
        tempfile.TemporaryDirectory(prefix="splitnet-bench-") as scratch,
        torch.inference_mode(),
    ):
        where = cluster.cluster()
        graphs = {"old": model(1), "new": model(2)}
        ways = [(2, ["a", "b"]), (4, ["a", "c"]), (3, ["b", "c"])]  # the last: another node takes the requests
        versions = [
            version(weights, graph, dict(graphs["old"].example_inputs), where, at, on, Path(scratch) / f"{weights}{i}")
            for i, (at, on) in enumerate(ways)
            for weights, graph in graphs.items()
        ]
        inputs = {name: value.numpy() for name, value in graphs["old"].example_inputs.items()}
        splitnet.deploy(versions[0].plan, versions[0].shards, name=NAME)
        load = Load(versions[0].plan.ingress.address, inputs, {v.weights: v.expected for v in versions})
        threads = [threading.Thread(target=load.run) for _ in range(arguments.clients)]
        for thread in threads:
            thread.start()
        try:
            _measure(load, versions, arguments.updates, arguments.between, where)
        finally:
            load.ended = True
            for thread in threads:
                thread.join()
        print(f"requests: {sum(load.answers.values())} answered, {len(load.failed)} failed, {load.mixed} mixed (aim: 0 and 0)")
        for error in load.failed[:5]:
            print(f"  {error}")


def _measure(load: Load, versions: list[Version], updates: int, between_s: float, where: Cluster) -> None:
    time.sleep(1.0)
    start_s = time.monotonic()
    time.sleep(2.0)
    quiet = [(start_s, time.monotonic())]
    spans, took = [], []
    for _, chosen in zip(range(updates), itertools.cycle(versions[1:] + versions[:1]), strict=False):
        start_s = time.monotonic()
        update(chosen.plan, chosen.shards, name=NAME)
        took.append(time.monotonic() - start_s)
        spans.append((start_s, time.monotonic()))
        time.sleep(between_s)
    print(
        f"{updates} updates: {len(load.failed)} failed, {load.mixed} mixed of {sum(load.answers.values())}; one took {seconds_text(float(np.median(took)))} (median)"
    )
    print(f"latency before: {load.quantiles(quiet)}")
    print(f"latency of what was asked during an update: {load.quantiles(spans)}")
    start_s = time.monotonic()
    back = go_back(where, NAME)
    print(
        f"back to generation {back.generation} from {back.before} in {seconds_text(time.monotonic() - start_s)}: {len(load.failed)} failed, {load.mixed} mixed"
    )
    present = versions[(updates - 1) % len(versions)]  # what the last update took the place of
    other = next(v for v in versions if v.weights != present.weights and v.plan.ingress == present.plan.ingress)
    update(other.plan, other.shards, name=NAME, canary=_CANARY)
    before = Counter(load.answers)
    time.sleep(3.0)
    seen = load.answers - before
    share = seen[other.weights] / max(sum(seen.values()), 1)
    print(f"canary of {_CANARY:.0%}: {share:.2%} of {sum(seen.values())} requests ({len(load.failed)} failed, {load.mixed} mixed)")
    go_back(where, NAME)


if __name__ == "__main__":
    main()
