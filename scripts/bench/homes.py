"""Random home networks, and the rules of thumb that a plan for them is held against.

The instances are drawn to look like homes, not to look good:

- 4 to 6 devices, the slowest up to 10 times slower than the fastest (log-uniform: a single-board computer to a desktop), each within 20% of its speed on any one
  layer; memory for a quarter, half or all of the model, drawn again until all together hold 1.3 models.
- each device is on gigabit Ethernet (940 Mbit/s, 0.2 ms; 2 in 5) or on Wi-Fi (20 to 400 Mbit/s log-uniform, 1 to 5 ms). A link has the lesser rate of its ends, half of it
  where both are on Wi-Fi (the same air twice), and the sum of their delays.
- 12 to 24 layers of 2 to 20 ms on the fastest device; half of the models are transformers (the same activation everywhere, 50 KB to 1.5 MB), half are convolutional
  (from 3 MB falling to 50 KB, with 30% noise).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import networkx

__all__ = ["Home", "balanced", "home", "proportional"]

Links = dict[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Home:
    graph: networkx.DiGraph
    devices: dict[str, float]
    links: Links
    by_speed: tuple[str, ...]  # fastest first


def home(seed: int) -> Home:
    rng = random.Random(seed)
    names, length = [f"n{k}" for k in range(rng.randint(4, 6))], rng.randint(12, 24)
    slower = {n: 10 ** rng.uniform(0, 1) for n in names}
    graph = networkx.DiGraph(name=f"home-{seed}")
    transformer, size = rng.random() < 0.5, 10 ** rng.uniform(4.7, 6.18)
    for k in range(length):
        work = rng.uniform(2e-3, 20e-3)
        graph.add_node(k, seconds={n: work * slower[n] * rng.uniform(0.8, 1.2) for n in names}, param_bytes=10**6)
        if k:
            falling = 3e6 * (5e4 / 3e6) ** (k / length) * rng.uniform(0.7, 1.3)
            graph.add_edge(k - 1, k, bytes=int(size if transformer else falling))
    room = dict.fromkeys(names, 1.0)
    while True:
        room = {n: rng.choice([0.25, 0.5, 1.0]) for n in names}
        if sum(room.values()) >= 1.3:
            break
    # twice what a request brings is buffered: at most 6 MB
    devices = {n: room[n] * length * 1e6 + 6e6 for n in names}
    air = {n: rng.random() >= 0.4 for n in names}
    rate = {n: 10 ** rng.uniform(1.3, 2.6) * 125e3 if air[n] else 117.5e6 for n in names}
    delay = {n: rng.uniform(1e-3, 5e-3) if air[n] else 2e-4 for n in names}
    links = {
        (a, b): (min(rate[a], rate[b]) / (2 if air[a] and air[b] else 1), delay[a] + delay[b]) for a, b in itertools.permutations(names, 2)
    }
    total = {n: sum(graph.nodes[k]["seconds"][n] for k in graph) for n in names}
    return Home(graph, devices, links, tuple(sorted(names, key=total.__getitem__)))


def _holds(home: Home, device: str, layers: int) -> bool:
    return layers * 1e6 + 6e6 <= home.devices[device]


def proportional(home: Home) -> dict[str, str]:
    """Each device in the order of speed a share of the work in proportion to its speed, or what its memory holds; the last ones what is left. What fits
    nowhere then goes to the fastest with room."""
    graph, order = home.graph, list(home.by_speed)
    total = {n: sum(graph.nodes[k]["seconds"][n] for k in graph) for n in order}
    worth = sum(1 / t for t in total.values())
    placed: dict[str, str] = {}
    at, count = 0, len(graph)
    for place, device in enumerate(order):
        goal = sum((1 / total[n]) / worth for n in order[: place + 1])
        first, done = at, sum(graph.nodes[k]["seconds"][order[0]] for k in range(at)) / total[order[0]]
        while at < count and _holds(home, device, at - first + 1) and (done < goal - 1e-9 or place == len(order) - 1):
            placed[str(at)] = device
            done += graph.nodes[at]["seconds"][order[0]] / total[order[0]]
            at += 1
    return placed if at == count else {}


def balanced(home: Home) -> dict[str, str]:
    """Devices in the order of speed, cut so that the busiest device computes for the shortest time; links are not looked at (the partition of
    GPipe and its like). A device may be left empty."""
    graph, order, count = home.graph, home.by_speed, len(home.graph)
    prefix = {n: list(itertools.accumulate((graph.nodes[k]["seconds"][n] for k in range(count)), initial=0.0)) for n in order}
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for device in order:
        filled: dict[int, tuple[float, int]] = {}
        for start, (busy, _) in best[-1].items():
            for end in range(start, count + 1):
                if end > start and not _holds(home, device, end - start):
                    break
                worst = max(busy, prefix[device][end] - prefix[device][start])
                if end not in filled or worst < filled[end][0]:
                    filled[end] = worst, start
        best.append(filled)
    placed, end = {}, count
    for k in range(len(order), 0, -1):
        start = best[k][end][1]
        placed.update({str(v): order[k - 1] for v in range(start, end)})
        end = start
    return placed
