"""The problem that the chain solver takes: operators in one order, devices, what each interval and each cut costs. Plain arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from partitioner.cost import BUFFERED_REQUESTS

__all__ = ["Candidate", "ChainProblem", "Codecs", "Floats", "Objective", "Overheads", "interval_ends", "interval_memory"]

Floats: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Objective: TypeAlias = Literal["latency", "throughput"]


@dataclass(frozen=True, eq=False)
class Codecs:
    """C codecs as arrays; the first is the one that answers travel in. `permitted` says which may be used from row to column."""

    names: tuple[str, ...]
    ratio: Floats  # (C,); the best of each codec's where it differs by position
    encode: Floats  # (C, M): bytes per second
    decode: Floats  # (C, M)
    error: Floats  # (C, L+1): of a cut at each position
    permitted: np.ndarray  # (C, M, M) bool
    ratio_at: Floats | None = None  # (C, L+1): of a cut at each position, where it differs

    def at(self, positions: Sequence[int]) -> Codecs:
        """The figures of these positions only."""
        ratio_at = None if self.ratio_at is None else self.ratio_at[:, list(positions)]
        return replace(self, error=self.error[:, list(positions)], ratio_at=ratio_at)

    @classmethod
    def raw(cls, devices: int, length: int) -> Codecs:
        """One codec that costs nothing."""
        free = np.full((1, devices), np.inf)
        return cls(("raw",), np.ones(1), free, free, np.zeros((1, length + 1)), np.ones((1, devices, devices), dtype=bool))


@dataclass(frozen=True, eq=False)
class Overheads:
    """`partitioner.cost.Overhead` of each device: (M,) each."""

    stage_s: Floats
    message_s: Floats
    request_s: Floats

    @classmethod
    def none(cls, devices: int) -> Overheads:
        return cls(np.zeros(devices), np.zeros(devices), np.zeros(devices))


@dataclass(frozen=True, eq=False)
class ChainProblem:
    """L operators in a fixed order and M devices. Position i stands before operator i; a stage is a half-open interval [j, i).

    Two devices without a link have latency inf. A device without a memory limit has limit inf. Answers return to the first stage's
    device in the codec "raw", or in the first one where there is no "raw".
    """

    devices: tuple[str, ...]
    seconds: Floats  # (M, L): each operator on each device
    memory: Floats  # (L+1, L+1): bytes that stage [j, i) needs; see `interval_memory`
    limits: Floats  # (M,): bytes
    cut_bytes: Floats  # (L+1,): what crosses position i when there is a cut
    return_bytes: float  # what the last stage sends back to the first stage's device
    bandwidth: Floats  # (M, M): bytes per second, from row to column
    latency: Floats  # (M, M): seconds
    cut_tensors: Floats | None = None  # (L+1,): how many tensors these are; one where it is not said
    return_tensors: int = 1
    given_codecs: Codecs | None = None
    given_overheads: Overheads | None = None
    allowed: np.ndarray | None = None  # (M, L) bool: which device may run which operator
    given_ends: np.ndarray | None = None  # (M, L+1): `last_end`, where positions are too many for `memory`

    @property
    def length(self) -> int:
        return self.seconds.shape[1]

    @functools.cached_property
    def codecs(self) -> Codecs:
        return self.given_codecs or Codecs.raw(len(self.devices), self.length)

    @functools.cached_property
    def overheads(self) -> Overheads:
        return self.given_overheads or Overheads.none(len(self.devices))

    @functools.cached_property
    def prefix(self) -> Floats:
        """(M, L+1): seconds of the operators [0, i) on each device."""
        return np.concatenate([np.zeros((len(self.devices), 1)), np.cumsum(self.seconds, axis=1)], axis=1)

    @functools.cached_property
    def possible(self) -> np.ndarray:
        """(M, L+1, L+1) bool: whether stage [j, i) is one, fits, and is allowed."""
        fits = self.memory[None] <= self.limits[:, None, None]
        fits &= np.triu(np.ones(self.memory.shape, dtype=bool), 1)
        if self.allowed is not None:
            barred = np.concatenate([np.zeros((len(self.devices), 1)), np.cumsum(~self.allowed, axis=1)], axis=1)
            fits &= barred[:, :, None] == barred[:, None, :]
        return fits

    @functools.cached_property
    def last_end(self) -> np.ndarray:
        """(M, L+1): the last end of a stage that starts at each position, 0 where there is none; all ends before it are possible too."""
        if self.given_ends is not None:
            return self.given_ends
        possible = self.possible
        return np.where(possible.any(axis=2), self.length - possible[:, :, ::-1].argmax(axis=2), 0)

    @functools.cached_property
    def stage_seconds(self) -> Floats:
        """(M, L+1, L+1): seconds of stage [j, i) on each device, its overhead included; inf where it cannot be."""
        seconds: Floats = self.prefix[:, None, :] - self.prefix[:, :, None]
        return np.where(self.possible, np.maximum(seconds, 0.0) + self.overheads.stage_s[:, None, None], np.inf)

    @functools.cached_property
    def send_s(self) -> Floats:
        """(C, M, L+1): the sender's processor time for a cut at each position."""
        return self._ends(self.codecs.encode)

    @functools.cached_property
    def take_s(self) -> Floats:
        """(C, M, L+1): the receiver's."""
        return self._ends(self.codecs.decode)

    def _ends(self, speed: Floats) -> Floats:
        tensors = self.cut_tensors if self.cut_tensors is not None else np.ones(self.length + 1)
        messages = self.overheads.message_s[:, None] * tensors
        return np.where(self.cut_bytes > 0, self.cut_bytes / speed[:, :, None] + messages[None], 0.0)

    @functools.cached_property
    def wire_s(self) -> Floats:
        """(C, M, M, L+1): how long a cut keeps the link busy; inf where there is no link, or the codec is not permitted on it."""
        ratio = self.codecs.ratio[:, None] if self.codecs.ratio_at is None else self.codecs.ratio_at
        busy = self.cut_bytes / ratio[:, None, None, :] / self.bandwidth[None, :, :, None]
        missing = ~np.isfinite(self.latency)[None] | ~self.codecs.permitted
        return np.where(self.cut_bytes > 0, np.where(missing[..., None], np.inf, busy), 0.0)

    @functools.cached_property
    def travel_s(self) -> Floats:
        """(C, M, M, L+1): from the end of one stage to the start of the next: encode, travel, decode."""
        latency = np.where(self.cut_bytes > 0, self.latency[:, :, None], 0.0)
        return self.send_s[:, :, None] + latency[None] + self.wire_s + self.take_s[:, None]

    @functools.cached_property
    def back_send_s(self) -> Floats:
        """(M,): the processor time of the device that sends the answer."""
        return self._back(self.codecs.encode)

    @functools.cached_property
    def back_take_s(self) -> Floats:
        """(M,): and of the one that takes it."""
        return self._back(self.codecs.decode)

    def _back(self, speed: Floats) -> Floats:
        if not self.return_bytes:
            return np.zeros(len(self.devices))
        spent: Floats = self.return_bytes / speed[0] + self.overheads.message_s * self.return_tensors
        return spent

    @functools.cached_property
    def back_wire_s(self) -> Floats:
        """(M, M): how long the answer keeps the link from the last device to the first busy; inf where there is none."""
        if not self.return_bytes:
            return np.zeros(self.latency.shape)
        return np.where(np.isfinite(self.latency), self.return_bytes / self.codecs.ratio[0] / self.bandwidth, np.inf)

    @functools.cached_property
    def back_s(self) -> Floats:
        """(M, M): from the end of the last stage until the answer is at the first device."""
        if not self.return_bytes:
            return np.zeros(self.latency.shape)
        return self.back_send_s[:, None] + self.latency + self.back_wire_s + self.back_take_s[None]

    def price(self, candidate: Candidate) -> tuple[float, float, float]:
        """(latency, bottleneck, error) of a candidate in the chain's cost model; inf where it cannot be."""
        order, cuts, codecs = candidate.order, candidate.cuts, candidate.codecs
        first, many = order[0], len(order) > 1
        latency, bottleneck, error = float(self.overheads.request_s[first]), 0.0, 0.0
        for k, (j, i) in enumerate(pairwise(cuts)):
            device = order[k]
            seconds = max(float(self.prefix[device, i] - self.prefix[device, j]), 0.0) + float(self.overheads.stage_s[device])
            seconds = seconds if j < i <= self.last_end[device, j] else math.inf
            latency += seconds
            load = seconds + (self.overheads.request_s[device] if k == 0 else self.take_s[codecs[k - 1], device, j])
            if k + 1 < len(order):
                load += self.send_s[codecs[k], device, i]
                latency += self.travel_s[codecs[k], device, order[k + 1], i]
                bottleneck = max(bottleneck, float(self.wire_s[codecs[k], device, order[k + 1], i]))
                error += float(self.codecs.error[codecs[k], i]) if self.cut_bytes[i] > 0 else 0.0
            elif many:
                load += self.back_send_s[device]
            if k == 0 and many:
                load += self.back_take_s[device]
            bottleneck = max(bottleneck, float(load))
        if many:
            latency += self.back_s[order[-1], first]
            bottleneck = max(bottleneck, float(self.back_wire_s[order[-1], first]))
        return float(latency), bottleneck, error


