"""The cost model's constants for a cluster, from what `splitnet probe` measured. Pure.

Each comes for a goal. For latency a node has one request and pauses between: wake-ups count, and it may use its processors at will. For
throughput it is kept busy: what counts is the processor time of all that it does, codecs and the network included, out of the
processors that it has.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from partitioner.cost import CodecFigures, Machine, Overhead
from splitnet.cluster import Cluster, ClusterNode
from splitnet.plan import CLIENT, Transfer

__all__ = ["Goal", "codec_figures", "machines", "outside_bytes", "overheads", "paced"]

Goal = Literal["latency", "throughput"]


def overheads(
    nodes: Sequence[ClusterNode], goal: Goal = "latency", shared: Sequence[Machine] = (), client_bytes: float = 0.0
) -> dict[str, Overhead]:
    """By node. `shared` are the machines of the cluster; `client_bytes`: what the ingress takes from the client and sends to it for one request."""
    if goal == "latency":
        return {node.name: Overhead(node.stage_s, node.message_s, node.request_s) for node in nodes}
    found = {}
    for node in nodes:
        weight = _weight(node, shared)
        if not any((node.stage_cpu_s, node.message_cpu_s, node.request_cpu_s)):  # a file that is older than these figures
            found[node.name] = Overhead(node.stage_s, node.message_s, node.request_s).times(weight)
            continue
        request_cpu_s = node.request_cpu_s + client_bytes * node.byte_cpu_s
        found[node.name] = Overhead(node.stage_cpu_s * weight, node.message_cpu_s * weight, request_cpu_s * weight)
    return found


def outside_bytes(transfers: Sequence[Transfer]) -> int:
    """What the ingress takes from the client and sends to it for one request; an input that several stages take counts once."""
    return sum({t.tensors: t.bytes for t in transfers if CLIENT in (t.source, t.target)}.values())


def codec_figures(nodes: Sequence[ClusterNode], goal: Goal = "latency", shared: Sequence[Machine] = ()) -> dict[str, CodecFigures]:
    """By codec: those that every one of these nodes has, with each node's speeds and the least ratio. "raw" is always there; for latency
    it costs nothing besides its link: a link's bandwidth was measured with everything that raw bytes cost."""
    found = {"raw": CodecFigures()}
    for name in {codec.name for node in nodes for codec in node.codecs} - {"raw"}:
        speeds = {node.name: codec for node in nodes for codec in node.codecs if codec.name == name}
        if len(speeds) == len(nodes):
            found[name] = CodecFigures(
                ratio=min(codec.ratio for codec in speeds.values()),
                encode_bytes_per_s={node: codec.encode_bytes_per_s for node, codec in speeds.items()},
                decode_bytes_per_s={node: codec.decode_bytes_per_s for node, codec in speeds.items()},
            )
    return found if goal == "latency" else dict(paced(found, nodes, shared))


def paced(codecs: Mapping[str, CodecFigures], nodes: Sequence[ClusterNode], shared: Sequence[Machine] = ()) -> Mapping[str, CodecFigures]:
    """The codecs' figures for throughput: what the encoded bytes cost in the network's code is added, and all of it comes out of the processors
    that a node has."""
    weights = {node.name: _weight(node, shared) for node in nodes}

    def speed(node: ClusterNode, codec: CodecFigures, seconds_per_byte: float) -> float:
        ratio = statistics.median(map(codec.ratio_of, codec.ratio)) if isinstance(codec.ratio, Mapping) else codec.ratio
        spent = (seconds_per_byte + node.byte_cpu_s / ratio) * weights[node.name]
        return 1.0 / spent if spent else math.inf

    return {
        name: dataclasses.replace(
            codec,
            encode_bytes_per_s={node.name: speed(node, codec, codec.encode_s(1.0, node.name)) for node in nodes},
            decode_bytes_per_s={node.name: speed(node, codec, codec.decode_s(1.0, node.name)) for node in nodes},
        )
        for name, codec in codecs.items()
    }


def _weight(node: ClusterNode, shared: Sequence[Machine]) -> float:
    """Seconds by which a processor second besides computing delays a node that is kept busy. Its engine keeps `threads` processors busy, so
    the rest is spread over all that it has; on a shared machine `Machine.seconds` multiplies by the threads."""
    for machine in shared:
        if node.name in machine.threads:
            return 1.0 / machine.threads[node.name]
    return 1.0 / node.cores if node.cores else 1.0


def machines(cluster: Cluster) -> tuple[Machine, ...]:
    """Those with several nodes."""
    return tuple(
        Machine(min(node.cores for node in nodes), {node.name: min(node.threads, math.ceil(node.cores)) for node in nodes})
        for nodes in cluster.shared_machines().values()
    )
