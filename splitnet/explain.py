"""A plan in words and figures, from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence

from splitnet.noise import Noise, noised_values
from splitnet.plan import CLIENT, Plan, Prediction, StageSpec

__all__ = ["bytes_text", "explain", "seconds_text", "table"]

_SAME = 1e-6  # relative: two predictions closer than this are the same


def bytes_text(size: float) -> str:
    """Bytes for people: "0 B", "12.3 KiB", "1.50 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """Seconds for people: "0.120 ms", "12.3 ms", "1.50 s"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e3:.3f} ms"


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; the first row is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def explain(plan: Plan) -> str:
    """The plan for people: stages, what crosses between them, what is predicted, how good that is, and what one machine alone would do."""
    if plan.generation is not None:
        from splitnet.explain_generation import explain_generation  # which uses this room's texts

        return explain_generation(plan, plan.generation)
    lines = [
        f"{plan.model}: {_count(len(plan.stages), 'stage')} on {_count(len({s.node for s in plan.stages}), 'node')}, for {plan.objective}"
    ]
    lines += [
        "",
        "stages",
        *table([("stage", "node", "operators", "from", "to", "parameters", "memory", "compute"), *map(_stage, plan.stages)]),
    ]
    if held := [f"  {s.name}: {', '.join(s.replicas)}" for s in plan.stages if s.replicas]:
        lines += ["", "held ready, to take over in this order", *held]
    if plan.transfers:
        lines += ["", "transfers", *table([("from", "to", "link", "tensors", "bytes", "codec"), *_transfers(plan)])]
    if plan.noise is not None:
        lines += ["", *_noise(plan, plan.noise)]
    if plan.prediction is not None:
        lines += ["", *_prediction(plan, plan.prediction)]
    return "\n".join(lines)


def _stage(stage: StageSpec) -> tuple[str, ...]:
    names = stage.operators or ("-",)
    need = stage.param_bytes + stage.activation_bytes
    count, first, last = str(len(stage.operators)), stage.first or names[0], stage.last or names[-1]
    return stage.name, stage.node, count, first, last, bytes_text(stage.param_bytes), bytes_text(need), seconds_text(stage.seconds)


def _transfers(plan: Plan) -> list[tuple[str, ...]]:
    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
    rows: list[tuple[str, ...]] = []
    for transfer in plan.transfers:
        a, b = node[transfer.source], node[transfer.target]
        link = f"{a}->{b}" if a != b else f"within {a}"
        ends = (transfer.source or "client", transfer.target or "client")
        others = ", ".join(option.name for option in transfer.codecs if option.name != transfer.codec)
        codec = transfer.codec + (f" (or {others}, as the link allows)" if others else "")
        rows.append((*ends, link, str(len(transfer.tensors)), bytes_text(transfer.bytes), codec))
    return rows


def _noise(plan: Plan, noise: Noise) -> list[str]:
    counts = (10, 100, 1000)
    sums = ", ".join(f"{noise.epsilon_after(count):.3g} for {count}" for count in counts)
    values = ", ".join(noised_values(plan))
    return [
        f"privacy of what leaves {plan.ingress.name} for other nodes: {noise.promise()}",
        f"  noise       normal, deviation {noise.sigma:.4g} on every value of {values}; together clipped to a norm of {noise.clip_norm:g}",
        f"  {noise.per}s that tell of the same person add up: epsilon {sums}",
        "  it hides what a sample was from the other nodes, not shapes, times and how many there were; answers pass through them",
    ]


