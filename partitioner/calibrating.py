"""calibrate: what a task loses at each cut with each codec, on the user's own samples; and what it loses by a whole plan.

For each batch the whole model runs once, and for each cut its first part once; then what crosses goes through each codec (chunked as on the
wire) into the second part. Codecs whose results are the same bytes share one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from partitioner.calibration import Calibration, CodecLoss, CutLoss
from partitioner.calibration_cache import CalibrationCache
from partitioner.cut_points import CutPoint, chosen_cuts, cut_at
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out_again
from partitioner.metrics import Metric, Sums, find_metric, judged_output
from partitioner.samples import Batch, Samples
from partitioner.splitting import SplitModel, from_array, to_array, travel
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput, BadPlan
from splitnet.plan import CLIENT, Plan

__all__ = ["CUTS", "OnProgress", "Task", "calibrate"]

CUTS = 16  #: cuts that are measured unless told otherwise
_BY_HISTORY = ("delta",)  # what it loses and takes depends on the frames before, and samples are no stream
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Task:
    """A model, samples of what it is for, and how its answers are judged. Raises BadInput where these do not fit."""

    model: ModelGraph
    samples: Samples
    metric: Metric
    output: str
    _whole: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def make(cls, model: ModelGraph, samples: Samples, metric: str, output: str = "") -> Task:
        return cls(model, samples, find_metric(metric), judged_output(model.structure.outputs, metric, output))

    def whole(self, batch: Batch) -> np.ndarray:
        """The whole model's answers. Raises BadInput where they are no numbers."""
        answers = to_array(self.model.run({name: from_array(array) for name, array in batch.inputs.items()})[self.output])
        if not np.isfinite(answers.astype(np.float64)).all():
            raise BadInput(
                f"the whole model's {self.output!r} is not finite on these samples", remedy="look at the samples, or at the model"
            )
        return answers

    def loss(self, plan: Plan, on_progress: OnProgress | None = None) -> float:
        """What the task loses by a plan: all its cuts and codecs together, on all samples. Within a node nothing is encoded. Raises
        BadPlan for a plan of another model."""
        if plan.model_sha256 != self.model.sha256:
            raise BadPlan(
                f"the plan is for the model {plan.model!r}, not for {self.model.name!r}", remedy="make the plan again for this model"
            )
        split = SplitModel(self.model, lay_out_again(self.model.structure, plan.stages))
        number = {stage.name: k for k, stage in enumerate(plan.stages)}
        node = {stage.name: stage.node for stage in plan.stages}
        codecs = {
            (number[t.source], number[t.target]): t.codec
            for t in plan.transfers
            if CLIENT not in (t.source, t.target) and node[t.source] != node[t.target]
        }
        total: Sums | None = None
        for done, batch in enumerate(self.samples.batches):
            if on_progress:
                on_progress(done, len(self.samples.batches), "the whole plan")
            sums = self.metric.sums(batch, self.whole(batch), split.run(batch.inputs, codecs)[self.output])
            total = sums if total is None else total + sums
        assert total is not None  # there is one batch at least
        return self.metric.loss(total)


