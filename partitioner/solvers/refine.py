"""Local search: small changes of a placement, as long as the plan that they make is better by its true cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from partitioner.solvers.placement import Placement, Scale, Selected
from partitioner.solvers.problem import Objective
from splitnet.explain import bytes_text

__all__ = ["fewest_bytes", "refine", "thrift_note"]


def refine(
    scale: Scale, best: Selected, before: Sequence[frozenset[int]], devices: int, effort: int, blocks: Sequence[int] | None = None
) -> Selected:
    """Moves operators over a stage's border (`blocks`: those of one block together), exchanges devices, puts an unused one in, joins two stages;
    first improvement, at most `effort` placements weighed."""
    limit = scale.weighed + effort
    improved = True
    while improved and scale.weighed < limit:
        improved = False
        for other in _neighbours(best.placement, before, devices, blocks):
            weighed = scale.weigh(other)
            if weighed is not None and scale.rank(weighed) < scale.rank(best):
                best, improved = weighed, True
                break
            if scale.weighed >= limit:
                break
    return best


def fewest_bytes(scale: Scale, best: Selected, tolerance: float) -> Selected:
    """Of all that was weighed and is within `tolerance` (relative) of the best: what sends the fewest bytes, then the quickest."""
    limit = best.cost.objective_s(scale.objective) * (1 + tolerance)
    near = [s for s in scale.known if s.cost.objective_s(scale.objective) <= limit]
    return min(near, key=lambda s: (s.bytes, *scale.rank(s)), default=best) if tolerance > 0 else best


def thrift_note(best: Selected, thrifty: Selected, objective: Objective, tolerance: float) -> str:
    """What people should know where `fewest_bytes` took another plan than the best; "" where it did not."""
    if thrifty.bytes >= best.bytes:
        return ""
    more = thrifty.cost.objective_s(objective) / best.cost.objective_s(objective) - 1
    found = f"of the plans within {tolerance:.1%} of the best, the one that sends least: {bytes_text(best.bytes - thrifty.bytes)} less"
    return f"{found}, {more:.1%} slower" if more > 0 else found


def _neighbours(placement: Placement, before: Sequence[frozenset[int]], devices: int, blocks: Sequence[int] | None) -> Iterator[Placement]:
    order, stage_of = placement.order, placement.stage_of
    bare = replace(placement, codecs=None)
    seen: set[tuple[int, int]] = set()
    for v, inputs in enumerate(before):
        for u in inputs:
            if stage_of[u] != stage_of[v]:
                for mover, target in ((v, stage_of[u]), (u, stage_of[v])):
                    if (mover, target) not in seen:
                        seen.add((mover, target))
                        yield from _moved(bare, mover, target, blocks)
    for a in range(len(order)):
        for b in range(a + 1, len(order)):
            swapped = list(order)
            swapped[a], swapped[b] = order[b], order[a]
            yield replace(bare, order=tuple(swapped))
        for device in range(devices):
            if device not in order:
                yield replace(bare, order=(*order[:a], device, *order[a + 1 :]))
    for a in range(len(order)):
        for b in range(len(order)):
            if a != b:
                joined = [b if k == a else k for k in stage_of]
                shift = {k: at for at, k in enumerate(k for k in range(len(order)) if k != a)}
                yield Placement(tuple(d for k, d in enumerate(order) if k != a), tuple(shift[k] for k in joined))


def _moved(placement: Placement, mover: int, target: int, blocks: Sequence[int] | None) -> Iterator[Placement]:
    stage_of = list(placement.stage_of)
    home = stage_of[mover]
    together = [mover] if blocks is None else [v for v, b in enumerate(blocks) if b == blocks[mover] and stage_of[v] == home]
    for v in together:
        stage_of[v] = target
    if home in stage_of:
        yield replace(placement, stage_of=tuple(stage_of))
