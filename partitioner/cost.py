"""What a placement costs: latency, throughput, bytes and memory of stages on nodes. Pure arithmetic.

The model, for one request of the profile's batch:

- A stage computes for `seconds` on its node. It starts when all that it waits for has arrived and its node is free: a node runs
  one stage at a time, in the plan's order.
- A transfer from node a to node b takes latency + bytes / bandwidth of the link a -> b, and keeps the link busy for
  bytes / bandwidth: propagation overlaps, transmission does not. Within one node it takes no time, and neither does a transfer
  of no bytes. Links do not disturb each other. What a transfer costs the processors at its ends is not charged here; it is part of the
  latency that a probe measures.
- The client stands at the ingress, the first stage's node: model inputs leave from there at time 0, and outputs come back to
  there (a ring). The way between client and ingress is the client's, and not part of a plan.
- latency: from time 0 until the last output is back at the ingress, with no other request around.
- throughput: 1 / bottleneck; computing and transferring of different requests overlap, so the bottleneck is the busiest
  node (its stages' seconds added up) or the busiest link.
- memory of a node: for each of its stages parameters + activations + `BUFFERED_REQUESTS` times what one request delivers to it
  from other stages or from the client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitnet.cluster import Link
from splitnet.errors import NoPlan
from splitnet.plan import CLIENT, StageSpec, Transfer

__all__ = ["BUFFERED_REQUESTS", "Cost", "evaluate", "stage_memory_bytes"]

BUFFERED_REQUESTS = 2  #: requests whose inputs a stage holds at the least: the one that computes, the one that arrives meanwhile
_SHORTEST_S = 1e-9  # keeps the throughput of a plan that costs nothing finite


@dataclass(frozen=True)
class Cost:
    """`node_seconds` and `link_seconds` say how long one request keeps each busy; links are keyed (source, target)."""

    latency_s: float
    bottleneck_s: float
    bottleneck: str  # "node a" or "link a->b"
    node_seconds: Mapping[str, float]
    link_seconds: Mapping[tuple[str, str], float]
    link_bytes: Mapping[tuple[str, str], int]
    memory_bytes: Mapping[str, int]

    @property
    def throughput_per_s(self) -> float:
        return 1.0 / max(self.bottleneck_s, _SHORTEST_S)

    def objective_s(self, objective: str) -> float:
        """The figure that the objective makes small: latency, or the bottleneck's time per request."""
        return self.latency_s if objective == "latency" else self.bottleneck_s


def stage_memory_bytes(param_bytes: int, activation_bytes: int, received_bytes: int) -> int:
    """What one stage needs on its node."""
    return param_bytes + activation_bytes + BUFFERED_REQUESTS * received_bytes


def evaluate(stages: Sequence[StageSpec], transfers: Sequence[Transfer], links: Mapping[tuple[str, str], Link]) -> Cost:
    """The cost of `stages` (in a topological order, on the nodes that they name) and the transfers between them.

    Raises NoPlan where a transfer has no link to go over.
    """
    ingress = stages[0].node
    node_of = {stage.name: stage.node for stage in stages} | {CLIENT: ingress}
    node_seconds: dict[str, float] = defaultdict(float)
    link_seconds: dict[tuple[str, str], float] = defaultdict(float)
    link_bytes: dict[tuple[str, str], int] = defaultdict(int)
    memory_bytes: dict[str, int] = defaultdict(int)
    node_free: dict[str, float] = defaultdict(float)
    link_free: dict[tuple[str, str], float] = defaultdict(float)
    ready = {stage.name: 0.0 for stage in stages} | {CLIENT: 0.0}
    received = {stage.name: 0 for stage in stages} | {CLIENT: 0}

    def send(source: str, at: float) -> None:
        for transfer in transfers:
            if transfer.source != source:
                continue
            received[transfer.target] += transfer.bytes
            a, b = node_of[source], node_of[transfer.target]
            arrival = at
            if a != b and transfer.bytes:
                link = links.get((a, b))
                if link is None:
                    raise NoPlan(
                        f"stage {source or 'the client'!r} on node {a!r} must send {transfer.bytes} bytes to node {b!r}, but there is no link {a!r} -> {b!r}",
                        remedy="add the link to the cluster, or leave one of the nodes out",
                    )
                busy = transfer.bytes / link.bandwidth_bytes_per_s
                start = max(at, link_free[a, b])
                link_free[a, b] = start + busy
                arrival = start + link.latency_s + busy
                link_seconds[a, b] += busy
                link_bytes[a, b] += transfer.bytes
            ready[transfer.target] = max(ready[transfer.target], arrival)

    send(CLIENT, 0.0)
    latency = 0.0
    for stage in stages:
        end = max(ready[stage.name], node_free[stage.node]) + stage.seconds
        node_free[stage.node] = end
        node_seconds[stage.node] += stage.seconds
        latency = max(latency, end)
        send(stage.name, end)
    for stage in stages:
        memory_bytes[stage.node] += stage_memory_bytes(stage.param_bytes, stage.activation_bytes, received[stage.name])
    busiest_node = max(node_seconds, key=node_seconds.__getitem__)
    bottleneck_s, bottleneck = node_seconds[busiest_node], f"node {busiest_node}"
    for (a, b), busy in link_seconds.items():
        if busy > bottleneck_s:
            bottleneck_s, bottleneck = busy, f"link {a}->{b}"
    return Cost(
        latency_s=max(latency, ready[CLIENT]),
        bottleneck_s=bottleneck_s,
        bottleneck=bottleneck,
        node_seconds=dict(node_seconds),
        link_seconds=dict(link_seconds),
        link_bytes=dict(link_bytes),
        memory_bytes=dict(memory_bytes),
    )
