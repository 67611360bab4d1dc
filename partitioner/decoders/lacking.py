"""Why a decoder model fits nowhere: how much memory is missing where, in the arrangement that lacks least."""

from __future__ import annotations

import numpy as np

from partitioner.decoders.chain import Chain, Costs, best_chain
from partitioner.decoders.costs import Setting
from splitnet.errors import NoPlan
from splitnet.explain import bytes_text

__all__ = ["why_nothing_fits"]


def why_nothing_fits(setting: Setting) -> NoPlan:
    """The error to raise where no plan was found."""
    n, f, length = len(setting.nodes), len(setting.formats), len(setting.model.vertices)
    if not setting.fits.any():
        possible = setting.possible.any()
        if not possible:
            return NoPlan("what is pinned, forbidden and cut by hand cannot all hold", remedy="take back one of the wishes")
    lacking = np.maximum(setting.memory[None] - setting.limits[:, None, None, None], 0.0)
    levels = np.unique(lacking[:, :, *np.triu_indices(length + 1, 1)])
    levels = levels[np.isfinite(levels)]
    measured = [[f"{setting.dtype}/{form}" in setting.profile.on(node) for form in setting.formats] for node in setting.nodes]
    able = setting.possible[:, None] & np.array(measured)[:, :, None, None]

    def arrangement(least: float) -> Chain:
        joined = setting.costs(setting.decode(1), "latency").wire
        free = np.zeros((n, f, length))
        none = np.zeros(n)
        nothing = Costs(
            free, none, none, np.zeros(joined.shape[:2]), np.zeros(joined.shape[:2]), np.where(np.isfinite(joined), 0.0, np.inf), none, none,
            np.where(np.isfinite(setting.costs(setting.decode(1), "latency").back_wire), 0.0, np.inf),
        )  # fmt: skip
        chain = setting.chain(nothing, nothing)
        return Chain(nothing, nothing, able & (lacking <= least), chain.firsts, chain.lasts, chain.counts)

    def found(least: float) -> bool:
        return best_chain(arrangement(least), lambda latency_s, _: latency_s) is not None

    if not found(np.inf):
        return NoPlan(
            "the nodes that would have to work together are not connected, or what is asked for contradicts itself",
            remedy="add links to the cluster (`splitnet probe` measures every pair), or take back a wish",
        )
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(float(levels[middle])) else (middle + 1, high)
    best = best_chain(arrangement(float(levels[low])), lambda latency_s, _: latency_s)
    assert best is not None
    plan = best.plan
    excess = [
        (setting.memory[form, a, b] - setting.limits[node], node, a, b, form)
        for node, form, a, b in zip(plan.order, plan.formats, plan.cuts, plan.cuts[1:], strict=False)
    ]
    missing, node, a, b, form = max(excess)
    work, names = setting.workload, setting.model.vertices
    cache = setting.cache_bytes(a, b)
    return NoPlan(
        f"the model does not fit: {bytes_text(missing)} of memory are missing; in the arrangement that lacks least, node {setting.names[node]!r} would need "
        f"{bytes_text(setting.memory[form, a, b])} for {names[a]!r} to {names[b - 1]!r} with weights in {setting.formats[form]} "
        f"({bytes_text(cache)} of it for {work.sessions} sessions of {work.context_length} tokens) and has {bytes_text(setting.limits[node])}",
        remedy="take a smaller --context, fewer --sessions or coarser --weights, raise the nodes' memory limits, or add a node",
    )
