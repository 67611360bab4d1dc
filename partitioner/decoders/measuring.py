"""The profile of a decoder model, measured where it will run: embedding, some layers of each kind, and head, each in each format, with the node's own engine.

Layers whose tensors have equal shapes are of one kind, and a few of them stand for all; weights are made up by the node. Nodes of the same kind are measured once. Without a
cluster a node is started on this machine for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.decoders.figures import DecoderProfile, Times, Workload
from partitioner.decoders.figures_cache import TimesCache
from partitioner.decoders.model import DecoderModel
from partitioner.decoders.writing import stored_arrays
from partitioner.demo.boxes import running_nodes
from splitnet import background
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster, ClusterNode, equal_devices
from splitnet.decoder_format import DecoderSpec
from splitnet.errors import BadInput, InsufficientMemory, MissingExtra, NodeUnavailable, NoPlan, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec
from splitnet.wire import spec_to_message

__all__ = ["HERE", "columns_for", "measure_decoder"]

HERE = ""  #: the column of the machine that plans
_UNCACHED_BYTES = 192 << 20  # of layers that are measured at once: more than a processor's cache keeps of them
_FEWEST_LAYERS, _MOST_LAYERS = 2, 8
_GRACE_S = 900.0  # a slow box computes a prompt once for each piece and format
_ROOM = 0.9

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A span of vertices, measured for `stands_for` vertices each."""

    a: int
    b: int
    stands_for: tuple[int, ...]


def columns_for(wanted: str) -> tuple[str, ...]:
    """Which "dtype/format" to measure where `--weights` says this. Raises BadInput."""
    if wanted in ("float32", "bfloat16"):
        return (f"{wanted}/{wanted}",)
    formats = ("int8", "int4") if wanted == "auto" else (wanted,)
    if not set(formats) <= {"int8", "int4"}:
        raise BadInput(f"weights: expected auto, float32, bfloat16, int8 or int4, got {wanted!r}")
    found = [f"{dtype}/{form}" for dtype in ("float32", "bfloat16") for form in ((dtype, *formats) if wanted == "auto" else formats)]
    return tuple(found)


def measure_decoder(
    model: DecoderModel,
    workload: Workload,
    *,
    cluster: Cluster | None = None,
    columns: Sequence[str] = columns_for("auto"),
    budget_s: float = 5.0,
    threads: int = 1,
    cache: TimesCache | None = None,
    on_progress: OnProgress | None = None,
) -> DecoderProfile:
    """Times of every vertex on each node of the cluster; without one, on this machine with so many threads. `budget_s`: for each kind of node and column, about. `cache`: what was measured before. A node that has
    too little memory for it, or not the engine, gets another's times by scaling when a plan is made. Raises NodeUnavailable, and NoPlan where no node could be measured."""
    if cluster is None:
        with running_nodes(["here"], threads=threads) as started:
            here = ClusterNode(HERE, started["here"], threads=threads)
            return background.run(_profile(model, workload, (here,), columns, budget_s, cache, on_progress))
    return background.run(_profile(model, workload, cluster.nodes, columns, budget_s, cache, on_progress))


async def _profile(
    model: DecoderModel, workload: Workload, nodes: Sequence[ClusterNode], columns: Sequence[str], budget_s: float, cache: TimesCache | None,
    on_progress: OnProgress | None,
) -> DecoderProfile:  # fmt: skip
    batches = tuple(sorted({1, workload.sessions}))
    found: dict[str, dict[str, Times]] = {}
    reference: dict[str, float] = {}
    measured: list[tuple[ClusterNode, str]] = []
    why = ""
    for done, node in enumerate(nodes):
        known = await _identified(node)
        reference[node.name] = known.reference_s
        twin = next((name for other, name in measured if equal_devices(other, known)), None)
        if twin is not None:
            found[node.name] = {
                form: times.scaled(1.0, f"as node {twin!r}, an equal device: {times.how}") for form, times in found[twin].items()
            }
            continue
        own: dict[str, Times] = {}
        for k, column in enumerate(columns):
            if on_progress:
                on_progress(done * len(columns) + k, len(nodes) * len(columns), f"{column} on {node.name or 'this machine'}")
            kept = cache.find(model, known, column, workload, batches) if cache else None
            if kept is not None:
                own[column] = kept
                continue
            try:
                own[column] = await _column(model, known, column, workload, batches, budget_s)
                if cache:
                    cache.keep(model, known, column, workload, batches, own[column])
            except (InsufficientMemory, MissingExtra) as error:
                why = f"node {node.name!r}: {error.message}"
        if own:
            found[node.name] = own
            measured.append((known, node.name))
    if on_progress:
        on_progress(len(nodes) * len(columns), len(nodes) * len(columns), "")
    if not found:
        raise NoPlan(f"no node could measure the model: {why}", remedy="raise the nodes' --memory, or install what they lack")
    dtype = columns[0].partition("/")[0]
    return DecoderProfile(model.structure(1, dtype), workload.chunk_tokens, workload.cached_tokens, batches, found, reference)