def _prediction(plan: Plan, predicted: Prediction) -> list[str]:
    lines = [
        f"predicted for batches of {predicted.batch}",
        f"  latency     {seconds_text(predicted.latency_s)}",
        f"  throughput  {predicted.throughput_per_s:.3g} batches/s (bottleneck: {predicted.bottleneck or 'not known'})",
        f"  quality     {_quality(plan, predicted)}",
    ]
    if accuracy := _accuracy(plan, predicted):
        lines.append(f"  accuracy    {accuracy}")
    if predicted.note:
        lines.append(f"  note        {predicted.note}")
    if predicted.memory_bytes:
        lines.append("  memory      " + ", ".join(f"{node} {bytes_text(size)}" for node, size in predicted.memory_bytes.items()))
    if predicted.bytes_per_link:
        lines.append("  links       " + ", ".join(f"{link} {bytes_text(size)}" for link, size in predicted.bytes_per_link.items()))
    if predicted.alternatives:
        rows = [("one node alone", "latency", "throughput", "fits")]
        rows += [
            (a.node, seconds_text(a.latency_s), f"{a.throughput_per_s:.3g} batches/s", "yes" if a.fits else "no, too little memory")
            for a in predicted.alternatives
        ]
        lines += ["", *table(rows), "", _verdict(plan, predicted)]
    return lines


def _quality(plan: Plan, predicted: Prediction) -> str:
    reached = predicted.latency_s if plan.objective == "latency" else 1.0 / predicted.throughput_per_s
    if predicted.bound <= 0:
        return "no bound is known"
    gap = reached / predicted.bound - 1.0
    if gap <= _SAME:
        return "optimal: no plan with one stage per node is predicted to be better"
    share = f"{gap * 100:.1f}" if gap >= 1e-3 else f"{gap * 100:.1g}"
    return f"within {share}% of any plan with one stage per node (proven bound {seconds_text(predicted.bound)})"


def _accuracy(plan: Plan, predicted: Prediction) -> str:
    """ "" where answers are the whole model's bits."""
    from splitnet.codecs import codec_names, get_codec  # which need numpy; a plan does not

    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
    known = codec_names()
    exact = {name for name in known if get_codec(name).lossless}
    lossy = [
        f"{t.codec} on {node[t.source]}->{node[t.target]}"
        for t in plan.transfers
        if node[t.source] != node[t.target] and t.codec not in exact
    ]
    if plan.noise is not None:
        with_noise = "not the whole model's answers: noise is added. `splitnet privacy` measures what that costs"
        return with_noise + (f"; beside it {', '.join(dict.fromkeys(lossy))}" if lossy else "")
    if not lossy:
        return ""
    if predicted.loss_of:
        return f"loses {predicted.loss:.3%} by {', '.join(dict.fromkeys(lossy))}: {predicted.loss_of} (the whole plan, measured)"
    return f"not the whole model's bits: {', '.join(dict.fromkeys(lossy))}. What that costs was not measured; --lossless forbids it"


def _verdict(plan: Plan, predicted: Prediction) -> str:
    """Compares with the best single node, in so many words."""
    able = [a for a in predicted.alternatives if a.fits]
    if not able:
        return "The model fits on no single node: it has to be split."
    what = "latency" if plan.objective == "latency" else "throughput"
    if what == "latency":
        best = min(able, key=lambda a: a.latency_s)
        gain = best.latency_s / max(predicted.latency_s, 1e-12)
    else:
        best = max(able, key=lambda a: a.throughput_per_s)
        gain = predicted.throughput_per_s / max(best.throughput_per_s, 1e-12)
    alone = len({stage.node for stage in plan.stages}) == 1
    if alone and gain >= 1 - _SAME:
        return f"One machine alone is best for {what}: {plan.stages[0].node!r}. No cut of the model over these nodes is predicted to be faster."
    if gain > 1 + _SAME:
        return f"Splitting pays: {gain:.2f}x the {what.replace('latency', 'speed')} of the best node alone ({best.node!r})."
    if gain >= 1 - _SAME:
        return f"Splitting gains nothing in {what} over the best node alone ({best.node!r})."
    return f"One machine alone is best for {what}: {best.node!r} alone would be {1 / gain:.2f}x as fast as this plan, which was asked for."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
