"""The profile, measured where the model will run: each node times the operators with its own engine and threads.

The model travels as shards whose large weights are left out (the node makes up random ones of the same shape: they cost the same time and
no shipping). Nodes of the same kind are measured once, and what was measured is kept on this machine's disk (`partitioner.profile_cache`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from safetensors.torch import save

from partitioner.cutting import write_stage
from partitioner.layout import StageLayout, lay_out
from partitioner.profile_cache import REFERENCE, ProfileCache
from partitioner.profiling import Column, Profile, matched
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster, ClusterNode, equal_devices
from splitnet.errors import DeadlineExceeded, InsufficientMemory, MissingExtra, NodeUnavailable, NotFound, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import Shard
from splitnet.shipping import Blob, shard_blobs, ship

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph
    from partitioner.structure import Structure

__all__ = ["OnProgress", "Options", "measure_columns"]

OnProgress = Callable[[int, int, str], None]
_Shipped = dict[str, set[str]]  # by a node's address: the blobs that were brought there

_SMALL_BYTES = 1 << 14  # weights up to this size travel: tables of positions and the like, whose values matter
_GRACE_S = 600.0  # a slow box runs a large model five times at least
_TOGETHER = 0.6  # of the budget, for nodes in one box at once
_ROOM = 0.9  # of a node's free memory that a piece may take
_RELEASE_S = 60.0  # a node that activates a deployment answers after that
_CANNOT = (InsufficientMemory, NotFound, MissingExtra)  # what a node says that cannot do it; everything else is an error


@dataclass(frozen=True)
class Options:
    """How nodes are measured. `budget_s` for each kind of node. `cache` None: neither read nor written; `refresh`: written only.
    `real_weights`: ships the model's own weights instead of having the node make some up."""

    budget_s: float = 5.0
    cache: ProfileCache | None = None
    refresh: bool = False
    real_weights: bool = False


@dataclass(frozen=True)
class _Timed:
    node: ClusterNode
    engine: str  # as it was told
    column: Column


async def measure_columns(
    model: ModelGraph, cluster: Cluster, scaled: Profile, options: Options, on_progress: OnProgress | None = None
) -> dict[str, Column]:
    """A column for each node of the cluster. Nodes are measured one after the other, so that those that share a machine do not disturb each
    other. A node that has not the memory or the engine for it gets the times of `scaled` (the profile of this machine), and its column's
    `how` says so. What was shipped for it is taken off the nodes again, also when this raises or is cancelled. Raises NodeUnavailable for
    a node that does not answer."""
    shipped: _Shipped = {}
    try:
        return await _columns(model, cluster, scaled, options, shipped, on_progress)
    finally:
        await asyncio.gather(*(_release(address, blobs) for address, blobs in shipped.items()))


async def _columns(
    model: ModelGraph, cluster: Cluster, scaled: Profile, options: Options, shipped: _Shipped, on_progress: OnProgress | None
) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    measured: list[_Timed] = []
    asked: list[ClusterNode] = []
    for done, node in enumerate(cluster.nodes):
        if on_progress:
            on_progress(done, len(cluster.nodes), f"operators on {node.name}")
        known, engine = await _identified(node)
        asked.append(known)
        twin = next((t for t in measured if t.engine == engine and equal_devices(t.node, known)), None)
        cached = options.cache.find(model.structure, known, engine) if options.cache and not options.refresh else None
        if twin is not None:
            how = f"as node {twin.node.name!r}, an equal device: {twin.column.how}"
            columns[node.name] = dataclasses.replace(twin.column, how=how)
        elif cached is not None:
            columns[node.name] = cached
            measured.append(_Timed(known, engine, cached))
        else:
            try:
                column = await _measured(model, known, options, shipped)
            except _CANNOT as error:
                own = scaled.scaled_to(known)
                how = f"{own.how}, because the node could not measure it: {error.message}"
                columns[node.name] = dataclasses.replace(own, how=how)
                continue
            measured.append(_Timed(known, engine, column))
            columns[node.name] = column
            if options.cache:
                options.cache.keep(model.structure, known, column, engine)
    for box in sorted({known.box for known in asked if known.box}):
        inside = [known for known in asked if known.box == box]
        if len(inside) > 1:
            if on_progress:
                on_progress(len(cluster.nodes), len(cluster.nodes), f"{', '.join(known.name for known in inside)} at once")
            columns |= await _together(model, inside, columns, options, shipped)
    if on_progress:
        on_progress(len(cluster.nodes), len(cluster.nodes), "")
    return columns


