"""What a placement costs: latency, throughput, bytes and memory of stages on nodes. Pure arithmetic.

The model, for one request of the profile's batch:

- A stage computes for `seconds` on its node, and the node spends `Overhead.stage_s` on handing it over. It starts when all that it
  waits for has arrived and was decoded, and its node is free: a node runs one stage at a time, in the plan's order.
- A transfer from node a to node b is encoded on a, takes latency + encoded bytes / bandwidth of the link a -> b, and is decoded on b. It
  keeps the link busy for encoded bytes / bandwidth: propagation overlaps, transmission does not. Encoding and decoding take the
  processor's time at the codec's speed (`CodecFigures`), and each tensor `Overhead.message_s` at either end. Within one node a
  transfer takes no time, and neither does one of no bytes. Links do not disturb each other.
- The client stands at the ingress, the first stage's node: model inputs leave from there at time 0, and outputs come back to
  there (a ring). The way between client and ingress is the client's, and not part of a plan; what the ingress spends on it is
  `Overhead.request_s`.
- latency: from time 0 until the last output is back at the ingress, with no other request around. Several transfers of one stage are
  encoded, and several to one stage decoded, at the same time.
- throughput: 1 / bottleneck; computing and transferring of different requests overlap, so the bottleneck is the busiest
  node (its stages, encoding, decoding and overheads added up) or the busiest link.
- Nodes on one machine with fewer cores than they have threads (`Machine`) slow each other down when many requests are under way: its
  processor time (its nodes' seconds, each with its threads) divided by its cores is a bottleneck too.
- What things take differs with what else there is to do: `partitioner.constants` gives the figures for latency (one request, and pauses) and
  those for throughput (the pipeline full: processor time).
- memory of a node: for each of its stages parameters + activations + `BUFFERED_REQUESTS` times what one request delivers to it
  from other stages or from the client, decoded.
- error of a plan: the sum of the errors of its transfers' codecs; a transfer's is the largest of its tensors'.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splitnet.cluster import Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, StageSpec, Transfer
from splitnet.stage_memory import BUFFERED_REQUESTS, stage_memory_bytes

__all__ = [
    "BUFFERED_REQUESTS",
    "NO_OVERHEAD",
    "RAW",
    "SHORTEST_S",
    "CodecFigures",
    "Cost",
    "Machine",
    "Overhead",
    "evaluate",
    "stage_memory_bytes",
]

SHORTEST_S = 1e-9  #: keeps the throughput of a plan that costs nothing finite


@dataclass(frozen=True)
class CodecFigures:
    """What a codec does to activations: `ratio` is bytes before / bytes after, one figure or one per operator whose result is sent, inf for one
    whose result it leaves as it is (a mask, token ids), which says nothing of what goes beside it; the speeds are bytes before per second of a processor's time, one figure for all nodes or one per node by name; `error` is the loss that the
    caller allots to one transfer, one figure or one per operator. Raises BadInput for a figure that cannot be."""

    ratio: float | Mapping[str, float] = 1.0
    encode_bytes_per_s: float | Mapping[str, float] = math.inf
    decode_bytes_per_s: float | Mapping[str, float] = math.inf
    error: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        for ratio in self.ratio.values() if isinstance(self.ratio, Mapping) else (self.ratio,):
            if not (ratio > 0 and (ratio < math.inf or isinstance(self.ratio, Mapping))):
                raise BadInput(f"a codec's ratio must be positive and finite, got {ratio}")
        for what, figure in (("encode_bytes_per_s", self.encode_bytes_per_s), ("decode_bytes_per_s", self.decode_bytes_per_s)):
            for speed in figure.values() if isinstance(figure, Mapping) else (figure,):
                if not speed > 0:
                    raise BadInput(f"a codec's {what} must be positive, got {speed}")
        for error in self.error.values() if isinstance(self.error, Mapping) else (self.error,):
            if not 0 <= error < math.inf:
                raise BadInput(f"a codec's error must be finite and not negative, got {error}")

    def encode_s(self, size_bytes: float, node: str) -> float:
        return size_bytes / self._of(self.encode_bytes_per_s, node, "node")

    def decode_s(self, size_bytes: float, node: str) -> float:
        return size_bytes / self._of(self.decode_bytes_per_s, node, "node")

    @property
    def best_ratio(self) -> float:
        """That of the operator whose result is made smallest."""
        if not isinstance(self.ratio, Mapping):
            return self.ratio
        return max((1.0 if ratio == math.inf else ratio for ratio in self.ratio.values()), default=1.0)

    def ratio_of(self, *operators: str) -> float:
        """Of the results of these together: the least of those that it changes; 1 where it changes none."""
        if not isinstance(self.ratio, Mapping):
            return self.ratio
        least = min((self._of(self.ratio, operator, "operator") for operator in operators), default=1.0)
        return 1.0 if least == math.inf else least

    def leaves(self, operator: str) -> bool:
        """Whether the result of this operator goes as it is."""
        return isinstance(self.ratio, Mapping) and self._of(self.ratio, operator, "operator") == math.inf

    def sent_bytes(self, size_bytes: float, operators: Iterable[str]) -> float:
        """What a transfer of the results of these operators takes on the wire."""
        return size_bytes / self.ratio_of(*operators)

    def error_of(self, operator: str) -> float:
        return self._of(self.error, operator, "operator")

    @staticmethod
    def _of(figure: float | Mapping[str, float], name: str, what: str) -> float:
        if not isinstance(figure, Mapping):
            return figure
        if name not in figure:
            raise BadInput(f"a codec has no figure for {what} {name!r}", remedy="give one number for all, or one for each")
        return figure[name]


@dataclass(frozen=True)
class Overhead:
    """What a node spends besides computing: on each run of a stage, on each tensor that it sends or takes over a link, and, as the
    ingress, on each request."""

    stage_s: float = 0.0
    message_s: float = 0.0
    request_s: float = 0.0

    def times(self, factor: float) -> Overhead:
        return Overhead(self.stage_s * factor, self.message_s * factor, self.request_s * factor)


@dataclass(frozen=True)
class Machine:
    """A box that several nodes share; `threads` of each by name."""

    cores: float
    threads: Mapping[str, int]

    def seconds(self, node_seconds: Mapping[str, float]) -> float:
        """How long one request keeps all cores busy."""
        return sum(s * self.threads[node] for node, s in node_seconds.items() if node in self.threads) / self.cores

    def __str__(self) -> str:
        return f"{self.cores:g} core{'s' if self.cores > 1 else ''} shared by nodes {', '.join(self.threads)}"


RAW: Mapping[str, CodecFigures] = {"raw": CodecFigures()}  #: what is assumed where no codec's figures are given: it costs nothing
NO_OVERHEAD = Overhead()


@dataclass(frozen=True)
class Cost:
    """`node_seconds` and `link_seconds` say how long one request keeps each busy; links are keyed (source, target), and `link_bytes` are
    before the codec, `sent_bytes` after it."""

    latency_s: float
    bottleneck_s: float
    bottleneck: str  # "node a", "link a->b" or "2 cores shared by nodes a, b, c"
    node_seconds: Mapping[str, float]
    link_seconds: Mapping[tuple[str, str], float]
    link_bytes: Mapping[tuple[str, str], int]
    sent_bytes: Mapping[tuple[str, str], float]
    memory_bytes: Mapping[str, int]
    error: float = 0.0

    @property
    def throughput_per_s(self) -> float:
        return 1.0 / max(self.bottleneck_s, SHORTEST_S)

    def objective_s(self, objective: str) -> float:
        """The figure that the objective makes small: latency, or the bottleneck's time per request."""
        return self.latency_s if objective == "latency" else self.bottleneck_s


