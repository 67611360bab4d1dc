"""Which codecs a plan may use, and the plan that keeps to the loss that is allowed.

Without a calibration: lossless codecs, and those that round as bfloat16 does (`Codec.default`). With one: all that were measured, under a budget.
Losses of several cuts do not simply add up, so a plan that was chosen by their sum is measured once more as a whole, and where it loses
too much it is chosen again with a smaller budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from partitioner.calibration import Calibration
from partitioner.constants import codec_figures
from partitioner.cost import CodecFigures
from partitioner.structure import Structure
from splitnet.cluster import ClusterNode
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, Plan

__all__ = ["Choice", "MeasureLoss", "choices", "lossy_links", "within"]

MeasureLoss = Callable[[Plan], float]
_ROUNDS = 8  # budgets that are tried; then lossless


@dataclass(frozen=True)
class Choice:
    """The codecs to choose from: those without loss, and all. `budget`: None where none was set."""

    safe: Mapping[str, CodecFigures]
    every: Mapping[str, CodecFigures]
    budget: float | None
    calibration: Calibration | None = None


def choices(
    nodes: Sequence[ClusterNode], structure: Structure, *, lossless: bool, calibration: Calibration | None, budget: float | None
) -> Choice:
    """Of the codecs whose speed every node has measured. Raises BadInput for a budget without a calibration, BadPlan for one of another model."""
    known = set(codec_names())
    figures = {name: found for name, found in codec_figures(nodes).items() if name in known}
    if calibration is not None:
        figures = calibration.figures(structure, figures)
    safe = {name: found for name, found in figures.items() if get_codec(name).lossless}
    if lossless:
        return Choice(safe, safe, None, calibration)
    if budget is None:
        return Choice(safe, {name: found for name, found in figures.items() if name in safe or get_codec(name).default}, None, calibration)
    if calibration is None:
        if budget > 0:
            raise BadInput(
                f"max_accuracy_loss {budget:g}: what the codecs cost this model in accuracy was not measured",
                remedy="run `splitnet calibrate` with your own samples",
            )
        return Choice(safe, safe, None)
    measured = set(calibration.codecs)
    return Choice(safe, {name: found for name, found in figures.items() if name in safe or name in measured}, budget, calibration)


def within(
    best: Callable[[Mapping[str, CodecFigures], float | None], Plan], choice: Choice, structure: Structure, *, tolerance: float,
    measure: MeasureLoss | None, forced: bool = False,
) -> Plan:  # fmt: skip
    """The best plan whose loss keeps to the budget. `best(codecs, budget)` makes one for a sum of losses; `measure` gives what a plan really loses
    (None: it is not measured, and the plan says so). A codec with loss is taken only where it is better than the best lossless plan by more
    than `tolerance`, unless `forced`: a link may use nothing else. Raises what `best` raises."""
    if choice.every.keys() == choice.safe.keys():
        return best(choice.safe, None)
    lossless: Plan | None = None
    limit, tried, loss = choice.budget, 0, 0.0
    while tried < _ROUNDS:
        try:
            plan = best(choice.every, limit)
        except NoPlan:
            if not tried:
                raise
            break  # the links that must use a codec with loss cannot keep to so little
        if not lossy_links(plan):
            return plan
        if lossless is None and not forced:
            lossless = _lossless(best, choice)
        if lossless is not None and _objective_s(lossless) <= _objective_s(plan) * (1 + tolerance):
            return lossless
        if choice.budget is None or choice.calibration is None:
            return plan
        predicted = _predicted(plan, choice.every, structure)
        if measure is None:
            return _told(
                plan,
                0.0,
                "",
                f"its cuts lose {predicted:.3g} of {choice.calibration.metric} when measured one by one; the plan was not measured as a whole",
            )
        loss = measure(plan)
        if loss <= choice.budget:
            unit = "sample" if choice.calibration.samples == 1 else "samples"
            judged = f"{choice.calibration.metric} on {choice.calibration.samples} {unit}"
            note = f"{tried} other{'s were' if tried > 1 else ' was'} better, and lost more than {choice.budget:.3g}" if tried else ""
            return _told(plan, max(loss, 0.0), f"{judged}; {choice.budget:.3g} allowed", note)
        tried += 1
        limit = min(limit or 0.0, predicted) * min(choice.budget / loss, 1.0 - 1e-6)
        if not limit > 0:
            break
    if lossless is None:
        raise NoPlan(
            f"every plan that was tried loses more than {choice.budget or 0.0:g}: the last one {loss:.3g}",
            remedy="allow more with --max-accuracy-loss, or other codecs on the links",
        )
    return lossless


def lossy_links(plan: Plan) -> list[tuple[str, str, str]]:
    """(from, to, codec) of the links on which the plan's codec changes bits."""
    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
    used = [(node[t.source], node[t.target], t.codec) for t in plan.transfers if node[t.source] != node[t.target]]
    return [(a, b, codec) for a, b, codec in dict.fromkeys(used) if not get_codec(codec).lossless]


def _lossless(best: Callable[[Mapping[str, CodecFigures], float | None], Plan], choice: Choice) -> Plan | None:
    try:
        return best(choice.safe, None)
    except NoPlan:
        return None


def _objective_s(plan: Plan) -> float:
    assert plan.prediction is not None  # every plan that is made has one
    return plan.prediction.latency_s if plan.objective == "latency" else 1.0 / plan.prediction.throughput_per_s


def _predicted(plan: Plan, figures: Mapping[str, CodecFigures], structure: Structure) -> float:
    """The sum over the plan's transfers, as the cost model counts it."""
    node = {stage.name: stage.node for stage in plan.stages}
    return math.fsum(
        max(figures[t.codec].error_of(structure.producer[tensor].name) for tensor in t.tensors)
        for t in plan.transfers
        if CLIENT not in (t.source, t.target) and node[t.source] != node[t.target] and t.bytes
    )


def _told(plan: Plan, loss: float, loss_of: str, note: str) -> Plan:
    assert plan.prediction is not None  # every plan that is made has one
    notes = "; ".join(text for text in (plan.prediction.note, note) if text)
    return dataclasses.replace(plan, prediction=dataclasses.replace(plan.prediction, loss=loss, loss_of=loss_of, note=notes))
