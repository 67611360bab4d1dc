"""The plan that comes of a choice: stages, transfers, and what is expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from partitioner.decoders.chain import ChainPlan, Found, price
from partitioner.decoders.costs import Pass, Setting
from partitioner.decoders.model import DecoderModel
from partitioner.decoders.weights import Weights
from splitnet.generation_plan import Expected, Generation
from splitnet.plan import CLIENT, Alternative, NodeRef, OutputSpec, Plan, Prediction, StageSpec, Transfer
from splitnet.tensors import DTYPES, TensorSpec

__all__ = ["Choice", "batches", "expected_of", "make_plan", "objective_s"]


@dataclass(frozen=True)
class Choice:
    """`batch`: sessions in a pass, where throughput was asked for. `latency` and `pace` of `found` are of the objective's passes."""

    setting: Setting
    found: Found
    batch: int
    alone: tuple[ChainPlan | None, ...]
    note: str = ""


def batches(sessions: int) -> list[int]:
    return sorted({*(1 << k for k in range(sessions.bit_length()) if 1 << k <= sessions), sessions})


def make_plan(choice: Choice, objective: str, weights: Weights) -> Plan:
    setting, chain_plan = choice.setting, choice.found.plan
    model, work = setting.model, setting.workload
    names = [f"stage{k}" for k in range(len(chain_plan.order))]
    stages = tuple(_stage(setting, chain_plan, k, name) for k, name in enumerate(names))
    expected, bottleneck, paced = expected_of(setting, chain_plan)
    ids, tokens = TensorSpec("input_ids", "int64", ("tokens",)), TensorSpec("tokens", "int32", ("tokens",))
    hidden = setting.widest * model.hidden_size * DTYPES[setting.dtype].itemsize
    inner = [
        Transfer(a, b, ("hidden_states",), setting.codecs[c], hidden) for a, b, c in zip(names, names[1:], chain_plan.codecs, strict=False)
    ]
    kv = {name: model.kv_bytes(a, b, setting.dtype) for name, (a, b) in zip(names, _spans(chain_plan), strict=True)}
    forms = {name: setting.formats[f] for name, f in zip(names, chain_plan.formats, strict=True)}
    measured = {form: value for form, value in (weights.perplexity or {}).items() if not form or form in forms.values()}
    return Plan(
        model=model.name,
        model_sha256=model.sha256,
        objective=objective,
        nodes=tuple(NodeRef(setting.nodes[n].name, setting.nodes[n].address) for n in chain_plan.order),
        stages=stages,
        transfers=(
            Transfer(CLIENT, names[0], ("input_ids",), bytes=8 * setting.widest),
            *inner,
            Transfer(names[-1], CLIENT, ("tokens",), bytes=4),
        ),
        inputs=(ids,),
        outputs=(OutputSpec("tokens", tokens),),
        max_in_flight=max(16, 2 * work.sessions),
        prediction=Prediction(
            batch=1,
            latency_s=_answer_s(expected) if objective == "latency" else expected.ttft_s if objective == "ttft" else expected.tpot_s,
            throughput_per_s=expected.tokens_per_s,
            bottleneck=bottleneck,
            bound=min(choice.found.bound, objective_s(expected, objective)),
            memory_bytes={
                setting.names[n]: setting.stage_bytes(a, b, setting.formats[f])
                for n, (a, b), f in zip(chain_plan.order, _spans(chain_plan), chain_plan.formats, strict=True)
            },
            bytes_per_link=_link_bytes(setting, chain_plan, setting.decode(1)),
            alternatives=_alternatives(choice, objective),
            note="; ".join(filter(None, (choice.note, paced, _coarse(forms, weights)))),
        ),
        generation=Generation(
            context_length=work.context_length, sessions=work.sessions, vocabulary=model.vocabulary, kv_bytes_per_token=kv, dtype=setting.dtype, weights=forms,
            eos_token_ids=model.checkpoint.eos_token_ids, bos_token_ids=model.checkpoint.bos_token_ids, tokenizer=_place(model), expected=expected,
            perplexity=measured, perplexity_of=weights.of if measured else "",
        ),
    )  # fmt: skip


def _place(model: DecoderModel) -> str:
    checkpoint = model.checkpoint
    return str(checkpoint.folder.resolve()) if checkpoint.name != checkpoint.source else checkpoint.source


def _coarse(forms: Mapping[str, str], weights: Weights) -> str:
    """What to say of formats that were chosen for want of memory."""
    coarse = sorted({form for form in forms.values() if form in ("int8", "int4")})
    if weights.wanted != "auto" or weights.max_loss is not None or not coarse:
        return ""
    said = f"weights in {' and '.join(coarse)} where nothing finer fits"
    return said if weights.perplexity else f"{said}; --data FILE measures what that loses"


def _spans(plan: ChainPlan) -> list[tuple[int, int]]:
    return list(zip(plan.cuts, plan.cuts[1:], strict=False))


