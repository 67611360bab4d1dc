"""`partitioner.plan`: a profile and a cluster in, the best plan out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from partitioner.accuracy import MeasureLoss, choices, within
from partitioner.alternatives import with_alternatives
from partitioner.asked import check_asked
from partitioner.calibration import Calibration
from partitioner.cost import CodecFigures
from partitioner.draft import Draft
from partitioner.draft_bounds import bound_s, chain_bound_s, cuts_for_two
from partitioner.profiling import Profile
from partitioner.solvers.arguments import check_kinds
from partitioner.solvers.choosing import pipeline_depth
from partitioner.solvers.constraints import matching
from partitioner.solvers.diagnose import why_no_plan
from partitioner.solvers.graphs import check_objective
from partitioner.solvers.linear import alternatives, best_in_order
from partitioner.solvers.placement import Placement, Selected
from partitioner.solvers.problem import Candidate, Objective
from partitioner.solvers.refine import fewest_bytes, refine, thrift_note
from partitioner.worthwhile import MARGIN, why_alone, worth_splitting
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, NoPlan
from splitnet.explain import bytes_text
from splitnet.noise import Noise
from splitnet.plan import Alternative, NodeRef, Plan, Prediction

__all__ = ["plan"]

TOLERANCE = 0.01  #: plans that differ by less are the same to a measurement
_ALONE = "no noise was added: nothing leaves the node but answers"
_REFINED = 60  # placements that local search weighs: each is laid out


def plan(
    profile: Profile,
    cluster: Cluster,
    *,
    objective: str = "latency",
    stages: int | range | None = None,
    max_stages: int | None = None,
    forbid: Collection[str] | Mapping[str, Sequence[str]] = (),
    at: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
    pin: Mapping[str, str] | None = None,
    input_at: str = "",
    output_at: str = "",
    private: tuple[str, int | str] | None = None,
    noise: Noise | None = None,
    taken: Mapping[str, tuple[float, float]] | None = None,
    codecs: Mapping[str, CodecFigures] | None = None,
    link_codecs: Mapping[tuple[str, str], Sequence[str]] | None = None,
    max_accuracy_loss: float | None = None,
    lossless: bool = False,
    calibration: Calibration | None = None,
    measure_loss: MeasureLoss | None = None,
    tolerance: float = TOLERANCE,
    margin: float = MARGIN,
) -> Plan:
    """The plan that is predicted to be best for `objective`, "latency" or "throughput".

    One machine alone is always among the candidates. `stages` asks for exactly so many, or for a range, `max_stages` for at most so many.
    `at` cuts by hand, before each of these operators or modules, in order, and takes the `nodes` in the given order, one more than cuts
    (default: the cluster's first ones). `codecs`: the figures of those to choose from (default: those that all nodes have measured and that are
    lossless, or round as bfloat16 does and make the plan better by more than `tolerance`). `lossless`: only the former. `calibration`: what codecs cost
    this model; with it `max_accuracy_loss` is the share that the plan may lose, and `measure_loss` says what a plan loses as a whole (a
    `partitioner.calibrating.Task` has one): no plan that loses more is returned. `tolerance`: of the plans that are within this share of the best one,
    what sends least is taken. `margin`: where one node alone may serve the model, a split must be predicted to be better by more than this share, because
    predictions err. `noise`: on what leaves the node of `private`; a plan that keeps all on it has none, and says so. The other wishes are those of `partitioner.solvers.constraints.Constraints`; `forbid` takes nodes, or node -> patterns.

    The profile's times are scaled to each node (see `Profile.on`). The candidates are exact over the model's own order of operators with every live
    tensor charged at its cut; the best ones are laid out, evaluated as they will run, and improved by local search. Raises BadInput or
    BadCluster for what does not exist, NoPlan saying what is missing.
    """
    if not isinstance(profile, Profile) or not isinstance(cluster, Cluster):
        raise BadInput(
            f"expected a Profile and a Cluster, got {type(profile).__name__} and {type(cluster).__name__}",
            remedy="make them with `partitioner.profile` and `splitnet.Cluster.load`",
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise BadInput(
            f"calibration: expected a Calibration, got {type(calibration).__name__}", remedy="make one with `splitnet calibrate`"
        )
    check_kinds(objective=objective)
    goal = check_objective(objective)
    names = tuple(node.name for node in cluster.nodes)
    beforehand = check_asked(
        cluster, stages=stages, max_stages=max_stages, forbid=forbid, at=at, nodes=nodes, codecs=codecs, lossless=lossless,
        max_accuracy_loss=max_accuracy_loss, tolerance=tolerance, margin=margin, pin=pin, input_at=input_at, output_at=output_at,
        private=private, noise=noise, taken=taken, link_codecs=link_codecs,
    )  # fmt: skip
    wishes, chosen = beforehand.wishes, beforehand.chosen

    def best(figures: Mapping[str, CodecFigures], budget: float | None) -> Plan:
        permitted = {pair: [name for name in usable_there if name in figures] for pair, usable_there in wishes.link_codecs.items()}
        asked = replace(wishes, max_accuracy_loss=budget, link_codecs=permitted)
        draft = Draft.make(profile, cluster, chosen, asked, figures, goal).restricted()
        if at is not None:
            return _manual(draft, goal, at)
        return _best(draft, goal, beforehand.stages, tolerance, margin)

    if codecs is not None:
        given = codecs if "raw" in codecs else {"raw": CodecFigures(), **codecs}
        wishes.check(names, tuple(given))
        return best(given, max_accuracy_loss)
    structure = profile.structure
    choice = choices(chosen, structure, lossless=lossless, calibration=calibration, budget=max_accuracy_loss)
    wishes.check(names, tuple(choice.every))
    forced = any(not set(asked) & set(choice.safe) for asked in wishes.link_codecs.values())
    found = within(best, choice, structure, tolerance=tolerance, measure=measure_loss, forced=forced)
    return with_alternatives(found, choice, structure, link_codecs=wishes.link_codecs, measure=measure_loss)


def _best(draft: Draft, goal: Objective, allowed: range, tolerance: float, margin: float) -> Plan:
    scale = draft.scale(goal, allowed)
    problem = draft.problem(draft.positions)
    bound = max(bound_s(draft, goal, min(allowed)), chain_bound_s(draft, goal, allowed))
    best, _ = best_in_order(scale, problem, draft.positions, bound_s=bound)
    if best is None:
        operators = [draft.operators[a].name for a in draft.positions[:-1]]
        raise scale.refused or why_no_plan(problem, operators, allowed, draft.wishes.max_accuracy_loss)
    if best.cost.objective_s(goal) > bound * (1 + 1e-9):
        for placement in cuts_for_two(draft, goal, scale):
            weighed = scale.weigh(placement)
            best = weighed if weighed is not None and scale.rank(weighed) < scale.rank(best) else best
        if len(best.realised.stages) > 1:
            best = refine(scale, best, draft.before, len(draft.nodes), _REFINED, draft.blocks)
    if tolerance > 0 and len(best.realised.stages) > 1:
        for placement in draft.narrower(best.placement, problem):
            scale.weigh(placement)
    reached = best.cost.objective_s(goal)
    thrifty = fewest_bytes(scale, best, tolerance)
    note = thrift_note(best, thrifty, goal, tolerance)
    alone = min((known for known in scale.known if len(known.realised.stages) == 1), key=scale.rank, default=None)
    if alone is not None and len(thrifty.realised.stages) > 1:
        split_s, alone_s = thrifty.cost.objective_s(goal), alone.cost.objective_s(goal)
        if not worth_splitting(split_s, alone_s, margin):
            thrifty, note = alone, why_alone(alone.realised.stages[0].node, split_s, alone_s, margin)
    return _plan(draft, thrifty, goal, min(bound, reached, thrifty.cost.objective_s(goal)), note)


def _manual(draft: Draft, goal: Objective, at: Sequence[str]) -> Plan:
    """Cuts before the operators `at`, on the draft's first nodes."""
    cuts = [matching(pattern, draft.operators)[0] for pattern in at]
    if any(a >= b for a, b in zip([0, *cuts], cuts, strict=False)):
        raise BadInput("cuts must stand in the model's order, each once, and not before its first operator")
    if len(draft.nodes) < len(cuts) + 1:
        raise BadInput(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but there are {len(draft.nodes)} nodes")
    order = tuple(range(len(cuts) + 1))
    positions = (0, *cuts, len(draft.operators))
    placement = Placement.of(Candidate(math.nan, tuple(range(len(cuts) + 2)), order), positions, ())
    scale = draft.scale(goal, range(1, len(order) + 1))
    unlimited = replace(scale, limits=dict.fromkeys(scale.limits, math.inf))
    selected = unlimited.weigh(placement)
    if selected is None:
        raise unlimited.refused or NoPlan("with these cuts the raw input or the error allowed does not stay within what was asked for")
    for name in draft.names[: len(order)]:
        need, limit = selected.cost.memory_bytes.get(name, 0), scale.limits[name]
        if need > limit:
            raise NoPlan(
                f"with these cuts node {name!r} needs {bytes_text(need)} and has {bytes_text(limit)}: {bytes_text(need - limit)} are missing",
                remedy="move the cuts, or raise the node's memory limit",
            )
    return _plan(draft, selected, goal, min(bound_s(draft, goal), selected.cost.objective_s(goal)))


def _plan(draft: Draft, best: Selected, goal: Objective, bound: float, note: str = "") -> Plan:
    structure = draft.profile.structure
    realised, cost = draft.predicted(draft.reproducible(best.realised))
    used = {stage.node for stage in realised.stages}
    limits = {name: limit + draft.wishes.taken.get(name, (0.0, 0.0))[0] for name, limit in draft.limits.items()}
    return Plan(
        model=structure.name,
        model_sha256=structure.sha256,
        objective=goal,
        nodes=tuple(NodeRef(node.name, node.address) for node in draft.nodes if node.name in used),
        stages=realised.stages,
        transfers=realised.transfers,
        inputs=structure.inputs,
        outputs=structure.outputs,
        noise=draft.wishes.noise if len(realised.stages) > 1 else None,
        profile_sha256=draft.profile.sha256,
        max_in_flight=pipeline_depth(realised, cost, limits, {n: t[0] for n, t in draft.wishes.taken.items()}),
        prediction=Prediction(
            batch=structure.batch,
            latency_s=cost.latency_s,
            throughput_per_s=cost.throughput_per_s,
            bottleneck=cost.bottleneck,
            bound=min(bound, cost.objective_s(goal)),
            memory_bytes=dict(cost.memory_bytes),
            bytes_per_link={f"{a}->{b}": round(size) for (a, b), size in cost.sent_bytes.items()},
            alternatives=_alternatives(draft),
            symbols=dict(structure.symbols),
            note="; ".join(filter(None, (note, _ALONE if draft.wishes.noise is not None and len(realised.stages) == 1 else ""))),
        ),
    )


def _alternatives(draft: Draft) -> tuple[Alternative, ...]:
    """What each node alone would do: its latency with the figures for latency, its throughput with those for throughput."""
    whole = (0, len(draft.operators))
    found = []
    for one in (draft, draft.other):
        one = replace(one, allowed=draft.allowed)
        found.append(alternatives(one.scale(one.goal, range(1, 2)), one.problem(whole), whole))
    latencies, rates = found if draft.goal == "latency" else reversed(found)
    return tuple(replace(a, throughput_per_s=b.throughput_per_s) for a, b in zip(latencies, rates, strict=True))