@dataclass(frozen=True, slots=True)
class Candidate:
    """A solution of the chain problem: stage k is the interval [cuts[k], cuts[k+1]) on device order[k], and sends in codecs[k] to the next.
    `value_s` is the objective in the chain's cost model."""

    value_s: float
    cuts: tuple[int, ...]  # from 0 to L
    order: tuple[int, ...]  # indices of devices
    codecs: tuple[int, ...] = ()  # indices of codecs, one per inner cut


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


def interval_ends(
    activation_bytes: Sequence[float], param_bytes: Sequence[float], cut_bytes: Floats, limits: Floats, barred: np.ndarray | None
) -> np.ndarray:
    """(M, L+1): the last end of a stage that starts at each position, by `interval_memory` (no parameter is shared) and what is barred (M, L); 0 where
    there is none. By doubling: no figure for every pair of positions."""
    length = len(activation_bytes)
    prefix = np.concatenate([[0.0], np.cumsum(param_bytes)])
    largest = [np.asarray(activation_bytes, dtype=np.float64)]  # over 2^p operators from each
    while 2 << (len(largest) - 1) <= length:
        half = 1 << (len(largest) - 1)
        largest.append(np.maximum(largest[-1][:-half], largest[-1][half:]))
    starts = np.arange(length)
    found = np.zeros((len(limits), length + 1), dtype=np.int64)
    for device, limit in enumerate(limits):
        forbidden = np.zeros(length + 1) if barred is None else np.concatenate([[0], np.cumsum(barred[device])])
        end, activation = starts.copy(), np.zeros(length)
        for p in range(len(largest) - 1, -1, -1):
            reach = np.minimum(end + (1 << p), length)
            wider = np.maximum(activation, largest[p][np.minimum(end, len(largest[p]) - 1)])
            fits = prefix[reach] - prefix[:-1] + wider + BUFFERED_REQUESTS * cut_bytes[:-1] <= limit
            fits &= (end + (1 << p) <= length) & (forbidden[reach] == forbidden[:-1])
            end, activation = np.where(fits, reach, end), np.where(fits, wider, activation)
        found[device, :-1] = np.where(end > starts, end, 0)
    return found