async def _identified(node: ClusterNode) -> tuple[ClusterNode, str]:
    """The node with what the cluster file does not say of it (a file written by hand), and the engine that it was told to use."""
    known = bool(node.processor and node.reference_s)
    async with open_channel(node.address) as channel:
        try:
            with _at(node):
                there = await stub(channel).Describe(pb.DescribeRequest(), timeout=10)
        except NodeUnavailable:
            if not known:
                raise
            return node, REFERENCE  # what is kept of such a node may do; measuring it would raise again
        if known:
            return node, there.engine
        with _at(node):
            reference = await stub(channel).Measure(pb.MeasureRequest(compute=True, budget_s=0.5), timeout=_GRACE_S)
    seen = dataclasses.replace(
        node, processor=there.processor, threads=there.threads or node.threads, reference_s=node.reference_s or reference.seconds
    )
    return seen, there.engine


async def _measured(model: ModelGraph, node: ClusterNode, options: Options, shipped: _Shipped) -> Column:
    pieces = await _asked(model, node, options, options.budget_s, shipped)
    whole_s = math.fsum(piece.whole_s for piece in pieces)
    return Column(_seconds(model.structure, pieces), _how(node, pieces), _sustained_s(node, pieces) / whole_s if whole_s else 1.0)


async def _asked(
    model: ModelGraph, node: ClusterNode, options: Options, budget_s: float, shipped: _Shipped, sustained: bool = False
) -> Sequence[pb.OperatorsReply]:
    async with open_channel(node.address) as channel:
        with _at(node):
            there = await stub(channel).Describe(pb.DescribeRequest(), timeout=10)
        room = _ROOM * (there.memory_limit_bytes - there.memory_used_bytes) if there.memory_limit_bytes else float("inf")
        with tempfile.TemporaryDirectory(prefix="splitnet-profile-") as folder:
            shards = _pieces(model, room, options.real_weights, Path(folder))
            inputs = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.example_inputs.items()})
            blob = Blob(hashlib.sha256(inputs).hexdigest(), len(inputs), inputs)
            blobs = [*shard_blobs({str(i): s for i, s in enumerate(shards)}), blob]
            operators = pb.OperatorsRequest(shards=[shard.sha256 for shard in shards], inputs=blob.sha256, sustained=sustained)
            request = pb.MeasureRequest(operators=operators, budget_s=budget_s)
            for last in (False, True):
                await _ship(channel, node, blobs, shipped.setdefault(node.address, set()))
                try:
                    with _at(node):
                        return (await stub(channel).Measure(request, timeout=budget_s + _GRACE_S)).pieces
                except NotFound:  # perhaps what another profile had brought, and has taken away since
                    if last:
                        raise
    raise AssertionError("it returns or raises")


def _sustained_s(node: ClusterNode, pieces: Sequence[pb.OperatorsReply]) -> float:
    """Seconds per run of a node that does nothing else: its processor time over the processors that its threads get."""
    return math.fsum(piece.sustained_cpu_s for piece in pieces) / min(node.threads, node.cores or node.threads)


async def _together(
    model: ModelGraph, nodes: Sequence[ClusterNode], columns: Mapping[str, Column], options: Options, shipped: _Shipped
) -> dict[str, Column]:
    """Nodes in one box, all busy at once, as in a full pipeline: they share caches and memory, whatever processors each has."""
    asked = (_asked(model, node, options, options.budget_s * _TOGETHER, shipped, sustained=True) for node in nodes)
    replies = await asyncio.gather(*asked, return_exceptions=True)
    found = {}
    for node, pieces in zip(nodes, replies, strict=True):
        if isinstance(pieces, _CANNOT):
            continue  # as it was found alone
        if isinstance(pieces, BaseException):
            raise pieces
        column = columns[node.name]
        whole_s = math.fsum(column.seconds)
        sustained = _sustained_s(node, pieces) / whole_s if whole_s else 1.0
        found[node.name] = dataclasses.replace(column, sustained=sustained, how=f"{column.how}; {len(nodes)} nodes in one box")
    return found


