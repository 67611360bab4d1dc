"""The plan: which stage runs which operators on which node, what crosses between them, and what to expect of it.

A plan is an immutable JSON document. It is made by `partitioner.plan`, completed with the shards' hashes by
`partitioner.cut`, and read by every node that serves a part of it. Whatever is read is checked: a node must be able to take a
plan from a stranger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitnet.batching import BatchAxes, Batching, find_batch_axes
from splitnet.documents import load_document, save_document
from splitnet.errors import BadInput, BadPlan
from splitnet.generation_plan import Generation
from splitnet.noise import Noise, check_noise
from splitnet.tensors import TensorSpec

__all__ = ["CLIENT", "PLAN_VERSION", "Alternative", "CodecOption", "NodeRef", "OutputSpec", "Plan", "Prediction", "StageSpec", "Transfer"]

PLAN_VERSION = 1
CLIENT = ""  #: the stage name that stands for the client's side of the ingress, in `Transfer.source` and `.target`


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node that the plan uses."""

    name: str
    address: str  # host:port, as the other nodes reach it


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A shard placed on a node. `operators` are vertices of the model graph; `inputs` and `outputs` are the values that cross its
    border, by their names in the model graph. `seconds` is predicted for the profile's batch. `first` and `last` say for people where
    in the model it begins and ends: module paths, or operators where there is none."""

    name: str
    node: str
    operators: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    param_bytes: int = 0
    activation_bytes: int = 0
    seconds: float = 0.0
    shard: str = ""  # sha256 of the shard's manifest; empty until cut
    first: str = ""
    last: str = ""
    replicas: tuple[str, ...] = ()  # nodes that hold the shard ready, to take over when `node` is lost: the first that lives


@dataclass(frozen=True, slots=True)
class CodecOption:
    """A codec that a transfer may use: how many times fewer bytes it is expected to make, and the bytes that it encodes on the source's
    node and decodes on the target's, per second, before the codec."""

    name: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """Values that go from one stage to another. `source` CLIENT: a model input, sent on by the ingress. `target` CLIENT: a model
    output, sent back to the ingress. `bytes` is for the profile's batch, before the codec. `codecs`: the nodes may change to any of these while
    they serve, tensor by tensor, and start with `codec`, which is among them; empty: it stays `codec`. Whatever is chosen on all transfers, the
    accuracy that the plan was made for is kept."""

    source: str
    target: str
    tensors: tuple[str, ...]
    codec: str = "raw"
    bytes: int = 0
    codecs: tuple[CodecOption, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """A model output: its name for the client, and the value in the model graph that it is."""

    value: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Alternative:
    """What one device alone would do; `fits` says whether the model fits there at all."""

    node: str
    latency_s: float
    throughput_per_s: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """For batches of `batch` items, and the other sizes in `symbols`. `throughput_per_s` counts batches. `memory_bytes` is per node;
    `bytes_per_link` is keyed "a->b", and after the codec. `bound` is a proven lower bound of the objective (seconds: latency, or the bottleneck's time per batch)."""

    batch: int
    latency_s: float
    throughput_per_s: float
    bottleneck: str = ""
    bound: float = 0.0
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    bytes_per_link: Mapping[str, int] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    symbols: Mapping[str, int] = field(default_factory=dict)  # of the inputs' shapes
    note: str = ""  # what people should know of how the plan was chosen
    loss: float = 0.0  # what the task loses by the codecs, as a share, measured on the whole plan
    loss_of: str = ""  # by which metric, on what, and how much was allowed; "" where it was not measured


@dataclass(frozen=True)
class Plan:
    """Raises BadPlan when it does not hold together: see `_check`."""

    model: str  # the MODEL argument or the module's class, for people
    model_sha256: str
    objective: str  # "latency" or "throughput"; with `generation` also "ttft" or "tpot"
    nodes: tuple[NodeRef, ...]
    stages: tuple[StageSpec, ...]  # in a topological order; the first one's node is the ingress
    transfers: tuple[Transfer, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    prediction: Prediction | None = None
    profile_sha256: str = ""
    max_in_flight: int = 16
    exclusive: bool = False  # has its nodes' threads for itself: a node takes no other deployment beside it
    batching: Batching = field(default_factory=Batching)
    generation: Generation | None = None  # of a decoder language model whose stages keep caches
    noise: Noise | None = None  # on all that leaves the first stage for the others
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        _check(self)

    @property
    def ingress(self) -> NodeRef:
        """The node that takes the client's requests."""
        return self.node(self.stages[0].node)

    def node(self, name: str) -> NodeRef:
        for node in self.nodes:
            if node.name == name:
                return node
        raise BadPlan(f"no node {name!r} in the plan; it has {', '.join(n.name for n in self.nodes)}")

    def stage(self, name: str) -> StageSpec:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise BadPlan(f"no stage {name!r} in the plan; it has {', '.join(s.name for s in self.stages)}")

    def stages_at(self, node: str) -> tuple[StageSpec, ...]:
        """Those that a node serves."""
        return tuple(stage for stage in self.stages if stage.node == node)

    def standbys_at(self, node: str) -> tuple[StageSpec, ...]:
        """Those that a node holds ready for others."""
        return tuple(stage for stage in self.stages if node in stage.replicas)

    def held_at(self, node: str) -> tuple[StageSpec, ...]:
        """All that a node must have loaded: what it serves, and what it holds ready."""
        return self.stages_at(node) + self.standbys_at(node)

    @property
    def used_nodes(self) -> tuple[NodeRef, ...]:
        """Those that serve a stage or hold one ready."""
        return tuple(node for node in self.nodes if self.held_at(node.name))

    @property
    def batch_axes(self) -> BatchAxes | None:
        """Where the batch is, if requests are to be joined or divided along it."""
        if not self.batching.on:
            return None
        return find_batch_axes(self.inputs, {output.value: output.spec for output in self.outputs})

    def with_shards(self, shards: Mapping[str, str]) -> Plan:
        """The same plan with each stage's shard hash filled in."""
        return dataclasses.replace(self, stages=tuple(dataclasses.replace(s, shard=shards[s.name]) for s in self.stages))

    def with_fixed_codecs(self) -> Plan:
        """The same plan with codecs that stay as they are."""
        return dataclasses.replace(self, transfers=tuple(dataclasses.replace(t, codecs=()) for t in self.transfers))

    def with_draft(self, draft: str) -> Plan:
        """The same plan with a small model's deployment that guesses for it. Raises BadInput for a plan that does not generate."""
        if self.generation is None:
            raise BadInput("--draft is for models that generate", remedy="leave it away")
        return dataclasses.replace(self, generation=dataclasses.replace(self.generation, draft=draft))

    @property
    def sessions(self) -> int:
        """What it reserves of its nodes: requests at once; of a decoder model, sessions of full length."""
        return self.max_in_flight if self.generation is None else self.generation.sessions

    def reserving(self, sessions: int, *, exclusive: bool) -> Plan:
        """The same plan that reserves so much of its nodes. Raises BadPlan."""
        if self.generation is None:
            return dataclasses.replace(self, max_in_flight=sessions, exclusive=exclusive)
        return dataclasses.replace(self, generation=dataclasses.replace(self.generation, sessions=sessions), exclusive=exclusive)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        document = dataclasses.asdict(self)
        if self.generation is None:  # such plans read, and hash, as before there was this section
            del document["generation"]
        if not self.exclusive:
            del document["exclusive"]
        if self.noise is None:
            del document["noise"]
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Raises BadPlan with the path to the fault."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadPlan(f"the plan is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise BadPlan("the plan is not a JSON object")
        version = document.get("version")
        if version != PLAN_VERSION:
            raise BadPlan(
                f"the plan has version {version!r}, this splitnet reads version {PLAN_VERSION}",
                remedy="make the plan again with `splitnet plan`, or update splitnet on this machine",
            )
        from splitnet.plan_reader import read_plan  # which needs the nouns of this module

        return read_plan(document)

    def save(self, path: str | Path) -> None:
        """Whole or not at all. Raises StorageFailure."""
        save_document(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return load_document(path, cls.from_json, BadPlan, what="the plan ", remedy="make one with `splitnet plan`")

    def explain(self) -> str:
        """The plan in words and figures, for people."""
        from splitnet.explain import explain  # presentation stands in its own room

        return explain(self)

    def draw(self, path: str | Path, **material: Any) -> None:
        """The plan as a picture: an HTML page, an SVG or a PNG, by the path's suffix. `profile=` and `cluster=`, from which the plan was
        made, let it show more. See `partitioner.drawing.draw`; raises MissingExtra where what draws is not installed."""
        from splitnet.drawing import draw  # found by an entry point: this package knows no planner

        draw(self, path, **material)


def _check(plan: Plan) -> None:
    """Names are unique, every reference resolves, every value that a stage or the client waits for is sent to it exactly once and by
    a stage that comes before, and there is at least one stage."""

    def unique(names: list[str], what: str) -> set[str]:
        seen = set(names)
        if len(seen) != len(names):
            raise BadPlan(f"{what} {next(n for n in names if names.count(n) > 1)!r} stands twice in the plan")
        return seen

    if not plan.stages:
        raise BadPlan("the plan has no stage")
    if plan.max_in_flight < 1:
        raise BadPlan(f"max_in_flight must be at least 1, got {plan.max_in_flight}")
    _ = plan.batch_axes  # there is a batch, if it is to be used
    if plan.generation is not None:
        _check_generation(plan, plan.generation)
    nodes = unique([n.name for n in plan.nodes], "node")
    unique([s.name for s in plan.stages], "stage")
    unique([t.name for t in plan.inputs], "input")
    unique([o.spec.name for o in plan.outputs], "output")
    order = {stage.name: i for i, stage in enumerate(plan.stages)}
    available = {CLIENT: {t.name for t in plan.inputs}}
    awaited = {CLIENT: {o.value for o in plan.outputs}}
    for stage in plan.stages:
        if not stage.name:
            raise BadPlan("a stage has no name")
        if stage.node not in nodes:
            raise BadPlan(f"stage {stage.name!r} is on node {stage.node!r}, which the plan does not list")
        for replica in stage.replicas:
            if replica not in nodes or replica == stage.node:
                raise BadPlan(
                    f"stage {stage.name!r}: replica {replica!r} is "
                    + ("its own node" if replica == stage.node else "not listed by the plan")
                )
        unique(list(stage.replicas), f"stage {stage.name!r}: replica")
        available[stage.name] = unique([t.name for t in stage.outputs], f"stage {stage.name!r}: output")
        awaited[stage.name] = unique([t.name for t in stage.inputs], f"stage {stage.name!r}: input")
    sent: dict[str, list[str]] = {name: [] for name in awaited}
    for transfer in plan.transfers:
        where = f"transfer {transfer.source or 'client'!r} -> {transfer.target or 'client'!r}"
        _check_codecs(transfer, where)
        if transfer.source not in available or transfer.target not in awaited:
            raise BadPlan(f"{where}: no such stage")
        if transfer.source and transfer.target and order[transfer.source] >= order[transfer.target]:
            raise BadPlan(f"{where}: goes backwards")
        for tensor in transfer.tensors:
            if tensor not in available[transfer.source]:
                raise BadPlan(f"{where}: {tensor!r} is not an output of the source")
            if tensor not in awaited[transfer.target]:
                raise BadPlan(f"{where}: {tensor!r} is not awaited by the target")
            sent[transfer.target].append(tensor)
    for target, tensors in sent.items():
        unique(tensors, f"tensor sent to {target or 'client'!r}:")
        missing = sorted(awaited[target] - set(tensors))
        if missing:
            raise BadPlan(f"nothing sends {missing[0]!r} to {target or 'the client'!r}")
    check_noise(plan)


def _check_generation(plan: Plan, generation: Generation) -> None:
    """A chain, and figures for each of its stages."""
    if plan.batching.on:
        raise BadPlan(
            "steps of sessions that generate are joined by the nodes themselves", remedy="leave --max-batch and --microbatch away"
        )
    names = [stage.name for stage in plan.stages]
    if lacking := [name for name in names if name not in generation.kv_bytes_per_token]:
        raise BadPlan(f"generation.kv_bytes_per_token: nothing is said of stage {lacking[0]!r}")
    chain = set(zip(["", *names], [*names, ""], strict=True))
    for transfer in plan.transfers:
        if (transfer.source, transfer.target) not in chain:
            raise BadPlan(
                f"transfer {transfer.source or 'client'!r} -> {transfer.target or 'client'!r}: stages that generate are a chain, each sends to the next"
            )


def _check_codecs(transfer: Transfer, where: str) -> None:
    names = [option.name for option in transfer.codecs]
    if names and (transfer.codec not in names or len(set(names)) != len(names)):
        raise BadPlan(f"{where}: `codecs` must name each codec once, and {transfer.codec!r} among them; they are {', '.join(names)}")
    for option in transfer.codecs:
        figures = (option.ratio, option.encode_bytes_per_s, option.decode_bytes_per_s)
        if not all(0 < figure < math.inf for figure in figures):
            raise BadPlan(f"{where}: codec {option.name!r}: expected positive, finite figures, got {figures}")
