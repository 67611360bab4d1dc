"""What a forward pass does on a stage, and how that travels: the field `steps` of the frame that carries the pass's tensor.

All numbers are unsigned LEB128 varints unless said otherwise, in this order: the format (1); for each earlier stage the microseconds that it computed, and the units of 64
microseconds that the pass waited for its turn there, with the number of stages before them; sessions to close, with their count; forks (source, target, tokens), with their count; steps, with their count. A step: session, position, twice the number of its
tokens (plus 1 where sampling follows), wanted, sampling, tokens. Sampling: temperature, top_p, repetition_penalty (float32, little-endian), top_k, seed (8 bytes, little-endian).
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

import numpy as np

from nodes.engines.decoder.steps import Sampling, Step
from splitnet.errors import ProtocolError

__all__ = ["MAX_STEPS", "MAX_TOKENS", "Fork", "Orders", "decode_orders", "encode_orders"]

MAX_STEPS = 4096  #: steps, forks or sessions to close in one pass
MAX_TOKENS = 1 << 18  #: of all steps of a pass
_FORMAT = 1
_MAX_STAGES = 1024
_COMPUTE_UNIT_S, _WAIT_UNIT_S = 1e-6, 64e-6
_LARGEST = (1 << 64) - 1
_LARGEST_TOKEN = (1 << 31) - 1
_FIGURES = struct.Struct("<fff")


@dataclass(frozen=True, slots=True)
class Fork:
    """`target` begins with the first `tokens` positions of `source`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Orders:
    """Done in this order: close, fork, step. `timings`: seconds that the pass was computed and that it waited, on each stage before."""

    steps: tuple[Step, ...] = ()
    forks: tuple[Fork, ...] = ()
    closes: tuple[int, ...] = ()
    timings: tuple[tuple[float, float], ...] = ()

    def timed(self, compute_s: float, wait_s: float) -> Orders:
        """As a stage leaves them behind."""
        return dataclasses.replace(self, timings=(*self.timings, (compute_s, wait_s)))

    def onward(self, *, answer: bool) -> Orders:
        """What goes on the wire: to the ingress only how long it took."""
        return Orders(timings=self.timings) if answer else self


def encode_orders(orders: Orders) -> bytes:
    out = bytearray((_FORMAT,))
    _put(out, len(orders.timings))
    for compute_s, wait_s in orders.timings:
        _put(out, int(compute_s / _COMPUTE_UNIT_S), int(wait_s / _WAIT_UNIT_S))
    _put(out, len(orders.closes), *orders.closes)
    _put(out, len(orders.forks))
    for fork in orders.forks:
        _put(out, fork.source, fork.target, fork.tokens)
    _put(out, len(orders.steps))
    for step in orders.steps:
        sampling = step.sampling
        _put(out, step.session, step.position, 2 * len(step.tokens) + (sampling is not None), step.wanted)
        if sampling is not None:
            out += _FIGURES.pack(sampling.temperature, sampling.top_p, sampling.repetition_penalty)
            _put(out, sampling.top_k)
            out += sampling.seed.to_bytes(8, "little")
        _put(out, *step.tokens.tolist())
    return bytes(out)


def decode_orders(data: bytes) -> Orders:
    """Raises ProtocolError for what is not the encoding of orders, or of too many."""
    reader = _Reader(data)
    if reader.number() != _FORMAT:
        raise ProtocolError("a forward pass in a format that is not known here", remedy="run the same version of splitnet on all nodes")
    timings = tuple((reader.number() * _COMPUTE_UNIT_S, reader.number() * _WAIT_UNIT_S) for _ in range(reader.count(_MAX_STAGES)))
    closes = tuple(reader.number() for _ in range(reader.count(MAX_STEPS)))
    forks = tuple(Fork(reader.number(), reader.number(), reader.number()) for _ in range(reader.count(MAX_STEPS)))
    steps, left = [], MAX_TOKENS
    for _ in range(reader.count(MAX_STEPS)):
        steps.append(reader.step(left))
        left -= len(steps[-1].tokens)
    reader.finish()
    return Orders(tuple(steps), forks, closes, timings)


def _put(out: bytearray, *numbers: int) -> None:
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        value = shift = 0
        while shift < 64:
            if self._at >= len(self._data):
                raise ProtocolError("the steps of a forward pass are cut short")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > _LARGEST:
                    break
                return value
            shift += 7
        raise ProtocolError("the steps of a forward pass hold a number of more than 64 bits")

    def count(self, most: int) -> int:
        value = self.number()
        if value > most or value > len(self._data):  # each takes a byte at least
            raise ProtocolError(f"the steps of a forward pass announce {value} of something; at most {most} are taken")
        return value

    def step(self, most: int) -> Step:
        session, position, twice, wanted = self.number(), self.number(), self.number(), self.number()
        count = twice >> 1
        if not 0 < count <= most or wanted > count or position >= 1 << 32:
            raise ProtocolError(f"a step at position {position} has {count} tokens and wants {wanted}")
        sampling = self._sampling() if twice & 1 else None
        tokens = np.fromiter((self._token() for _ in range(count)), np.int32, count) if count < len(self._data) else self._short()
        return Step(session, position, tokens, wanted, sampling)

    def _token(self) -> int:
        token = self.number()
        if token > _LARGEST_TOKEN:
            raise ProtocolError(f"a step holds the token id {token}")
        return token

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError(f"{len(self._data) - self._at} bytes follow the steps of a forward pass")

    def _sampling(self) -> Sampling:
        figures = self._take(_FIGURES.size)
        top_k = self.number()
        temperature, top_p, penalty = _FIGURES.unpack(figures)
        if not (0 <= temperature < 1e6 and 0 < top_p <= 1 and 0 < penalty < 1e6):  # not so for NaN either
            raise ProtocolError(f"a step is to be sampled with temperature {temperature}, top_p {top_p}, penalty {penalty}")
        return Sampling(temperature, top_p, top_k, penalty, int.from_bytes(self._take(8), "little"))

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            self._short()
        return self._data[self._at - count : self._at]

    def _short(self) -> np.ndarray:
        raise ProtocolError("the steps of a forward pass are cut short")
