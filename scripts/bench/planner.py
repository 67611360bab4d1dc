"""The planner's figures: gap to brute force, time, gain over heuristics, scale. `python scripts/bench/planner.py [--quick]`.

Everything is computed on random instances with fixed seeds; only the exported BERT needs torch and transformers. Times are processor seconds of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import numpy as np

from partitioner.cost import CodecFigures
from partitioner.solvers import solve
from partitioner.solvers.problem import Overheads
from partitioner.solvers.reading import codec_arrays, link_arrays, read_graph, read_links
from partitioner.solvers.tiers import cut_in_two
from splitnet.errors import NoPlan
from splitnet.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "planner"))
sys.path.insert(0, str(Path(__file__).parent))

from homes import balanced, home, proportional

CODECS = {
    "raw": CodecFigures(1.0, 2e9, 4e9),
    "zstd": CodecFigures(1.5, 4e8, 1e9),
    "int8": CodecFigures(4.0, 3e9, 6e9),
    "int8+zstd": CodecFigures(6.0, 1e9, 2e9),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def reached(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.latency_s if plan.objective == "latency" else 1 / plan.prediction.throughput_per_s


def gap_text(plan: Plan) -> str:
    assert plan.prediction is not None
    gap = reached(plan) / plan.prediction.bound - 1
    return "optimal" if gap < 1e-6 else f"within {gap:.2%}"


def brute_force(instances: int) -> None:
    from test_solve_chain import arrangements, instance, price
    from test_solve_graphs import convex_plans, random_dag
    from test_wishes import coded, every_plan

    def compare(name: str, best: Callable[[int, str], float | None], plan: Callable[[int, str], Plan]) -> None:
        for objective in ("latency", "throughput"):
            worst, count, proven, seed = 0.0, 0, 0, 0
            while count < instances:
                figure, seed = best(seed, objective), seed + 1
                if figure is None:
                    continue
                found = plan(seed - 1, objective)
                assert found.prediction is not None
                worst, count = max(worst, abs(max(reached(found), 1e-9) / max(figure, 1e-9) - 1)), count + 1
                proven += found.prediction.bound >= reached(found) * (1 - 1e-9)
            print(f"  {name}, {objective}: {count} instances, largest gap {worst:.1e}, proven optimal {proven}")

    def chain_best(seed: int, objective: str) -> float | None:
        graph, devices, links = instance(seed)
        prices = (price(graph, devices, links, stages) for stages in arrangements(len(graph), list(devices)))
        return min((p[objective == "throughput"] for p in prices if p), default=None)

    def dag_best(seed: int, objective: str) -> float | None:
        return min((p[objective == "throughput"] for p in convex_plans(*random_dag(seed))), default=None)

    def coded_best(seed: int, objective: str) -> float | None:
        return min((p[objective == "throughput"] for p in every_plan(*coded(seed)) if p[2] <= 0.5), default=None)

    def coded_plan(seed: int, objective: str) -> Plan:
        graph, devices, links, codecs, usable = coded(seed)
        return solve(graph, devices, links, objective, codecs, link_codecs=usable, max_accuracy_loss=0.5)

    compare("chains, memory limits", chain_best, lambda seed, objective: solve(*instance(seed), objective))
    compare("chains, three codecs, loss budget", coded_best, coded_plan)
    compare("graphs, convex divisions", dag_best, lambda seed, objective: solve(*random_dag(seed), objective))


def layers(
    length: int, devices: int, seed: int, *, kinds: int | None = None
) -> tuple[networkx.DiGraph, dict[str, float], dict[tuple[str, str], tuple[float, float]]]:
    rng = random.Random(seed)
    names = [f"n{k}" for k in range(devices)]
    kinds = kinds or devices
    speeds = [rng.uniform(1, 5) for _ in range(kinds)]
    rates = [[(rng.uniform(1e6, 1e8), rng.uniform(0, 0.01)) for _ in range(kinds)] for _ in range(kinds)]
    graph = networkx.DiGraph(name=f"{length} layers")
    for k in range(length):
        whole = rng.uniform(0.5, 1.5) * 0.01
        work = [whole * speed * rng.uniform(0.9, 1.1) for speed in speeds]
        graph.add_node(k, seconds={n: work[i % kinds] for i, n in enumerate(names)}, param_bytes=10**6, activation_bytes=10**5)
        if k:
            graph.add_edge(k - 1, k, bytes=rng.randint(10**4, 10**6))
    room = max(6, 1.5 * length / devices) * 10**6
    links = {(a, b): rates[i % kinds][j % kinds] for (i, a), (j, b) in itertools.permutations(enumerate(names), 2)}
    return graph, dict.fromkeys(names, room), links


def times() -> None:
    graph, devices, links = layers(100, 8, 0)
    devices = dict.fromkeys(devices, 30e6)
    for objective in ("latency", "throughput"):
        took, plan = timed(lambda objective=objective: solve(graph, devices, links, objective, CODECS))
        print(f"  100 layers x 8 devices x 4 codecs, {objective}: {took:.2f} s, {len(plan.stages)} stages, {gap_text(plan)}")
    graph, devices, links = layers(48, 4, 1)
    for objective in ("latency", "throughput"):
        solve(graph, devices, links, objective)
        pair = next(iter(links))
        changed = {**links, pair: (links[pair][0] / 3, links[pair][1] * 2)}
        took, plan = timed(lambda objective=objective, changed=changed: solve(graph, devices, changed, objective))
        print(f"  replan after one link changed, 48 layers x 4 devices, {objective}: {took * 1e3:.0f} ms, {gap_text(plan)}")


def transformer(blocks: int) -> networkx.DiGraph:
    """An operator graph of the shape that torch.export gives a BERT: 65 operators per block, residuals, three projections each."""
    graph = networkx.DiGraph(name=f"bert-{blocks}")
    rng = random.Random(0)

    def add(name: str, seconds: float, *inputs: str, size: int = 4 * 128 * 768) -> str:
        graph.add_node(name, seconds={"device": seconds * 6, "server": seconds}, param_bytes=int(seconds * 1e9), out=size)
        for used in inputs:
            graph.add_edge(used, name, bytes=graph.nodes[used]["out"])
        return name

    def line(start: str, name: str, count: int, seconds: float = 2e-5, size: int = 4 * 128 * 768) -> str:
        for k in range(count):
            start = add(f"{name}.{k}", seconds * rng.uniform(0.5, 1.5), start, size=size)
        return start

    here = line(add("ids", 1e-6, size=1024), "embed", 4)
    for b in range(blocks):
        heads = []
        for head in ("q", "k", "v"):
            heads.append(line(add(f"{b}.{head}", 6e-4, here), f"{b}.{head}.view", 6))
        scores = add(f"{b}.scores", 3e-4, heads[0], heads[1], size=4 * 12 * 128 * 128)
        scores = line(scores, f"{b}.softmax", 6, size=4 * 12 * 128 * 128)
        mixed = line(add(f"{b}.mix", 3e-4, scores, heads[2]), f"{b}.merge", 6)
        summed = add(f"{b}.add", 2e-5, add(f"{b}.out", 6e-4, mixed), here)
        normed = line(summed, f"{b}.norm", 7)
        wide = line(add(f"{b}.up", 2.4e-3, normed, size=4 * 128 * 3072), f"{b}.gelu", 7, size=4 * 128 * 3072)
        again = add(f"{b}.add2", 2e-5, add(f"{b}.down", 2.4e-3, wide), normed)
        here = line(again, f"{b}.norm2", 7)
    graph.add_node("answer", seconds={"device": 1e-4, "server": 2e-5}, output_bytes=3072)
    graph.add_edge(here, "answer", bytes=4 * 128 * 768)
    return graph


def exported_bert(hidden: int = 256) -> networkx.DiGraph:
    """What torch.export makes of a BERT of 12 layers (random weights; the hidden size changes no vertex), as our capture hands it on: seconds
    in proportion to operations and bytes, the device six times slower than the server."""
    import torch
    import transformers

    import partitioner

    config = transformers.BertConfig(
        hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden, num_hidden_layers=12, vocab_size=1000
    )
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (2, 128))
    model = partitioner.capture(transformers.BertModel(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    graph = model.structure.graph()
    for _, figures in graph.nodes(data=True):
        seconds = figures["flops"] / 5e10 + figures["activation_bytes"] / 2e10 + 1e-6
        figures["seconds"] = {"device": 6 * seconds, "server": seconds}
    return graph


def two_tiers() -> None:
    for title, graph in (("generated", transformer(12)), ("exported BERT-12", exported_bert())):
        _two_tiers(title, graph)


def _two_tiers(title: str, graph: networkx.DiGraph) -> None:
    devices = {"device": math.inf, "server": math.inf}  # requests come in at the device
    for mbit in (1, 10, 100, 1000):
        links = dict.fromkeys(itertools.permutations(devices, 2), (mbit * 125e3, 2e-3))
        costs = read_graph(graph, list(devices))
        problem = costs.problem(
            np.array([math.inf, math.inf]), link_arrays(list(devices), read_links(links, list(devices))),
            codec_arrays({"raw": CodecFigures()}, list(devices), costs.operators, {}, {}), Overheads.none(2), None, (0, len(costs.operators)),
        )  # fmt: skip
        allowed = np.ones((2, len(costs.operators)), dtype=bool)
        allowed[1, [i for i, before in enumerate(costs.before) if not before]] = False
        problem = replace(problem, allowed=allowed)
        found = [timed(lambda c=costs, p=problem: cut_in_two(c, p, 0, 1)) for _ in range(5)]
        took, (value, upstream) = statistics.median(seconds for seconds, _ in found), found[0][1]
        whole, plan = timed(lambda links=links: solve(graph, devices, links, input_at="device"))
        print(
            f"  {title}, {len(graph)} operators at {mbit} Mbit/s: one minimum cut {took * 1e3:.0f} ms ({value * 1e3:.1f} ms, {len(upstream)} upstream); "
            f"whole plan {whole:.2f} s, {reached(plan) * 1e3:.1f} ms, {gap_text(plan)}"
        )


def heuristic(instances: int) -> None:
    """Against rules of thumb on the home networks of `homes`, all with devices in the order of their speed, fastest first; each is priced like a plan."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for seed in range(instances):
        case = home(seed)
        graph, devices, links = case.graph, case.devices, case.links
        place = {name: k for k, name in enumerate(case.by_speed)}
        onward = {pair: figures for pair, figures in links.items() if place[pair[0]] < place[pair[1]]}
        rules: dict[str, dict[str, Any]] = {
            "shares in proportion to speed": {"pin": proportional(case)},
            "compute balanced (links not looked at)": {"pin": balanced(case)},
            "best cuts for all devices": {"links": onward, "stages": len(devices)},
            "best cuts for as many as are best": {"links": onward},
        }
        for objective in ("latency", "throughput"):
            best = reached(solve(graph, devices, links, objective))
            for rule, asked in rules.items():
                if asked.get("pin") == {}:
                    continue  # it found no place for some layer
                with contextlib.suppress(NoPlan):
                    options = {k: v for k, v in asked.items() if k != "links"}
                    ratios.setdefault((objective, rule), []).append(
                        reached(solve(graph, devices, asked.get("links", links), objective, **options)) / best
                    )
    for (objective, rule), found in ratios.items():
        what, lower = ("bottleneck" if objective == "throughput" else "latency"), [1 - 1 / r for r in found]
        print(
            f"  {what}, {rule}: {len(found)} instances; the rule costs {statistics.mean(found) - 1:+.0%} (median "
            f"{statistics.median(found) - 1:+.0%}); the plan's {what} is {statistics.mean(lower):.0%} lower (median {statistics.median(lower):.0%})"
        )


def scale() -> None:
    for length in (1000, 10_000):
        graph, devices, links = layers(length, 64, 2, kinds=6)
        for objective in ("latency", "throughput"):
            took, plan = timed(lambda o=objective, g=graph, d=devices, k=links: solve(g, d, k, o))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**20
            print(
                f"  {length} operators x 64 devices of 6 kinds, {objective}: {took:.1f} s, {len(plan.stages)} stages, {gap_text(plan)}; "
                f"{memory:.0f} MiB at most",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer instances")
    parser.add_argument("--only", choices=["brute", "times", "tiers", "heuristic", "scale"])
    asked = parser.parse_args()
    parts: dict[str, tuple[str, Callable[[], None]]] = {
        "brute": ("against brute force", lambda: brute_force(50 if asked.quick else 500)),
        "times": ("time", times),
        "tiers": ("two tiers, a transformer's operators", two_tiers),
        "heuristic": ("against ordering devices by speed", lambda: heuristic(15 if asked.quick else 60)),
        "scale": ("scale", scale),
    }
    for key, (title, part) in parts.items():
        if asked.only in (None, key):
            print(title, flush=True)
            part()


if __name__ == "__main__":
    main()
