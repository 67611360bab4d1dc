"""A plan of a model that generates, made again, priced and cut while it is followed (`splitnet watch`)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partitioner.decoders.chain import ChainPlan
from partitioner.decoders.costs import Setting
from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.model import DecoderModel
from partitioner.decoders.outcome import expected_of, objective_s
from partitioner.decoders.planning import plan_decoder
from partitioner.decoders.weights import Weights
from partitioner.decoders.writing import cut_decoder, span_of
from partitioner.solvers.constraints import Constraints
from splitnet.cluster import Cluster
from splitnet.errors import BadPlan
from splitnet.generation_plan import Generation
from splitnet.plan import CLIENT, Plan
from splitnet.shard import Shard

__all__ = ["DecoderFollower", "price_decoder", "workload_of"]


def workload_of(plan: Plan, profile: DecoderProfile) -> Workload:
    """What the plan was made for. Raises BadPlan where it does not say, or the profile was measured for something else."""
    expected = _generation(plan).expected
    if expected is None:
        raise BadPlan("the plan predicts nothing of generating", remedy="make it with `splitnet plan MODEL --generate`")
    work = Workload(
        _generation(plan).context_length, expected.sessions, expected.prompt_tokens, expected.answer_tokens, profile.chunk_tokens
    )
    if work.cached_tokens != profile.cached_tokens:
        raise BadPlan(
            f"the profile was measured with {profile.cached_tokens} tokens cached, the plan is for {work.cached_tokens}",
            remedy="give the profile that the plan was made from, or profile again with the plan's --prompt-tokens and --answer-tokens",
        )
    return work


def price_decoder(model: DecoderModel, profile: DecoderProfile, cluster: Cluster, plan: Plan) -> float:
    """The objective's seconds of a plan on this cluster, as `plan_decoder` reckons; infinite where it cannot serve there."""
    generation, names = _generation(plan), {node.name for node in cluster.nodes}
    order = tuple(stage.node for stage in plan.stages)
    if not set(order) <= names:
        return math.inf
    spans = [span_of(model, stage) for stage in plan.stages]
    forms = tuple(generation.weights[stage.name] for stage in plan.stages)
    formats = tuple(dict.fromkeys(forms))
    codecs = tuple(t.codec for t in plan.transfers if CLIENT not in (t.source, t.target))
    links = {pair: (codec,) for pair, codec in zip(itertools.pairwise(order), codecs, strict=True)}
    setting = Setting(
        model, profile, cluster, tuple(cluster.node(name) for name in order), Constraints(link_codecs=links), workload_of(plan, profile),
        generation.dtype, formats, range(1, len(order) + 1),
    )  # fmt: skip
    if not set(codecs) <= set(setting.codecs):
        return math.inf
    chain_plan = ChainPlan(
        0.0, 0.0, (*(a for a, _ in spans), spans[-1][1]), tuple(range(len(order))), tuple(formats.index(form) for form in forms),
        tuple(setting.codecs.index(codec) for codec in codecs),
    )  # fmt: skip
    expected, _, _ = expected_of(setting, chain_plan)
    return objective_s(expected, plan.objective) if math.isfinite(expected.ttft_s + expected.tpot_s) else math.inf


class DecoderFollower:
    """New plans have weights in `weights`; "": in the present plan's format, where all its stages have the same, else as `auto` has it. `dry`: nothing is cut."""

    def __init__(self, model: DecoderModel, profile: DecoderProfile, *, weights: str = "", dry: bool = False) -> None:
        if model.sha256 != profile.structure.sha256:
            raise BadPlan("the profile is of another model", remedy="profile this model")
        self._model = model
        self._weights = weights
        self.can_cut = not dry

    def price(self, plan: Plan, profile: DecoderProfile, cluster: Cluster) -> float:
        return price_decoder(self._model, profile, cluster, plan)

    def plan(self, present: Plan, profile: DecoderProfile, cluster: Cluster, asked: Mapping[str, Any]) -> Plan:
        forms = set(_generation(present).weights.values())
        weights = Weights(self._weights or (forms.pop() if len(forms) == 1 else "auto"))
        work = workload_of(present, profile)
        best = plan_decoder(self._model, profile, cluster, work, objective=present.objective, weights=weights, **asked)
        return dataclasses.replace(best, model=present.model, batching=present.batching, max_in_flight=present.max_in_flight)

    def cut(self, plan: Plan, folder: Path) -> Mapping[str, Shard]:
        return cut_decoder(self._model, plan, folder)


def _generation(plan: Plan) -> Generation:
    if plan.generation is None:
        raise BadPlan(f"the plan of {plan.model!r} generates nothing", remedy="give the plan of a model that generates")
    return plan.generation