def evaluate(
    stages: Sequence[StageSpec],
    transfers: Sequence[Transfer],
    links: Mapping[tuple[str, str], Link],
    codecs: Mapping[str, CodecFigures] = RAW,
    overheads: Mapping[str, Overhead] | None = None,
    producers: Mapping[str, str] | None = None,
    machines: Sequence[Machine] = (),
) -> Cost:
    """The cost of `stages` (in a topological order, on the nodes that they name) and the transfers between them.

    `overheads` are by node. `producers` names the operator that makes each tensor, where a codec's error or ratio differs by operator. Raises NoPlan where a
    transfer has no link to go over, BadInput where its codec has no figures.
    """
    overheads = overheads or {}
    ingress = stages[0].node
    node_of = {stage.name: stage.node for stage in stages} | {CLIENT: ingress}
    node_seconds: dict[str, float] = defaultdict(float)
    link_seconds: dict[tuple[str, str], float] = defaultdict(float)
    link_bytes: dict[tuple[str, str], int] = defaultdict(int)
    sent_bytes: dict[tuple[str, str], float] = defaultdict(float)
    memory_bytes: dict[str, int] = defaultdict(int)
    node_free: dict[str, float] = defaultdict(float)
    link_free: dict[tuple[str, str], float] = defaultdict(float)
    ready = {stage.name: 0.0 for stage in stages} | {CLIENT: 0.0}
    received = {stage.name: 0 for stage in stages} | {CLIENT: 0}
    errors: list[float] = []
    outgoing: dict[str, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        outgoing[transfer.source].append(transfer)

    def send(source: str, at: float) -> None:
        for transfer in outgoing[source]:
            received[transfer.target] += transfer.bytes
            a, b = node_of[source], node_of[transfer.target]
            arrival = at
            if a != b and transfer.bytes:
                link, codec = links.get((a, b)), codecs.get(transfer.codec)
                if link is None:
                    raise NoPlan(
                        f"stage {source or 'the client'!r} on node {a!r} must send {transfer.bytes} bytes to node {b!r}, but there is no link {a!r} -> {b!r}",
                        remedy="add the link to the cluster, or leave one of the nodes out",
                    )
                if codec is None:
                    raise BadInput(f"there are no figures for the codec {transfer.codec!r}; there are for {', '.join(codecs)}")
                encode = codec.encode_s(transfer.bytes, a) + overheads.get(a, NO_OVERHEAD).message_s * len(transfer.tensors)
                decode = codec.decode_s(transfer.bytes, b) + overheads.get(b, NO_OVERHEAD).message_s * len(transfer.tensors)
                made_by = [(producers or {}).get(t, t) for t in transfer.tensors]
                sent = codec.sent_bytes(transfer.bytes, made_by)
                busy = sent / link.bandwidth_bytes_per_s
                start = max(at + encode, link_free[a, b])
                link_free[a, b] = start + busy
                arrival = start + link.latency_s + busy + decode
                node_seconds[a] += encode
                node_seconds[b] += decode
                link_seconds[a, b] += busy
                link_bytes[a, b] += transfer.bytes
                sent_bytes[a, b] += sent
                errors.append(max(map(codec.error_of, made_by), default=0.0))
            ready[transfer.target] = max(ready[transfer.target], arrival)

    accepted = overheads.get(ingress, NO_OVERHEAD).request_s
    node_seconds[ingress] += accepted
    send(CLIENT, accepted)
    ready[stages[0].name] = max(ready[stages[0].name], accepted)
    latency = 0.0
    for stage in stages:
        took = overheads.get(stage.node, NO_OVERHEAD).stage_s + stage.seconds
        end = max(ready[stage.name], node_free[stage.node]) + took
        node_free[stage.node] = end
        node_seconds[stage.node] += took
        latency = max(latency, end)
        send(stage.name, end)
    for stage in stages:
        memory_bytes[stage.node] += stage_memory_bytes(stage.param_bytes, stage.activation_bytes, received[stage.name])
    busiest_node = max(node_seconds, key=node_seconds.__getitem__)
    bottleneck_s, bottleneck = node_seconds[busiest_node], f"node {busiest_node}"
    for (a, b), busy in link_seconds.items():
        if busy > bottleneck_s:
            bottleneck_s, bottleneck = busy, f"link {a}->{b}"
    for machine in machines:
        if (busy := machine.seconds(node_seconds)) > bottleneck_s:
            bottleneck_s, bottleneck = busy, str(machine)
    return Cost(
        latency_s=max(latency, ready[CLIENT]),
        bottleneck_s=bottleneck_s,
        bottleneck=bottleneck,
        node_seconds=dict(node_seconds),
        link_seconds=dict(link_seconds),
        link_bytes=dict(link_bytes),
        sent_bytes=dict(sent_bytes),
        memory_bytes=dict(memory_bytes),
        error=math.fsum(errors),
    )
