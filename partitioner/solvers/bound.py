"""Lower bounds that hold for every plan, whatever the order of operators and however often a device is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from partitioner.solvers.problem import Codecs, Floats, Overheads

__all__ = ["Instance", "bottleneck_bound", "latency_bound", "shared_bound"]

_STEPS = 80
_MEMORY_STEPS = 40


@dataclass(frozen=True, eq=False)
class Instance:
    """n operators in a topological order, on K kinds of devices, `sizes` of each. What may be computed anywhere (or not at all) is left out.

    uses: for each operator the operators that it uses, with the bytes that have to be sent if they are apart. `ring`: the operator from
    whose device the plan begins, -1 where that is not known; `return_bytes` of each operator's answer go back there.
    """

    seconds: Floats  # (K, n)
    uses: Mapping[int, Mapping[int, float]]
    latency: Floats  # (K, K); inf without a link; the diagonal counts for nothing
    bandwidth: Floats
    codecs: Codecs
    stage_s: Floats  # (K,)
    sizes: tuple[int, ...]
    limits: Floats  # (K,): bytes of one device
    param_bytes: Floats  # (n,)
    allowed: np.ndarray | None = None
    ring: int = -1
    input_bytes: Floats | None = None  # (n,): what each operator takes of the model's inputs, from the ingress
    return_bytes: Mapping[int, float] = field(default_factory=dict)

    @property
    def possible(self) -> Floats:
        """The seconds, inf where an operator is not allowed."""
        return self.seconds if self.allowed is None else np.where(self.allowed, self.seconds, np.inf)

    def per_byte(self) -> Floats:
        """(K, K): the least seconds per byte from kind to kind: encode, travel, decode."""
        c = self.codecs
        wire = 1.0 / (c.ratio[:, None, None] * self.bandwidth[None])
        each = np.where(c.permitted, 1.0 / c.encode[:, :, None] + wire + 1.0 / c.decode[:, None, :], np.inf)
        found: Floats = each.min(axis=0)
        np.fill_diagonal(found, 0.0)
        return found


def latency_bound(instance: Instance) -> float:
    """Seconds below which no plan's latency can be.

    Along the path that is longest when every operator runs where it is fastest, whatever a plan does is a walk over the devices: it pays
    the operators and every change of device. The shortest walk (Viterbi 1967) is a bound, for every price on memory
    (Lagrangian relaxation); prices are improved by subgradient steps, each of which is a bound.
    """
    path = _longest_path(instance)
    outside = np.ones(instance.seconds.shape[1], dtype=bool)
    outside[path] = False
    prices = np.zeros(len(instance.sizes))
    room = np.asarray(instance.sizes) * instance.limits
    best, _ = _walk(instance, path, prices)
    if not np.isfinite(best) or not (instance.param_bytes.sum() > instance.limits).any():
        return best if np.isfinite(best) else 0.0
    scale = best / max(float(instance.param_bytes.sum()), 1.0)
    for step in range(_MEMORY_STEPS):
        value, held = _walk(instance, path, prices)
        priced = np.where(np.isfinite(instance.possible), prices[:, None] * instance.param_bytes, np.inf)
        cheapest = priced[:, outside].argmin(axis=0)
        value += float(np.take_along_axis(priced[:, outside], cheapest[None], axis=0).sum()) if outside.any() else 0.0
        held += np.bincount(cheapest, weights=instance.param_bytes[outside], minlength=len(held))
        value -= float(prices[prices > 0] @ room[prices > 0])
        best = max(best, value)
        slope = np.where(np.isfinite(room), held - np.where(np.isfinite(room), room, 0.0), 0.0)
        norm = float(np.abs(slope).max())
        if norm <= 0:
            break
        prices = np.maximum(prices + scale * 2.0 / (1 + step) ** 0.7 * slope / norm, 0.0)
    return best


def _longest_path(instance: Instance) -> list[int]:
    quickest = instance.possible.min(axis=0)
    count = len(quickest)
    done, came = np.zeros(count), np.full(count, -1)
    for i in range(count):
        if before := instance.uses.get(i):
            came[i] = max(before, key=done.__getitem__)
            done[i] = done[came[i]]
        done[i] += quickest[i]
    ends = [i for i in range(count) if done[i] >= done.max() * (1 - 1e-12)]
    path = [max(ends, key=lambda i: (instance.return_bytes.get(i, 0.0), i))]
    while came[path[-1]] >= 0:
        path.append(int(came[path[-1]]))
    return path[::-1]


def _walk(instance: Instance, path: list[int], prices: Floats) -> tuple[float, Floats]:
    """(the cost of the cheapest walk, the bytes that it puts on each kind)."""
    kinds = len(instance.sizes)
    away = ~np.eye(kinds, dtype=bool)
    each = instance.possible[:, path] + prices[:, None] * instance.param_bytes[path]
    per_byte = instance.per_byte()
    ring = instance.ring == path[0] or instance.input_bytes is not None
    firsts = kinds if ring else 1
    cost = np.full((firsts, kinds), np.inf)
    entering = np.zeros((kinds, kinds))
    if instance.input_bytes is not None and instance.input_bytes[path[0]]:
        entering = np.where(away, instance.latency + instance.input_bytes[path[0]] * per_byte, 0.0)
    begin = each[:, 0] + instance.stage_s
    if not ring:
        cost[0] = begin
    elif instance.input_bytes is not None:
        cost = entering + begin[None]  # the ingress may stand anywhere
    else:
        np.fill_diagonal(cost, begin)
    came = np.zeros((len(path), firsts, kinds), dtype=np.int64)
    for step in range(1, len(path)):
        size = instance.uses[path[step]][path[step - 1]]
        hop = np.where(away, (instance.latency + size * per_byte if size else 0.0) + instance.stage_s[None], 0.0)
        moved = cost[:, :, None] + hop[None]
        came[step] = moved.argmin(axis=1)
        cost = np.take_along_axis(moved, came[step][:, None], axis=1)[:, 0] + each[:, step][None]
    size = instance.return_bytes.get(path[-1], 0.0)
    if size and ring:
        c = instance.codecs  # the answer travels in the first codec
        raw = 1.0 / c.encode[0][:, None] + 1.0 / (c.ratio[0] * instance.bandwidth) + 1.0 / c.decode[0][None]
        cost = cost + np.where(away, instance.latency + size * raw, 0.0).T
    first, kind = np.unravel_index(int(cost.argmin()), cost.shape)
    held = np.zeros(kinds)
    best = float(cost[first, kind])
    for step in range(len(path) - 1, -1, -1):
        held[kind] += instance.param_bytes[path[step]]
        kind = came[step][first, kind]
    return best, held


def bottleneck_bound(instance: Instance) -> float:
    """Seconds below which no plan's busiest node can be.

    For any weights w of the devices that sum to 1 and prices of memory p, the busiest node is at least the sum over operators of the least
    w * seconds + p * bytes over devices, less what the memory is worth (Lagrangian duality of the linear programme that lets operators be
    divided). Weights and prices are improved by subgradient steps; every step's figure is a bound.
    """
    seconds = instance.possible
    bounded = np.where(np.isfinite(seconds), seconds, 0.0)
    total = bounded.sum(axis=1)
    best = float(seconds.min(axis=0).max()) if seconds.size else 0.0
    if not total.min() > 0:
        return best
    return max([best, *(_ascended(instance, seconds, bounded, start) for start in _starts(instance, total))])


def _starts(instance: Instance, total: Floats) -> list[tuple[Floats, Floats]]:
    """Weights and prices to begin with: all devices equally busy; and what is exact for a model that is alike all along, where devices whose
    memory is full first count by their memory, the others by their time."""
    sizes, nothing = np.asarray(instance.sizes, dtype=np.float64), np.zeros(len(total))
    alike = 1.0 / total
    starts: list[tuple[Floats, Floats]] = [(alike / (alike * sizes).sum(), nothing)]
    params = float(instance.param_bytes.sum())
    if params and (instance.limits < params).any():
        room = np.minimum(instance.limits / params, 1.0)  # the share of the model that one device holds
        for limit in np.sort(room * total):
            full = (room * total <= limit) & np.isfinite(instance.limits)  # memory without limit has no price
            if full.all():
                break
            worth = 1.0 / (sizes / total)[~full].sum()
            starts.append((np.where(full, 0.0, worth / total), np.where(full, worth / params, 0.0)))
    return starts


def _ascended(instance: Instance, seconds: Floats, bounded: Floats, start: tuple[Floats, Floats]) -> float:
    """The best bound on the way of a few subgradient steps from `start`."""
    weights, prices = start
    sizes = np.asarray(instance.sizes, dtype=np.float64)
    best = 0.0
    room = np.where(np.isfinite(instance.limits), instance.limits, 0.0)
    scarce = np.isfinite(instance.limits) & (instance.limits < instance.param_bytes.sum())
    columns = np.arange(seconds.shape[1])
    for step in range(_STEPS):
        priced = np.where(np.isfinite(seconds), weights[:, None] * bounded + prices[:, None] * instance.param_bytes, np.inf)
        choice = priced.argmin(axis=0)
        value = float(priced[choice, columns].sum() - (prices * sizes * room).sum())
        best = max(best, value)
        load = np.bincount(choice, weights=seconds[choice, columns], minlength=len(sizes)) / sizes
        weights = weights * np.exp((load - load.mean()) / max(load.max(), 1e-30) / (step + 1))
        weights /= (weights * sizes).sum()
        if scarce.any():
            held = np.bincount(choice, weights=instance.param_bytes, minlength=len(sizes)) / sizes
            over = np.where(scarce, held - room, 0.0)
            prices = np.maximum(
                prices + best / max(instance.param_bytes.sum(), 1.0) * 2.0 / (1 + step) ** 0.8 * over / max(np.abs(over).max(), 1.0), 0.0
            )
    return best


def shared_bound(seconds: Floats, threads: Mapping[int, int], cores: float, overheads: Overheads, stages: int, arrivals: bool) -> float:
    """Seconds below which the cores of a machine that devices share cannot be busy: `threads` of the devices that are on it.

    Every operator runs on some device; one that is elsewhere costs the machine nothing. So do at least `stages` stages, on as many devices, and, with
    `arrivals`, a tensor taken on each but the first, which another device sent.
    """
    share = np.array([threads.get(d, 0) / cores for d in range(len(seconds))])
    bound = float(np.where(np.isfinite(seconds), share[:, None] * np.where(np.isfinite(seconds), seconds, 0.0), np.inf).min(axis=0).sum())
    bound += float(np.sort(share * overheads.stage_s)[:stages].sum()) + float((share * overheads.request_s).min())
    if arrivals and stages > 1:
        message = np.sort(share * overheads.message_s)
        bound += float(message[: stages - 1].sum() + message[0] * (stages - 1))
    return bound
