"""The cost model's constants for a cluster, from what `splitnet probe` measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.cost import CodecFigures, Machine, Overhead
from splitnet.cluster import Cluster, ClusterNode

__all__ = ["codec_figures", "machines", "overheads"]


def overheads(nodes: Sequence[ClusterNode]) -> dict[str, Overhead]:
    """By node."""
    return {node.name: Overhead(node.stage_s, node.message_s, node.request_s) for node in nodes}


def codec_figures(nodes: Sequence[ClusterNode]) -> dict[str, CodecFigures]:
    """By codec: those that every one of these nodes has, with each node's speeds and the least ratio. "raw" is always there, and
    costs nothing besides its link: a link's bandwidth was measured with everything that raw bytes cost."""
    found = {"raw": CodecFigures()}
    for name in {codec.name for node in nodes for codec in node.codecs} - {"raw"}:
        speeds = {node.name: codec for node in nodes for codec in node.codecs if codec.name == name}
        if len(speeds) == len(nodes):
            found[name] = CodecFigures(
                ratio=min(codec.ratio for codec in speeds.values()),
                encode_bytes_per_s={node: codec.encode_bytes_per_s for node, codec in speeds.items()},
                decode_bytes_per_s={node: codec.decode_bytes_per_s for node, codec in speeds.items()},
            )
    return found


def machines(cluster: Cluster) -> tuple[Machine, ...]:
    """Those whose nodes have more threads together than the machine has cores."""
    return tuple(
        Machine(min(node.cores for node in nodes), {node.name: min(node.threads, node.cores) for node in nodes})
        for nodes in cluster.shared_machines().values()
    )
