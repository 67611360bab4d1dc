"""Which of the permitted codecs the next tensor of a transfer gets. Pure: the caller reads the clock.

A codec's cost is what the plan's cost model says: for latency the stages at both ends + encoding + wire + decoding; for throughput the busiest of the sender (its stages and
encoding), the link, and the receiver. It changes when another one is clearly better. To fewer bytes at once; to more bytes after a pause, which
doubles each time that this turned out to be wrong: a link whose bandwidth swings is served with the codec that suits its bad times.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nodes.goodput import Goodput
from splitnet.errors import BadInput
from splitnet.plan import CLIENT, CodecOption, Plan, Transfer
from splitnet.wire import tensor_chunks

__all__ = ["CodecChooser", "CodecOnLink", "Load", "chooser_of"]

_BETTER = 0.05  # another codec must cost this share less
_WORTH_S = 0.001  # and save this
_OBVIOUS, _SURE_S = 0.6, 0.2  # what costs less than this share is taken at once, anything else when it was better for this long
_EQUAL = 0.02  # and the plan's own is taken again when it costs no more than this
_ALSO = 0.02  # of what is not the bottleneck: of equals, the one that works least
_TO_FEWER_S, _TO_MORE_S = 0.25, 0.5  # pauses after a switch
_LONGEST_PAUSE_S = 16.0
_REGRET_S = 6.0  # back to fewer bytes so soon: the step to more bytes was wrong
_CALM_S = 20.0  # without a switch, and all is forgiven
_LEARNING = 0.2
_LATELY_S = 10.0  # with a codec that has not been used for so long
SAMPLE_BYTES = 1 << 16  # of a tensor are tried


@dataclass(frozen=True, slots=True)
class Load:
    """What else a request costs at both ends of a transfer of `transfer_bytes`, by the plan: seconds of the stages there, and all bytes that
    take the same link."""

    transfer_bytes: int
    link_bytes: int
    sender_s: float = 0.0
    receiver_s: float = 0.0


@dataclass(slots=True)
class _Seen:
    bytes: float = 0.0
    encoded_bytes: float = 0.0
    largest_bytes: int = 0
    at_s: float = 0.0


@dataclass(eq=False)
class CodecChooser:
    """Begins with `codec`, one of the `options`, and goes back to it where it is as good as any. `ratios` are what the tensors of this transfer really came to, as far as was seen."""

    codec: str
    options: Sequence[CodecOption]
    objective: str
    load: Load
    switches: int = 0
    planned: str = field(init=False)
    ratios: dict[str, float] = field(default_factory=dict)
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _switched_s: float = -math.inf
    _to_more_s: float = -math.inf
    _regrets: int = 0
    _wanted: str = ""
    _wanted_s: float = 0.0

    def __post_init__(self) -> None:
        self.planned = self.codec

    def pick(self, now_s: float, size_bytes: int, bytes_per_s: float) -> str:
        """The codec of a tensor that is to be encoded now. `bytes_per_s`: the link's goodput, 0 where it is not known."""
        if bytes_per_s <= 0 or not size_bytes:
            return self.codec
        if now_s - self._switched_s > _CALM_S:
            self._regrets = 0
        costs = {option.name: self.cost_s(option, size_bytes, bytes_per_s) for option in self.options}
        best = min(costs, key=costs.__getitem__)
        if costs[self.planned] <= costs[best] * (1 + _EQUAL):
            best = self.planned
        elif costs[best] >= costs[self.codec] * (1 - _BETTER) or costs[best] >= costs[self.codec] - _WORTH_S:
            best = self.codec
        if best == self.codec:
            self._wanted = ""
            return self.codec
        if best != self._wanted:
            self._wanted, self._wanted_s = best, now_s
        sure = costs[best] < costs[self.codec] * _OBVIOUS or now_s - self._wanted_s >= _SURE_S
        if not sure or now_s - self._switched_s < self._pause_s(best):
            return self.codec
        if self._fewer(best):
            self._regrets += now_s - self._to_more_s < _REGRET_S * (1 + self._regrets)
        else:
            self._to_more_s = now_s
        self.codec, self._switched_s, self.switches = best, now_s, self.switches + 1
        return best

    def unsure_of(self, now_s: float, size_bytes: int) -> str:
        """A codec of which it is not known, or not of late, or only from much smaller ones, what tensors of this size come to; "" where there is none."""
        sample = min(size_bytes, SAMPLE_BYTES)
        for option in self.options:
            seen = self._seen.get(option.name)
            if option.name != "raw" and (seen is None or now_s - seen.at_s > _LATELY_S or sample > 2 * seen.largest_bytes):
                return option.name
        return ""

    def saw(self, codec: str, size_bytes: int, encoded_bytes: int, now_s: float) -> None:
        """What a chunk came to. A transfer may carry tensors of several kinds: by their bytes."""
        if size_bytes and encoded_bytes and codec != "raw":
            seen = self._seen.setdefault(codec, _Seen())
            seen.bytes = seen.bytes * (1 - _LEARNING) + size_bytes
            seen.encoded_bytes = seen.encoded_bytes * (1 - _LEARNING) + encoded_bytes
            seen.largest_bytes = max(seen.largest_bytes, min(size_bytes, SAMPLE_BYTES))
            seen.at_s = now_s
            self.ratios[codec] = seen.bytes / seen.encoded_bytes

    def cost_s(self, option: CodecOption, size_bytes: int, bytes_per_s: float) -> float:
        """Of a tensor of this size; the load grows with it."""
        scale = size_bytes / self.load.transfer_bytes if self.load.transfer_bytes else 1.0
        shared = max(self.load.link_bytes / self.load.transfer_bytes, 1.0) if self.load.transfer_bytes else 1.0
        encode_s, decode_s = size_bytes / option.encode_bytes_per_s, size_bytes / option.decode_bytes_per_s
        wire_s = size_bytes / self._ratio(option) / bytes_per_s
        if self.objective == "latency":
            return (self.load.sender_s + self.load.receiver_s) * scale + encode_s + wire_s + decode_s
        busiest_s = max(self.load.sender_s * scale + encode_s, wire_s * shared, self.load.receiver_s * scale + decode_s)
        return busiest_s + _ALSO * (encode_s + wire_s + decode_s)

    def _ratio(self, option: CodecOption) -> float:
        return self.ratios.get(option.name, option.ratio)

    def _fewer(self, name: str) -> bool:
        """Whether that codec makes fewer bytes than the present one."""
        by_name: Mapping[str, CodecOption] = {option.name: option for option in self.options}
        return self._ratio(by_name[name]) > self._ratio(by_name[self.codec])

    def _pause_s(self, name: str) -> float:
        return _TO_FEWER_S if self._fewer(name) else min(_TO_MORE_S * 2**self._regrets, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class CodecOnLink:
    """A transfer's chooser with the link that its tensors take; see `nodes.outbox.Chooses`."""

    chooser: CodecChooser
    goodput: Goodput

    def pick(self, array: np.ndarray) -> str:
        now_s = time.monotonic()
        if array.size and (untried := self.chooser.unsure_of(now_s, array.nbytes)):
            with contextlib.suppress(BadInput):  # it cannot be sent at all; whoever sends it will say so
                head, payload = next(tensor_chunks("sample", array, untried, SAMPLE_BYTES))
                self.chooser.saw(untried, head.length, len(payload), now_s)
        return self.chooser.pick(now_s, array.nbytes, self.goodput.bytes_per_s(now_s))

    def saw(self, codec: str, size_bytes: int, encoded_bytes: int) -> None:
        self.chooser.saw(codec, size_bytes, encoded_bytes, time.monotonic())


def chooser_of(plan: Plan, transfer: Transfer) -> CodecChooser | None:
    """None where the transfer's codec stays as it is."""
    if len(transfer.codecs) < 2:
        return None
    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.ingress.name}
    ends = node[transfer.source], node[transfer.target]
    if ends[0] == ends[1]:
        return None
    busy_s = {name: math.fsum(stage.seconds for stage in plan.stages if stage.node == name) for name in ends}
    link_bytes = sum(t.bytes for t in plan.transfers if (node[t.source], node[t.target]) == ends)
    load = Load(transfer.bytes, link_bytes, busy_s[ends[0]], busy_s[ends[1]])
    return CodecChooser(transfer.codec, transfer.codecs, plan.objective, load)
