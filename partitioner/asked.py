"""What people ask of a plan, checked as far as it goes without a model: loading one takes minutes, and a misspelt node's name should not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partitioner.constants import codec_figures
from partitioner.cost import CodecFigures
from partitioner.solvers.arguments import check_kinds
from partitioner.solvers.constraints import Constraints, stage_range
from splitnet.cluster import Cluster, ClusterNode
from splitnet.codecs import codec_names
from splitnet.errors import BadInput, NoPlan

__all__ = ["Asked", "check_asked"]


@dataclass(frozen=True)
class Asked:
    """The wishes, the nodes that are not forbidden, those to use in their order, and how many stages there may be."""

    wishes: Constraints
    usable: tuple[ClusterNode, ...]
    chosen: tuple[ClusterNode, ...]
    stages: range


def check_asked(
    cluster: Cluster,
    *,
    stages: int | range | None = None,
    max_stages: int | None = None,
    forbid: Collection[str] | Mapping[str, Sequence[str]] = (),
    at: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
    codecs: Mapping[str, CodecFigures] | None = None,
    lossless: bool = False,
    max_accuracy_loss: float | None = None,
    tolerance: float = 0.0,
    margin: float = 0.0,
    **wished: Any,
) -> Asked:
    """The keywords are those of `partitioner.plan`. Raises BadInput or BadCluster for what does not exist or contradicts itself, NoPlan where
    no node is left, or too few."""
    check_kinds(
        stages=stages, max_stages=max_stages, forbid=forbid, at=at, nodes=nodes, figures=codecs, lossless=lossless, max_accuracy_loss=max_accuracy_loss,
        tolerance=tolerance, margin=margin, **wished,
    )  # fmt: skip
    forbid = forbid or ()
    names = tuple(node.name for node in cluster.nodes)
    for name in (*forbid, *(nodes or ())):
        cluster.node(name)
    for what, share in (("tolerance", tolerance), ("margin", margin)):
        if not 0 <= share < 1:
            raise BadInput(f"{what} must be within [0, 1), got {share}")
    if lossless and max_accuracy_loss:
        raise BadInput("lossless and max_accuracy_loss contradict each other", remedy="give one of them")
    wishes = Constraints(
        forbid=() if isinstance(forbid, Mapping) else tuple(forbid), forbid_operators=forbid if isinstance(forbid, Mapping) else {},
        max_accuracy_loss=max_accuracy_loss, **{name: wish for name, wish in wished.items() if wish},
    )  # fmt: skip
    usable = tuple(node for node in cluster.nodes if node.name not in wishes.forbid)
    if not usable:
        raise NoPlan("every node of the cluster is forbidden", remedy="leave at least one")
    chosen = usable if nodes is None else tuple(cluster.node(name) for name in nodes)
    wishes.check(names, (*codec_names(), *(codecs or ())))
    if codecs is None:
        wishes.check(names, sorted(set(codec_figures(chosen)) & set(codec_names())))
    _check_cuts(at, nodes, wishes.forbid, len(chosen))
    if at is not None and (stages is not None or max_stages is not None):
        raise BadInput(f"cuts by hand say how many stages there are: {len(at) + 1}", remedy="leave `stages` and `max_stages` away")
    return Asked(wishes, usable, chosen, stage_range(len(usable), stages, max_stages))


def _check_cuts(at: Sequence[str] | None, nodes: Sequence[str] | None, forbid: Collection[str], available: int) -> None:
    if nodes is not None and at is None:
        raise BadInput("`nodes` gives the order of nodes for cuts by hand; it needs `at`")
    for name in nodes or ():
        if list(nodes or ()).count(name) > 1:
            raise BadInput(f"`nodes`: {name!r} stands there twice; a node runs one stage", remedy="name another node, or cut less")
        if name in forbid:
            raise BadInput(f"`nodes` asks for node {name!r}, which is forbidden", remedy="take back one of the two")
    for pattern in at or ():
        if list(at or ()).count(pattern) > 1:
            raise BadInput(f"`at`: {pattern!r} stands there twice")
    if at is not None and available < len(at) + 1:
        cuts = "1 cut makes" if len(at) == 1 else f"{len(at)} cuts make"
        raise BadInput(f"{cuts} {len(at) + 1} stages, but there are {available} nodes")
