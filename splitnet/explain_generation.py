"""A plan of a model that generates, in words and figures."""

from __future__ import annotations

from splitnet.explain import bytes_text, seconds_text, table
from splitnet.generation_plan import Expected, Generation
from splitnet.plan import CLIENT, Plan, StageSpec

__all__ = ["explain_generation"]

_OBJECTIVES = {
    "ttft": "the time to the first token", "tpot": "the time per token", "throughput": "tokens per second of all sessions", "latency": "the time of an answer",
}  # fmt: skip
_SAME = 1e-6


def explain_generation(plan: Plan, generation: Generation) -> str:
    count = len({stage.node for stage in plan.stages})
    lines = [
        f"{plan.model}: {len(plan.stages)} stage{'s' * (len(plan.stages) != 1)} on {count} node{'s' * (count != 1)}, for {_OBJECTIVES.get(plan.objective, plan.objective)}",
        f"sessions of {generation.context_length} tokens (prompt and answer), {generation.sessions} at once; computed in {generation.dtype}",
        "",
        "stages",
        *table(
            [
                ("stage", "node", "from", "to", "weights", "parameters", "KV cache", "memory", "a step"),
                *(_stage(plan, generation, s) for s in plan.stages),
            ]
        ),
    ]
    if held := [f"  {s.name}: {', '.join(s.replicas)}" for s in plan.stages if s.replicas]:
        lines += ["", "held ready, to take over in this order", *held]
    inner = [t for t in plan.transfers if CLIENT not in (t.source, t.target)]
    if inner:
        node = {stage.name: stage.node for stage in plan.stages}
        sent = plan.prediction.bytes_per_link if plan.prediction else {}
        rows = [("from", "to", "link", "bytes per token", "codec")]
        for t in inner:
            link = f"{node[t.source]}->{node[t.target]}"
            rows.append((t.source, t.target, link, bytes_text(sent.get(link, 0)), t.codec))
        lines += ["", "hidden states", *table(rows)]
    if generation.expected is not None:
        lines += ["", *_predicted(plan, generation.expected)]
    if generation.perplexity:
        whole = generation.perplexity.get("", 0.0)
        each = [f"{form} {value:.4g} ({value / whole - 1:+.2%})" for form, value in generation.perplexity.items() if form and whole]
        lines += ["", f"perplexity {whole:.4g} as stored; with weights in " + ", ".join(each) + f"; {generation.perplexity_of}"]
    return "\n".join(lines)


def _stage(plan: Plan, generation: Generation, stage: StageSpec) -> tuple[str, ...]:
    memory = plan.prediction.memory_bytes.get(stage.node, 0) if plan.prediction else 0
    return (
        stage.name, stage.node, stage.first, stage.last, generation.weights.get(stage.name, "-"), bytes_text(stage.param_bytes),
        bytes_text(generation.cache_bytes(stage.name)), bytes_text(memory), seconds_text(stage.seconds),
    )  # fmt: skip


def _predicted(plan: Plan, expected: Expected) -> list[str]:
    lines = [
        "predicted",
        f"  first token   {seconds_text(expected.ttft_s)} after a prompt of {expected.prompt_tokens} tokens, in chunks of {expected.chunk_tokens} (TTFT)",
        f"  each token    {seconds_text(expected.tpot_s)}, {1 / max(expected.tpot_s, 1e-12):.3g} tokens/s for one session (TPOT)",
        f"  all together  {expected.tokens_per_s:.3g} tokens/s with {expected.sessions} session{'s' * (expected.sessions != 1)}, {expected.batch} in each pass",
    ]
    predicted = plan.prediction
    if predicted is None:
        return lines
    lines.append(f"  bottleneck    {predicted.bottleneck}")
    lines.append(f"  quality       {_quality(plan, expected, predicted.bound)}")
    if predicted.note:
        lines.append(f"  note          {predicted.note}")
    if predicted.alternatives:
        rows = [("one node alone", "seconds of the objective", "tokens/s", "fits")]
        rows += [
            (a.node, seconds_text(a.latency_s), f"{a.throughput_per_s:.3g}", "yes")
            if a.fits
            else (a.node, "-", "-", "no, too little memory")
            for a in predicted.alternatives
        ]
        lines += ["", *table(rows)]
        if not any(a.fits for a in predicted.alternatives):
            lines += ["", "The model fits on no single node: it has to be split."]
    return lines


def _quality(plan: Plan, expected: Expected, bound_s: float) -> str:
    answer_s = expected.ttft_s + (expected.answer_tokens - 1) * expected.tpot_s
    figures = {"ttft": expected.ttft_s, "tpot": expected.tpot_s, "latency": answer_s}
    reached_s = figures.get(plan.objective, 1 / expected.tokens_per_s)
    if bound_s <= 0:
        return "no bound is known"
    gap = reached_s / bound_s - 1
    if gap <= _SAME:
        return "optimal: no plan with one stage per node is predicted to be better"
    return f"within {gap:.1%} of any plan with one stage per node (proven bound {seconds_text(bound_s)})"