async def _identified(node: ClusterNode) -> ClusterNode:
    """With what the cluster file does not say of it."""
    if node.processor and node.reference_s:
        return node
    async with open_channel(node.address) as channel:
        try:
            with translated(node.address):
                there = await stub(channel).Describe(pb.DescribeRequest(), timeout=10)
                kernel = await stub(channel).Measure(pb.MeasureRequest(compute=True, budget_s=0.3), timeout=60)
        except NodeUnavailable as error:
            raise error.at(node=node.name) from None
    return replace(node, processor=there.processor, threads=there.threads or node.threads, reference_s=node.reference_s or kernel.seconds)


async def _column(
    model: DecoderModel, node: ClusterNode, column: str, workload: Workload, batches: Sequence[int], budget_s: float
) -> Times:
    dtype, _, form = column.partition("/")
    count = len(model.vertices)
    prefill, decode = [0.0] * count, [[0.0] * count for _ in batches]
    replies = []
    step_s = 0.0
    async with open_channel(node.address) as channel:
        try:
            with translated(node.address):
                there = await stub(channel).Describe(pb.DescribeRequest(), timeout=10)
                room = _ROOM * (there.memory_limit_bytes - there.memory_used_bytes) if there.memory_limit_bytes else math.inf
                pieces = list(_pieces(model, form, dtype, workload, room))
                for piece in pieces:
                    spec = model.spec(piece.a, piece.b, form=form, dtype=dtype, context_length=workload.context_length)
                    request = pb.MeasureRequest(
                        decoder=_request(model, spec, piece, form, workload, batches), budget_s=budget_s / len(pieces)
                    )
                    reply = (await stub(channel).Measure(request, timeout=budget_s + _GRACE_S)).decoder
                    replies.append(reply)
                    # What looks up a token's row is nothing beside what every pass takes, so that stands for the latter.
                    step_s = step_s or min(reply.decode_s[0], reply.prefill_s)
                    for v in piece.stands_for:
                        prefill[v] = _net(reply.prefill_s, step_s, v) / (piece.b - piece.a)
                        for k, seconds in enumerate(reply.decode_s):
                            decode[k][v] = _net(seconds, step_s, v) / (piece.b - piece.a)
        except SplitnetError as error:
            raise error.at(node=node.name) from None
    rounds, spread = min(reply.rounds for reply in replies), max(reply.spread for reply in replies)
    threads = f"{node.threads} thread{'s' if node.threads > 1 else ''}"
    how = f"measured on {f'node {node.name!r}' if node.name else 'this machine'}, {threads}, median of {rounds} runs or more, they differ by {spread:.0%}, random weights"
    return Times(tuple(prefill), tuple(map(tuple, decode)), step_s, how)


def _net(seconds: float, step_s: float, vertex: int) -> float:
    """Without what every pass takes; what was measured is never halved by that, but for the embedding, which is not more."""
    return max(seconds - step_s, seconds / 2 if vertex else 0.0)


def _pieces(model: DecoderModel, form: str, dtype: str, workload: Workload, room: float) -> Iterator[_Piece]:
    """Embedding, the longest stretch of each kind of layer (as much of it as says enough), and head."""
    count = len(model.vertices)
    yield _Piece(0, 1, (0,))
    kinds: dict[tuple[object, ...], list[int]] = {}
    for v in range(1, count - 1):
        kinds.setdefault(_kind(model, v), []).append(v)
    for members in kinds.values():
        start, length = _longest(members)
        each = max(1, model.param_bytes(start, start + 1, form, dtype))
        cache = model.kv_bytes(start, start + 1, dtype) * (workload.cached_tokens + 1) * workload.sessions
        wanted = min(_MOST_LAYERS, max(_FEWEST_LAYERS, math.ceil(_UNCACHED_BYTES / each)), length)
        fitting = wanted if math.isinf(room) else max(1, min(wanted, int(room // (each + cache))))
        yield _Piece(start, start + fitting, tuple(members))
    yield _Piece(count - 1, count, (count - 1,))


def _kind(model: DecoderModel, vertex: int) -> tuple[object, ...]:
    prefix = model.vertices[vertex] + "."
    return tuple((name.partition(prefix)[2], model.checkpoint.shape(name)) for name in model.tensors[model.vertices[vertex]])


def _longest(members: Sequence[int]) -> tuple[int, int]:
    """(start, length) of the longest stretch of neighbours."""
    best, start = (members[0], 1), members[0]
    for before, v in zip([members[0] - 1, *members], members, strict=False):
        start = start if v == before + 1 else v
        best = max(best, (start, v - start + 1), key=lambda found: found[1])
    return best


def _request(
    model: DecoderModel, spec: DecoderSpec, piece: _Piece, form: str, workload: Workload, batches: Sequence[int]
) -> pb.DecoderRequest:
    tensors = [
        spec_to_message(TensorSpec(stored, dtype, shape))
        for name, source, one in model.stored(piece.a, piece.b, form, spec.dtype)
        for stored, (dtype, shape) in stored_arrays(name, model.checkpoint.shape(source), one).items()
    ]
    return pb.DecoderRequest(
        spec=spec.to_bytes(), tensors=tensors, chunk_tokens=workload.chunk_tokens, cached_tokens=workload.cached_tokens, batches=batches
    )