def calibrate(
    task: Task,
    *,
    codecs: Sequence[str] | None = None,
    cuts: int = CUTS,
    at: Sequence[str] = (),
    cache: CalibrationCache | None = None,
    refresh: bool = False,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Measures the codecs (default: all but what depends on the frames before) at so many cuts (see `partitioner.cut_points`), and before each operator or module in
    `at`. What the `cache` knows is not measured again, unless `refresh`; the result holds all that is known. Raises BadInput."""
    structure, samples = task.model.structure, task.samples
    names = tuple(codecs) if codecs else tuple(name for name in codec_names() if name not in _BY_HISTORY)
    for name in names:
        get_codec(name)
    points = {point.tensors: point for point in (*chosen_cuts(structure, cuts), *cut_at(structure, at))}
    known = Calibration(
        model=structure.name, model_sha256=structure.sha256, data=str(samples.path.resolve()), data_sha256=samples.sha256,
        metric=task.metric.name, output=task.output, samples=samples.count, labelled=task.metric.labelled and samples.labelled,
        batch=len(next(iter(samples.batches[0].inputs.values()))), score=0.0, cuts=(), how=f"of each of {cuts} stretches of equal work, the cut with the fewest bytes",
    )  # fmt: skip
    if cache is not None and not refresh and (kept := cache.find(known)) is not None:
        known = dataclasses.replace(kept, data=known.data)
    have = {(cut.tensors, name) for cut in known.cuts for name in cut.codecs}
    wanted = {point: [name for name in names if (point.tensors, name) not in have] for point in points.values()}
    wanted = {point: missing for point, missing in wanted.items() if missing}
    if wanted:
        score, found = _measure(task, wanted, on_progress)
        known = dataclasses.replace(known.merged(found), score=score)
        place = {vertex.name: i for i, vertex in enumerate(structure.vertices)}
        known = dataclasses.replace(known, cuts=tuple(sorted(known.cuts, key=lambda cut: place[cut.after[0]])))
        if cache is not None:
            cache.keep(known)
    return known


@dataclass
class _Measured:
    """One cut: its two parts, and what was seen so far."""

    point: CutPoint
    split: SplitModel
    codecs: Sequence[str]
    raw_bytes: int = 0
    values: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    def see(self, task: Task, batch: Batch, whole: np.ndarray) -> None:
        kinds, split = task.model.kinds, self.split
        first, second = split.stages
        given = {name: from_array(array, kinds[name]) for name, array in batch.inputs.items()}
        made = split.run_stage(first, given)
        crossing = {name: to_array(made[name]) for name in self.point.tensors}
        raw = {name: travel(array, "raw") for name, array in crossing.items()}
        self.raw_bytes += sum(t.sent_bytes for t in raw.values())
        self.values += sum(t.sent_bytes // t.array.itemsize for t in raw.values())
        known = {
            _digest({name: t.array for name, t in raw.items()}): task.metric.sums(batch, whole, whole)
        }  # the same bits, the same answers
        for codec in self.codecs:
            there = {name: travel(array, codec) for name, array in crossing.items()}
            arrays = {name: t.array for name, t in there.items()}
            digest = _digest(arrays)
            if digest not in known:
                arrived: dict[str, Any] = {name: from_array(array, kinds[name]) for name, array in arrays.items()}
                values = given | made | split.run_stage(second, given | arrived)
                known[digest] = task.metric.sums(batch, whole, split.answers(values)[task.output])
            self.sent[codec] = self.sent.get(codec, 0) + sum(t.sent_bytes for t in there.values())
            self.sums[codec] = known[digest] if codec not in self.sums else self.sums[codec] + known[digest]

    def result(self, task: Task) -> CutLoss:
        structure = task.model.structure
        return CutLoss(
            self.point.after, self.point.tensors, structure.vertex[self.point.before].scope, self.raw_bytes, self.values,
            {name: CodecLoss(float(task.metric.loss(self.sums[name])), self.sent[name]) for name in self.codecs},
        )  # fmt: skip


def _measure(task: Task, wanted: Mapping[CutPoint, Sequence[str]], on_progress: OnProgress | None) -> tuple[float, list[CutLoss]]:
    """(the whole model's score, the cuts). Batch by batch, so that no more than one batch's answers are held."""
    measured = [_Measured(point, SplitModel(task.model, point.layout), names) for point, names in wanted.items()]
    total: Sums | None = None
    for done, batch in enumerate(task.samples.batches):
        whole = task.whole(batch)
        sums = task.metric.sums(batch, whole, whole)
        total = sums if total is None else total + sums
        for k, cut in enumerate(measured):
            if on_progress:
                on_progress(done * len(measured) + k, len(task.samples.batches) * len(measured), f"the cut after {cut.point.before}")
            cut.see(task, batch, whole)
    assert total is not None  # there is one batch at least
    return float(task.metric.score(total)), [cut.result(task) for cut in measured]


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        digest.update(str((array.dtype, array.shape, array.strides)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.digest()
