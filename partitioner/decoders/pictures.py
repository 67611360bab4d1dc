"""Pictures of a plan that generates, by the drawings of other plans: what passes its pipeline is a step of decoding with one session."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.model import DecoderModel
from partitioner.decoders.planning import plan_decoder
from partitioner.decoders.weights import Weights
from partitioner.drawing import draw
from partitioner.profiling import HERE, Column, Profile
from splitnet.cluster import Cluster
from splitnet.errors import BadPlan
from splitnet.plan import CLIENT, Plan
from splitnet.tensors import DTYPES

__all__ = ["draw_generation"]

_ONE_PLAN = ("at", "nodes", "stages", "max_stages")


def draw_generation(
    plan: Plan, path: str | Path, model: DecoderModel, profile: DecoderProfile, cluster: Cluster, work: Workload, weights: Weights, asked: Mapping[str, Any]
) -> None:  # fmt: skip
    """`asked`: the wishes that the plan was made with. Raises as `partitioner.drawing.draw`."""
    generation = plan.generation
    if generation is None:
        raise BadPlan(f"the plan of {plan.model!r} generates nothing", remedy="draw it with `plan.draw`")
    hidden = model.hidden_size * DTYPES[generation.dtype].itemsize
    transfers = tuple(
        dataclasses.replace(t, bytes=8 if t.source == CLIENT else 4 if t.target == CLIENT else hidden) for t in plan.transfers
    )
    wishes = {name: wish for name, wish in asked.items() if name not in _ONE_PLAN}

    def planner(_: Profile, other: Cluster, *, objective: str, **options: Any) -> Plan:
        return plan_decoder(model, profile, other, work, objective=objective, weights=weights, **(wishes | options))

    draw(
        plan, path, profile=_steps(plan, model, profile, cluster, generation.dtype, generation.weights), cluster=cluster, planner=planner,
        shown=dataclasses.replace(plan, transfers=transfers),
    )  # fmt: skip


def _steps(plan: Plan, model: DecoderModel, profile: DecoderProfile, cluster: Cluster, dtype: str, forms: Mapping[str, str]) -> Profile:
    """Seconds of each vertex in a step of one session: on the plan's nodes in their stage's format, elsewhere in the first one's."""
    form = {stage.node: forms[stage.name] for stage in plan.stages}
    first = forms[plan.stages[0].name]
    columns = {}
    for node in cluster.nodes:
        known = profile.on(node)
        times = known.get(f"{dtype}/{form.get(node.name, first)}") or next(iter(known.values()))
        columns[node.name] = Column((0.0, *times.decode[0]), times.how)
    here = columns[plan.ingress.name]
    return Profile(model.structure(1, dtype), {HERE: here, **columns}, "cpu", 1, "", 1, sum(here.seconds), 0.0)
