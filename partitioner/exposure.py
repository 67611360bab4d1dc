"""What the first cut shows and what hiding it costs: per cut, how large samples' activations are, what the task loses by noise, and what an attacker still sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partitioner.calibrating import OnProgress, Task
from partitioner.cut_points import CutPoint, chosen_cuts, cut_at
from partitioner.inversion import MOST_VALUES, Likeness, invert, likeness
from partitioner.metrics import Sums
from partitioner.splitting import SplitModel, from_array, to_array
from splitnet.batching import find_batch_axes
from splitnet.errors import BadInput, BadPlan
from splitnet.noise import FLOATS, Noise
from splitnet.releasing import release

__all__ = ["PERCENTILES", "Exposed", "Exposure", "measure_exposure"]

PERCENTILES = (50, 90, 99)
_LEAST = 32  # samples, of which an attacker learns from three quarters


@dataclass(frozen=True)
class Exposed:
    """With this noise. `loss`: the metric's. `seen`: how like the inputs the attacker's reconstructions are; None where it was not tried."""

    epsilon: float  # inf: no noise
    sigma: float
    loss: float
    seen: Likeness | None


@dataclass(frozen=True)
class Exposure:
    """One cut. `norms`: percentiles of the samples' norms, over all that crosses. `barred`: why noise cannot be added here, and there is one `Exposed` then, without. `exposed`: first
    without noise, then by falling epsilon."""

    after: str
    scope: str
    tensors: tuple[str, ...]
    values: int  # of one sample
    norms: tuple[float, ...]
    clip_norm: float
    exposed: tuple[Exposed, ...]
    guessed: Likeness | None  # when all is taken for the mean input
    barred: str = ""


def measure_exposure(
    task: Task,
    epsilons: Sequence[float],
    *,
    delta: float,
    clip_norm: float | None = None,
    cuts: int = 6,
    at: Sequence[str] = (),
    attack: bool = True,
    on_progress: OnProgress | None = None,
) -> list[Exposure]:
    """Of so many cuts (see `partitioner.cut_points`), and of those before each operator or module in `at`. `clip_norm`: None takes the 90th percentile of these samples' norms,
    for each cut its own. Raises BadInput where the model does not treat samples one by one, and for figures that make no noise."""
    structure = task.model.structure
    points = {point.tensors: point for point in ((() if at else chosen_cuts(structure, cuts)) + cut_at(structure, at))}
    found = []
    for done, point in enumerate(points.values()):
        if on_progress:
            on_progress(done, len(points), f"the cut after {point.before}")
        found.append(_Cut(task, point).measure(sorted(epsilons, reverse=True), delta, clip_norm, attack))
    return found


class _Cut:
    def __init__(self, task: Task, point: CutPoint) -> None:
        self.task, self.point = task, point
        self.split = SplitModel(task.model, point.layout)
        self.specs = {name: task.model.structure.value[name] for name in point.tensors}
        self.barred = next(
            (
                f"{name} is {spec.dtype}, and noise is for floating-point numbers"
                for name, spec in self.specs.items()
                if spec.dtype not in FLOATS
            ),
            "",
        )
        self.axes: dict[str, int] = {}
        try:
            self.axes = dict(find_batch_axes(task.model.structure.inputs, self.specs).outputs)
        except BadPlan as error:
            self.barred = self.barred or error.message

    def measure(self, epsilons: Sequence[float], delta: float, clip_norm: float | None, attack: bool) -> Exposure:
        crossing = [self._first(batch.inputs) for batch in self.task.samples.batches]
        inputs = self._attacked() if attack else None
        flat = self._flat(crossing) if self.axes else None
        norms = np.linalg.norm(flat.astype(np.float64), axis=1) if flat is not None else np.zeros(1)
        spread = tuple(float(np.percentile(norms, p)) for p in PERCENTILES)
        bound = clip_norm or max(spread[1], 1e-6)
        plain = Exposed(math.inf, 0.0, 0.0, None)
        guessed = None
        if inputs is not None and flat is not None:
            learn, test = _apart(len(flat))
            guessed = likeness(inputs[test], np.broadcast_to(inputs[learn].mean(0), inputs[test].shape))
            plain = replace(plain, seen=likeness(inputs[test], invert(flat[learn], inputs[learn], flat[test])))
        exposed = [plain]
        if not self.barred:
            self._check_alone(crossing[0])
            for epsilon in epsilons:
                noise = Noise(epsilon, delta, bound)
                noised = [{**values, **release(values, noise, self.axes)} for values in crossing]
                seen = None
                if inputs is not None:
                    dim = self._flat(noised)
                    seen = likeness(inputs[test], invert(dim[learn], inputs[learn], dim[test]))
                exposed.append(Exposed(epsilon, noise.sigma, self._loss(noised), seen))
        values = 0 if flat is None else flat.shape[1]
        point = self.point
        scope = self.task.model.structure.vertex[point.before].scope
        return Exposure(point.before, scope, point.tensors, values, spread, bound, tuple(exposed), guessed, self.barred)

    def _first(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        kinds = self.task.model.kinds
        made = self.split.run_stage(self.split.stages[0], {name: from_array(array, kinds[name]) for name, array in inputs.items()})
        return {name: to_array(made[name]) for name in self.point.tensors}

    def _loss(self, noised: Sequence[Mapping[str, np.ndarray]]) -> float:
        task, kinds = self.task, self.task.model.kinds
        total: Sums | None = None
        for batch, arrays in zip(task.samples.batches, noised, strict=True):
            given = {name: from_array(array, kinds[name]) for name, array in batch.inputs.items()}
            values = given | self.split.run_stage(self.split.stages[0], given)
            values |= {name: from_array(array, kinds[name]) for name, array in arrays.items()}
            values |= self.split.run_stage(self.split.stages[1], values)
            sums = task.metric.sums(batch, task.whole(batch), self.split.answers(values)[task.output])
            total = sums if total is None else total + sums
        assert total is not None, "there is one batch at least"
        return task.metric.loss(total)

    def _flat(self, crossing: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """(samples, values)."""
        rows = [
            np.concatenate(
                [np.moveaxis(values[n], a, 0).reshape(values[n].shape[a], -1).astype(np.float32) for n, a in self.axes.items()], axis=1
            )
            for values in crossing
        ]
        return np.concatenate(rows)

    def _attacked(self) -> np.ndarray | None:
        """The inputs, where an attacker can be trained: one input, of floats, of fixed size, and samples enough."""
        batches, specs = self.task.samples.batches, self.task.model.structure.inputs
        if len(specs) != 1 or specs[0].dtype not in FLOATS or not self.axes:
            return None
        inputs = [batch.inputs[specs[0].name] for batch in batches]
        if len({array.shape[1:] for array in inputs}) != 1 or inputs[0][0].size > MOST_VALUES or self.task.samples.count < _LEAST:
            return None
        return np.concatenate(inputs).astype(np.float32)

    def _check_alone(self, crossing: Mapping[str, np.ndarray]) -> None:
        """The first stage makes of a sample the same, whatever stands beside it; else noise per sample would promise what it does not keep."""
        batch = self.task.samples.batches[0]
        if len(next(iter(batch.inputs.values()))) < 2:
            return
        turned = self._first({name: np.ascontiguousarray(np.roll(array, 1, axis=0)[:-1]) for name, array in batch.inputs.items()})
        for name, axis in self.axes.items():
            there = np.roll(np.moveaxis(crossing[name], axis, 0), 1, axis=0)[:-1].astype(np.float64)
            here = np.moveaxis(turned[name], axis, 0).astype(np.float64)
            if here.shape != there.shape or np.abs(here - there).max() > 1e-3 * (1 + np.abs(there).max()):
                raise BadInput(
                    f"what the model makes of a sample depends on the others in its batch (value {name!r}): noise per sample would not keep its promise",
                    remedy="plan with --noise-per request",
                )


def _apart(count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the attacker learns from, and what it attacks."""
    order = np.random.default_rng(0).permutation(count)
    return order[count // 4 :], order[: count // 4]