async def _ship(channel: grpc.aio.Channel, node: ClusterNode, blobs: Sequence[Blob], shipped: set[str]) -> None:
    """What the node had already is somebody else's, and not for this measurement to take away."""
    for blob in blobs:
        sent = 1
        try:
            sent = await ship(channel, node.address, blob, lambda _: None)
        finally:
            if sent:
                shipped.add(blob.sha256)


async def _release(address: str, blobs: Collection[str]) -> None:
    """A node that has gone meanwhile keeps them until something is unloaded there with --delete; what was measured is good all the same."""
    if blobs:
        async with open_channel(address) as channel:
            with contextlib.suppress(NodeUnavailable, DeadlineExceeded), translated(address):
                await stub(channel).Release(pb.ReleaseRequest(blobs=sorted(blobs)), timeout=_RELEASE_S)


def _pieces(model: ModelGraph, room_bytes: float, real_weights: bool, folder: Path) -> list[Shard]:
    """The model as few shards, in its order, each of which takes at most `room_bytes`. Raises InsufficientMemory where that cannot be."""
    for share in (1.0, 0.7, 0.5, 0.35):
        stages = lay_out(model.structure, _divided(model.structure, room_bytes * share)).stages
        largest = max(stage.param_bytes + stage.activation_bytes for stage in stages)
        if largest <= room_bytes:
            return [_write(model, stage, real_weights, folder / str(stage.index)) for stage in stages]
    raise InsufficientMemory(
        f"even in pieces the model needs {largest} bytes at once, and {room_bytes:.0f} are free there", remedy="raise the node's --memory"
    )


def _divided(structure: Structure, room_bytes: float) -> dict[str, int]:
    assignment: dict[str, int] = {}
    piece, held = 0, 0
    params: set[str] = set()
    for vertex in structure.vertices:
        if vertex.op == "input":
            continue
        own = sum(structure.param_sizes[p] for p in vertex.params if p not in params)
        if params and held + own + vertex.activation_bytes > room_bytes:
            piece, held, params = piece + 1, 0, set()
            own = sum(structure.param_sizes[p] for p in vertex.params)
        assignment[vertex.name] = piece
        params.update(vertex.params)
        held += own
    return assignment


def _write(model: ModelGraph, stage: StageLayout, real_weights: bool, folder: Path) -> Shard:
    def travels(name: str) -> bool:
        weight = model.weights[name]
        return real_weights or weight.nbytes <= _SMALL_BYTES or not weight.is_floating_point()

    return write_stage(model, stage, folder, name=f"profile{stage.index}", weights=[p for p in stage.params if travels(p)])


def _seconds(structure: Structure, pieces: Sequence[pb.OperatorsReply]) -> tuple[float, ...]:
    """Each piece's operators add up to its undisturbed run. An operator that ran in several pieces counts once, at its mean."""
    found: dict[str, list[float]] = {}
    for piece in pieces:
        names = [structure.producer[t.name].name if t.name in structure.producer else "" for t in piece.operators]
        for name, seconds in zip(names, matched([t.seconds for t in piece.operators], piece.whole_s), strict=True):
            found.setdefault(name, []).append(seconds)
    # What reads a size from a shape is no vertex; its microseconds go to all operators alike.
    extra = sum(found.pop("", []))
    each = {name: sum(seconds) / len(seconds) for name, seconds in found.items()}
    share = 1 + extra / max(sum(each.values()), 1e-12)
    return tuple(each.get(vertex.name, 0.0) * share for vertex in structure.vertices)


def _how(node: ClusterNode, pieces: Sequence[pb.OperatorsReply]) -> str:
    parts = [
        f"measured on node {node.name!r}",
        f"engine {pieces[0].engine}, {node.threads} thread{'s' if node.threads > 1 else ''}",
        f"median of {min(piece.rounds for piece in pieces)} runs",
    ]
    if spread := max(piece.spread for piece in pieces):
        parts.append(f"runs differ by {spread:.0%}")
    if any(piece.made_up_weights for piece in pieces):
        parts.append("random weights")
    if len(pieces) > 1:
        parts.append(f"in {len(pieces)} pieces, for want of memory")
    return ", ".join(parts)


@contextlib.contextmanager
def _at(node: ClusterNode) -> Iterator[None]:
    """What goes wrong there comes out with the node's name."""
    try:
        with translated(node.address):
            yield
    except NodeUnavailable as error:
        error.remedy = "start the node, or give --scale to take another machine's times instead"
        raise error.at(node=node.name) from None
    except SplitnetError as error:
        raise error.at(node=node.name) from None
