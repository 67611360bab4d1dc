"""The profile: how long each operator takes, measured; and what it takes on other nodes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitioner.structure import Structure
from splitnet import background
from splitnet.cluster import Cluster, ClusterNode
from splitnet.documents import load_document, save_document
from splitnet.errors import BadInput, BadModel
from splitnet.machine import processor_name
from splitnet.plan import Plan, StageSpec
from splitnet.reference_kernel import measure_reference

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph
    from partitioner.profiling_nodes import Options

__all__ = ["HERE", "PROFILE_VERSION", "Column", "Profile", "matched", "profile"]

PROFILE_VERSION = 1
HERE = ""  #: the column of the machine that profiled
MEASURED_HERE = "measured here"
_WARM_UP = 2
_LARGEST_SHIFT_S = 30e-6


@dataclass(frozen=True)
class Column:
    """Seconds of each vertex (in the structure's order) on one node, at the structure's batch, and `how` they were obtained: "measured
    here", "measured on node ...", or "scaled ..." from here. They are of runs after a pause; runs that follow each other at once take
    `sustained` times as long (caches are warm; a quota of processor time is used up)."""

    seconds: tuple[float, ...]
    how: str
    sustained: float = 1.0


@dataclass(frozen=True)
class Profile:
    """Times and sizes of a model's operators. `columns` holds one column per node by name, and `HERE`.

    Raises BadModel where a column does not fit the structure.
    """

    structure: Structure
    columns: Mapping[str, Column]
    device: str  # the processor that measured
    threads: int
    torch: str
    repeats: int
    whole_s: float  # the median of whole runs; the column HERE adds up to it
    reference_s: float  # the reference kernel here, with the same threads
    spread: float = 0.0  # the median deviation of whole runs from whole_s, as a share of it: much on a busy machine
    version: int = field(default=PROFILE_VERSION)

    def __post_init__(self) -> None:
        if HERE not in self.columns:
            raise BadModel("the profile has no figures measured here")
        for name, column in self.columns.items():
            where = f"the profile's column {name or 'here'!r}"
            if len(column.seconds) != len(self.structure.vertices):
                raise BadModel(f"{where} has {len(column.seconds)} figures for {len(self.structure.vertices)} operators")
            for vertex, seconds in zip(self.structure.vertices, column.seconds, strict=True):
                if not (math.isfinite(seconds) and seconds >= 0):
                    raise BadModel(f"{where}: operator {vertex.name!r} has {seconds} seconds")
            if not 0 < column.sustained < math.inf:
                raise BadModel(f"{where}: `sustained` must be positive, got {column.sustained}")

    def on(self, node: ClusterNode) -> Column:
        """The operators' times on a node: its own column; where there is none, `scaled_to`."""
        return self.columns.get(node.name) or self.scaled_to(node)

    def scaled_to(self, node: ClusterNode) -> Column:
        """The times measured here, scaled by the ratio of the reference kernel's times; where the node's is not known, as they are."""
        here = self.columns[HERE]
        if not node.reference_s or not self.reference_s:
            return Column(here.seconds, "taken as on the machine that profiled: the node's speed is not measured", here.sustained)
        ratio = node.reference_s / self.reference_s
        how = f"scaled by the reference kernel: {ratio:.3g}x of the machine that profiled"
        return Column(tuple(s * ratio for s in here.seconds), how, here.sustained)

    def stage_s(self, node: ClusterNode, plan: Plan, stage: StageSpec) -> float:
        """What one run of a plan's stage takes on a node that is kept busy."""
        column, place = self.on(node), self._place
        return column.sustained * math.fsum(column.seconds[place[operator]] for operator in stage.operators)

    def slowed(self, nodes: Sequence[ClusterNode], factors: Mapping[str, float]) -> Profile:
        """With a column for each of the nodes, its seconds times the node's factor where there is one."""
        columns = dict(self.columns)
        for node in nodes:
            column = self.on(node)
            if (factor := factors.get(node.name)) is not None:
                column = Column(tuple(s * factor for s in column.seconds), f"{column.how}; {factor:.2g}x as seen", column.sustained)
            columns[node.name] = column
        return dataclasses.replace(self, columns=columns)

    @functools.cached_property
    def _place(self) -> Mapping[str, int]:
        return {vertex.name: i for i, vertex in enumerate(self.structure.vertices)}

    def for_cluster(self, cluster: Cluster) -> Profile:
        """The same with a column for each node of the cluster, by scaling."""
        columns = {HERE: self.columns[HERE], **{node.name: self.scaled_to(node) for node in cluster.nodes}}
        return dataclasses.replace(self, columns=columns)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        document = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        document["structure"] = json.loads(self.structure.to_json())
        document["columns"] = {name: dataclasses.asdict(column) for name, column in self.columns.items()}
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Raises BadModel where the document is not a profile of this version."""
        try:
            document: dict[str, Any] = json.loads(text)
            if document.get("version") != PROFILE_VERSION:
                raise BadModel(
                    f"the profile has version {document.get('version')!r}, this splitnet reads version {PROFILE_VERSION}",
                    remedy="profile the model again with `splitnet profile`",
                )
            document["structure"] = Structure.from_json(json.dumps(document["structure"]))
            document["columns"] = {
                str(name): Column(tuple(float(s) for s in column["seconds"]), str(column["how"]), float(column.get("sustained", 1.0)))
                for name, column in document["columns"].items()
            }
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadModel(f"not a profile: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        save_document(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        return load_document(path, cls.from_json, BadModel, what="the profile ", remedy="make one with `splitnet profile`")


def profile(
    model: ModelGraph,
    *,
    repeats: int = 10,
    threads: int = 1,
    cluster: Cluster | None = None,
    options: Options | None = None,
    scale: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Profile:
    """Measures every operator of the model at its example inputs' batch: here, and on each node of the `cluster` (see `profiling_nodes`).

    Here with so many intra-op threads: whole runs and runs with a clock between operators take turns, `repeats` of each after two warm
    ones; medians are kept. The clock's own cost, or the dispatch that it does not see, is spread evenly over the operators, so that they add
    up to the whole run. `scale`: the nodes' columns are this machine's, scaled, and no node is asked. `on_progress(done, total, what)` is
    called as it goes. The thread count of torch is put back afterwards. Raises BadInput for a count below 1, NodeUnavailable.
    """
    import torch

    for name, count in (("repeats", repeats), ("threads", threads)):
        if count < 1:
            raise BadInput(f"{name} must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        each, whole = _measure(model, repeats, on_progress)
    finally:
        torch.set_num_threads(before)
    medians = [statistics.median(each[v.name]) if v.name in each else 0.0 for v in model.structure.vertices]
    whole_s = statistics.median(whole)
    measured = Profile(
        structure=model.structure,
        columns={HERE: Column(tuple(matched(medians, whole_s)), MEASURED_HERE)},
        device=processor_name(),
        threads=threads,
        torch=str(torch.__version__),
        repeats=repeats,
        whole_s=whole_s,
        reference_s=measure_reference(threads).seconds,
        spread=statistics.median(abs(w - whole_s) for w in whole) / whole_s,
    )
    if cluster is None:
        return measured
    if scale:
        return measured.for_cluster(cluster)
    from partitioner.profiling_nodes import Options, measure_columns  # needs a network; reading a profile does not

    columns = background.run(measure_columns(model, cluster, measured, options or Options(), on_progress))
    return dataclasses.replace(measured, columns={HERE: measured.columns[HERE], **columns})


def _measure(
    model: ModelGraph, repeats: int, on_progress: Callable[[int, int, str], None] | None
) -> tuple[dict[str, list[float]], list[float]]:
    each: dict[str, list[float]] = {}
    whole: list[float] = []
    for round_ in range(_WARM_UP + repeats):
        start = time.perf_counter()
        model.run(model.example_inputs)
        took = time.perf_counter() - start
        times: dict[str, float] = {}
        model.run(model.example_inputs, on_vertex=times.__setitem__)
        if round_ >= _WARM_UP:
            whole.append(took)
            for name, seconds in times.items():
                each.setdefault(name, []).append(seconds)
        if on_progress:
            on_progress(round_ + 1, _WARM_UP + repeats, "operators here")
    return each, whole


def matched(seconds: Sequence[float], whole_s: float) -> list[float]:
    """Shifts what was measured by one constant per operator that ran, then scales what is left, so that the sum is `whole_s`. The constant
    is for the clock, or the dispatch that it does not see: microseconds. More than that is time in which the process was held back (a quota), and
    falls on operators as they are long."""
    ran = sum(1 for s in seconds if s > 0)
    if not ran:
        return list(seconds)
    shift = (whole_s - math.fsum(seconds)) / ran
    if abs(shift) > _LARGEST_SHIFT_S:
        shift = 0.0
    # Never below a tenth of its measured time: a constant must not erase a small operator.
    shifted = [max(s + shift, s / 10) if s > 0 else 0.0 for s in seconds]
    scale = whole_s / math.fsum(shifted)
    return [s * scale for s in shifted]
