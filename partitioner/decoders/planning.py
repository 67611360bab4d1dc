"""A decoder model's profile and a cluster in, the best plan for generating out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from partitioner.asked import Asked, check_asked
from partitioner.decoders.chain import Chain, ChainPlan, Costs, Found, best_chain, price
from partitioner.decoders.costs import Setting
from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.lacking import why_nothing_fits
from partitioner.decoders.model import FORMATS, DecoderModel
from partitioner.decoders.outcome import Choice, batches, make_plan
from partitioner.decoders.weights import Weights
from partitioner.worthwhile import MARGIN, why_alone, worth_splitting
from splitnet.cluster import Cluster, ClusterNode
from splitnet.errors import BadInput, BadPlan, NoPlan
from splitnet.plan import Plan

__all__ = ["OBJECTIVES", "plan_decoder"]

#: What to make best: the time to the first token, the time per token after it, the tokens of all sessions per second, the time of a whole answer.
OBJECTIVES = ("ttft", "tpot", "throughput", "latency")
_Score: TypeAlias = Callable[[float, float], float]
_MOST_NODES = 8  # that are planned over: the exact search doubles with each
_COARSER_GAIN = 0.01  # by how much rounding to bfloat16 must make a plan better to be chosen over float32


def plan_decoder(
    model: DecoderModel,
    profile: DecoderProfile,
    cluster: Cluster,
    workload: Workload,
    *,
    objective: str = "tpot",
    weights: Weights | None = None,
    margin: float = MARGIN,
    at: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
    **asked: Any,
) -> Plan:
    """The plan that is predicted to be best for the objective; one machine alone is always among the candidates. `asked`: the wishes of `partitioner.plan`, but for those about
    calibrated codecs and private inputs. A stage's weights are in the finest format among those that are quickest there and fit.

    Exact over all orders of nodes, cuts, formats and codecs within the cost model, for up to eight nodes (beyond, over the eight quickest and those that wishes name); `prediction.bound` says what
    is proven. Raises BadInput, BadModel (a context that the model does not have), BadPlan (the profile of another model), NoPlan saying what is missing where.
    """
    weights = weights or Weights()
    if objective not in OBJECTIVES:
        raise BadInput(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if profile.structure.sha256 != model.sha256:
        raise BadPlan(f"the profile is of another model ({profile.structure.name})", remedy="profile this model again")
    if workload.context_length > model.longest_context:
        raise BadInput(f"a context of {workload.context_length} tokens: {model.name!r} was made for {model.longest_context} at most")
    for name in ("private", "codecs"):
        if asked.pop(name, None):
            raise BadInput(f"{name} cannot be asked for with a model that generates", remedy="pin layers to a node instead")
    asked.pop("max_accuracy_loss", None)
    tolerance = asked.pop("tolerance", 0.0)
    beforehand = check_asked(cluster, at=at, nodes=nodes, tolerance=tolerance, margin=margin, **asked)
    refused: NoPlan | None = None
    for formats in weights.rounds(model.checkpoint.dtype):
        best: Choice | None = None
        for dtype in _dtypes(formats, model):
            for setting in _settings(model, profile, cluster, workload, beforehand, dtype, formats, bool(asked.get("lossless")), at):
                found = _best(setting, objective, margin)
                if found is None:
                    refused = why_nothing_fits(setting)  # the last one, with the coarsest formats, lacks least
                elif best is None or found.found.score < best.found.score * (1 - _COARSER_GAIN):
                    best = found
        if best is not None and len(best.setting.nodes) < len(beforehand.chosen) and at is None:
            note = f"planned over {len(best.setting.nodes)} of {len(beforehand.chosen)} nodes: {', '.join(best.setting.names)}"
            best = replace(best, found=replace(best.found, bound=0.0), note="; ".join(filter(None, (best.note, note))))
        if best is not None:
            return make_plan(best, objective, weights)
    raise refused or NoPlan(
        f"the profile has no figures of weights in {weights.wanted}", remedy="profile the model again, with --weights as here"
    )


def _dtypes(formats: Sequence[str], model: DecoderModel) -> list[str]:
    """What may be computed in, the finer first: what matrices that are not quantised have. A model of 16 bits gains nothing from more but speed where a processor has
    no instructions for bfloat16."""
    plain = [form for form in formats if form in ("float32", "bfloat16")]
    if plain:
        return sorted(plain, reverse=model.checkpoint.dtype == "float32")
    return ["float32", "bfloat16"] if model.checkpoint.dtype == "float32" else ["bfloat16", "float32"]


def _settings(
    model: DecoderModel, profile: DecoderProfile, cluster: Cluster, workload: Workload, beforehand: Asked, dtype: str, formats: Collection[str],
    lossless: bool, at: Sequence[str] | None,
) -> Iterator[Setting]:  # fmt: skip
    """One; or, where nodes are too many, one with the quickest and one with the largest of them."""
    nodes = beforehand.chosen if at is None else beforehand.chosen[: len(at) + 1]
    able = tuple(f for f in FORMATS if f in formats and (f == dtype or f in ("int8", "int4")))
    measured = tuple(f for f in able if any(f"{dtype}/{f}" in profile.on(node) for node in nodes))
    if not measured:
        return

    def quickness(node: ClusterNode) -> float:
        times = profile.on(node).get(f"{dtype}/{measured[0]}")
        return math.inf if times is None else sum(times.decode[0])

    def room(node: ClusterNode) -> tuple[float, float]:
        return -(node.memory_bytes or math.inf), quickness(node)

    wishes = beforehand.wishes
    named = {*wishes.pin.values(), wishes.input_at, wishes.output_at}
    orders = (quickness, room) if len(nodes) > _MOST_NODES and at is None else (quickness,)
    for order in orders:
        taken = nodes
        if len(orders) > 1:
            taken = tuple(sorted(nodes, key=lambda node, order=order: (node.name not in named, order(node)))[:_MOST_NODES])  # type: ignore[misc]
        cuts = None if at is None else tuple(at)
        yield Setting(model, profile, cluster, taken, wishes, workload, dtype, measured, beforehand.stages, lossless, cuts)


def _best(setting: Setting, objective: str, margin: float) -> Choice | None:
    """None where nothing fits."""
    found: list[tuple[Found, int, Chain]] = []
    score: _Score = max
    alone: tuple[ChainPlan | None, ...] = (None,) * len(setting.nodes)
    alone_s = math.inf
    for batch, stages in _cases(setting, objective):
        chain, score = _question(setting, objective, batch, stages)
        if stages in (None, 1):
            plans = _alone(chain)
            least = min((score(one.latency_s, one.bottleneck_s) for one in plans if one is not None), default=math.inf)
            if least < alone_s:
                alone, alone_s = plans, least
        best = best_chain(chain, score)
        if best is not None:
            found.append((best, batch, chain))
    if not found:
        return None
    best, batch, _ = min(found, key=lambda each: each[0].score)
    best = replace(best, bound=min(each.bound for each, _, _ in found))
    if len(best.plan.order) > 1 and 1 in setting.counts and math.isfinite(alone_s) and not worth_splitting(best.score, alone_s, margin):
        single = [each for each in alone if each is not None]
        quickest = min(single, key=lambda one: _score_alone(setting, objective, one))
        note = why_alone(setting.names[quickest.order[0]], best.score, alone_s, margin)
        return Choice(setting, Found(quickest, alone_s, best.bound), batch, alone, note)
    return Choice(setting, best, batch, alone)


def _score_alone(setting: Setting, objective: str, plan: ChainPlan) -> float:
    """Of the plan of one node, at its best batch."""
    scores = []
    for batch, stages in _cases(setting, objective):
        if stages in (None, 1):
            chain, score = _question(setting, objective, batch, stages)
            priced = price(chain, plan.cuts, plan.order, plan.formats, plan.codecs)
            scores.append(score(priced.latency_s, priced.bottleneck_s))
    return min(scores)


def _cases(setting: Setting, objective: str) -> Iterator[tuple[int, int | None]]:
    """(sessions in a pass, stages) to be looked at one by one: how a prompt is divided depends on the stages."""
    if objective == "throughput":
        yield from ((batch, None) for batch in batches(setting.workload.sessions))
    elif objective == "tpot":
        yield 1, None
    else:
        yield from ((1, stages) for stages in sorted(setting.counts))


def _question(setting: Setting, objective: str, batch: int, stages: int | None) -> tuple[Chain, _Score]:
    """The chain to solve, and what its plans are judged by: seconds of what the objective counts; for throughput, of one token of all sessions, by sessions."""
    work, one = setting.workload, setting.decode(1)
    if objective == "throughput":
        groups, several = math.ceil(work.sessions / batch), setting.decode(batch)
        chain = setting.chain(setting.costs(several, "latency"), setting.costs(several, "throughput"))
        return chain, lambda latency_s, pace_s: max(latency_s, groups * pace_s) / work.sessions
    if stages is None:
        return setting.chain(setting.costs(one, "latency"), setting.costs(one, "throughput")), lambda latency_s, _: latency_s
    prefill, waits = setting.prefill(stages), setting.chunks(stages) - 1
    latency = setting.costs(prefill, "latency")
    if objective == "latency":
        latency = _sum(latency, setting.costs(one, "latency"), work.answer_tokens - 1)
    return setting.chain(latency, setting.costs(prefill, "throughput"), stages), lambda latency_s, pace_s: latency_s + waits * pace_s


def _sum(a: Costs, b: Costs, times: int) -> Costs:
    """Of one pass `a` and `times` passes `b`."""
    return replace(a, **{name: getattr(a, name) + (times * getattr(b, name) if times else 0.0) for name in a.__dataclass_fields__})


def _alone(chain: Chain) -> tuple[ChainPlan | None, ...]:
    """What each node alone would do, in its quickest format that fits."""
    found: list[ChainPlan | None] = []
    for node in range(chain.nodes):
        plans = [price(chain, (0, chain.length), (node,), (f,), ()) for f in range(chain.latency.vertices.shape[1])]
        able = [plan for plan in plans if math.isfinite(plan.latency_s)]
        found.append(min(able, key=lambda plan: plan.latency_s, default=None))
    return tuple(found)