def _stage(setting: Setting, plan: ChainPlan, k: int, name: str) -> StageSpec:
    model, form = setting.model, setting.formats[plan.formats[k]]
    a, b = _spans(plan)[k]
    spec = model.spec(a, b, form=form, dtype=setting.dtype, context_length=setting.workload.context_length)
    operators = model.vertices[a:b]
    node = setting.nodes[plan.order[k]]
    times = setting.profile.on(node)[f"{setting.dtype}/{form}"]
    return StageSpec(
        name=name, node=node.name, operators=operators, inputs=spec.inputs(), outputs=spec.outputs(),
        param_bytes=model.param_bytes(a, b, form, setting.dtype), activation_bytes=setting.activation_bytes(a, b),
        seconds=float(setting.profile.decode(times, 1)[a:b].sum()), first=operators[0], last=operators[-1],
    )  # fmt: skip


def _priced(setting: Setting, plan: ChainPlan, one: Pass) -> tuple[ChainPlan, str]:
    """The plan with a pass's latency and bottleneck, nodes on one machine included, and what that is."""
    chain = setting.chain(setting.costs(one, "latency"), setting.costs(one, "throughput"))
    priced = price(chain, plan.cuts, plan.order, plan.formats, plan.codecs)
    seconds, name = {}, ""
    for k, ((a, b), node, form) in enumerate(zip(_spans(plan), plan.order, plan.formats, strict=True)):
        many = len(plan.order) > 1
        taken, sent = plan.codecs[k - 1] if k else -1, plan.codecs[k] if k + 1 < len(plan.order) else -1 if many else -2
        seconds[setting.names[node]] = float(chain.sums[1][node, form, a, b]) + chain.pace.ends(node, taken, sent)
    busiest = max(seconds, key=seconds.__getitem__)
    name = f"node {busiest}" if seconds[busiest] >= priced.bottleneck_s * (1 - 1e-9) else "a link"
    shared_s, machine = setting.busy(seconds, priced.bottleneck_s)
    return replace(priced, bottleneck_s=shared_s), machine or name


def expected_of(setting: Setting, plan: ChainPlan) -> tuple[Expected, str, str]:
    """What is predicted of it, what its bottleneck is, and a remark."""
    work = setting.workload
    stages = len(plan.order)
    chunk, _ = _priced(setting, plan, setting.prefill(stages))
    step, _ = _priced(setting, plan, setting.decode(1))
    rates: dict[int, tuple[float, str]] = {}
    for batch in batches(work.sessions):
        several, name = _priced(setting, plan, setting.decode(batch))
        rates[batch] = work.sessions / max(several.latency_s, math.ceil(work.sessions / batch) * several.bottleneck_s, 1e-9), name
    batch = max(rates, key=lambda b: rates[b][0])
    expected = Expected(
        work.prompt_tokens, setting.prefill(stages).tokens, work.answer_tokens, work.sessions, batch,
        ttft_s=chunk.latency_s + (setting.chunks(stages) - 1) * chunk.bottleneck_s, tpot_s=step.latency_s, tokens_per_s=rates[batch][0],
    )  # fmt: skip
    return expected, rates[batch][1], ""


def _answer_s(expected: Expected) -> float:
    return expected.ttft_s + (expected.answer_tokens - 1) * expected.tpot_s


def objective_s(expected: Expected, objective: str) -> float:
    """What the objective counts; for throughput, seconds of one token of all sessions together."""
    figures = {"ttft": expected.ttft_s, "tpot": expected.tpot_s, "latency": _answer_s(expected)}
    return figures[objective] if objective in figures else 1.0 / max(expected.tokens_per_s, 1e-12)


def _link_bytes(setting: Setting, plan: ChainPlan, one: Pass) -> dict[str, int]:
    figures = setting.figures("latency")
    size = one.tokens * setting.model.hidden_size * DTYPES[setting.dtype].itemsize
    names = [setting.names[n] for n in plan.order]
    found = {
        f"{a}->{b}": round(size / figures[setting.codecs[c]].best_ratio) for a, b, c in zip(names, names[1:], plan.codecs, strict=False)
    }
    if len(names) > 1:
        found[f"{names[-1]}->{names[0]}"] = found.get(f"{names[-1]}->{names[0]}", 0) + 4 * one.answers
    return found


def _alternatives(choice: Choice, objective: str) -> tuple[Alternative, ...]:
    """What each node alone would do: seconds of what the objective counts (per token, for throughput), and tokens per second. Nothing is said of one that wishes rule out
    though its memory would do."""
    found, whole = [], choice.setting.memory[:, 0, -1]
    for node, limit, alone in zip(choice.setting.nodes, choice.setting.limits, choice.alone, strict=True):
        if alone is None:
            if (whole > limit).all():
                found.append(Alternative(node.name, 0.0, 0.0, fits=False))
            continue
        expected, _, _ = expected_of(choice.setting, alone)
        figures = {"ttft": expected.ttft_s, "latency": _answer_s(expected)}
        found.append(Alternative(node.name, figures.get(objective, expected.tpot_s), expected.tokens_per_s, fits=True))
    return tuple(found)
