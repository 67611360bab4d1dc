"""The problem that the chain solver takes: operators in one order, devices, what each interval and each cut costs. Plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from partitioner.cost import BUFFERED_REQUESTS

__all__ = ["Candidate", "ChainProblem", "Floats", "Objective", "interval_memory"]

Floats: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Objective: TypeAlias = Literal["latency", "throughput"]


@dataclass(frozen=True, eq=False)
class ChainProblem:
    """L operators in a fixed order and M devices. Position i stands before operator i; a stage is a half-open interval [j, i).

    Two devices without a link have latency inf. A device without a memory limit has limit inf.
    """

    devices: tuple[str, ...]
    seconds: Floats  # (M, L): each operator on each device
    memory: Floats  # (L+1, L+1): bytes that stage [j, i) needs; see `interval_memory`
    limits: Floats  # (M,): bytes
    cut_bytes: Floats  # (L+1,): what crosses position i when there is a cut
    return_bytes: float  # what the last stage sends back to the first stage's device
    bandwidth: Floats  # (M, M): bytes per second, from row to column
    latency: Floats  # (M, M): seconds

    @property
    def length(self) -> int:
        return self.seconds.shape[1]

    def stage_seconds(self) -> Floats:
        """(M, L+1, L+1): seconds of stage [j, i) on each device; inf where it is empty or does not fit."""
        prefix = np.concatenate([np.zeros((len(self.devices), 1)), np.cumsum(self.seconds, axis=1)], axis=1)
        seconds: Floats = prefix[:, None, :] - prefix[:, :, None]
        fits = self.memory[None] <= self.limits[:, None, None]
        fits &= np.triu(np.ones(self.memory.shape, dtype=bool), 1)
        return np.where(fits, np.maximum(seconds, 0.0), np.inf)

    def link_seconds(self, size_bytes: Floats, objective: Objective) -> Floats:
        """(M, M, ...): what sending so many bytes costs: the time until they have arrived, or for throughput the time that they keep the
        link busy. Nothing to send costs nothing; a missing link costs inf."""
        shape = (slice(None), slice(None)) + (None,) * size_bytes.ndim
        busy = size_bytes / self.bandwidth[shape]
        missing = ~np.isfinite(self.latency[shape])
        cost = busy + self.latency[shape] if objective == "latency" else np.where(missing, np.inf, busy)
        return np.where(size_bytes > 0, cost, 0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A solution of the chain problem: stage k is the interval [cuts[k], cuts[k+1]) on device order[k]. `value_s` is the objective in the
    chain's cost model."""

    value_s: float
    cuts: tuple[int, ...]  # from 0 to L
    order: tuple[int, ...]  # indices of devices


def interval_memory(activation_bytes: Sequence[float], params: Sequence[Sequence[tuple[str, float]]], cut_bytes: Floats) -> Floats:
    """(L+1, L+1): what stage [j, i) needs: its parameters, one that several operators share counted once; the largest activation of its
    operators; and the buffered requests' inputs. `params` holds (name, bytes) per operator."""
    length = len(activation_bytes)
    single = np.zeros(length + 1)
    memory = np.zeros((length + 1, length + 1))
    uses: dict[str, list[int]] = {}
    size: dict[str, float] = {}
    for position, used in enumerate(params):
        for name, nbytes in used:
            uses.setdefault(name, []).append(position)
            size[name] = nbytes
    for name, positions in uses.items():
        if len(positions) == 1:
            single[positions[0] + 1] += size[name]
            continue
        before = -1
        for position in positions:  # [j, i) meets the parameter here first
            memory[before + 1 : position + 1, position + 1 :] += size[name]
            before = position
    prefix = np.cumsum(single)
    memory += prefix[None, :] - prefix[:, None]
    activations = np.asarray(activation_bytes, dtype=np.float64)
    for j in range(length):
        memory[j, j + 1 :] += np.maximum.accumulate(activations[j:])
    return memory + BUFFERED_REQUESTS * cut_bytes[:, None]
