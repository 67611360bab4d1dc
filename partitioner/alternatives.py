"""Which codecs the nodes may change to while they serve a plan: `Transfer.codecs`.

Lossless ones always; others only where the plan may lose anything. Without a budget those that may be chosen without a calibration. With one, each
transfer is allotted a share of it, and whatever the nodes choose, the worst on every transfer at once keeps to the budget: by the sum of their
losses, and where a whole plan can be measured, measured so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from partitioner.accuracy import Choice, MeasureLoss
from partitioner.cost import CodecFigures
from partitioner.structure import Structure
from splitnet.codecs import codec_names, get_codec
from splitnet.plan import CLIENT, CodecOption, Plan, Transfer

__all__ = ["with_alternatives"]

_FASTEST_BYTES_PER_S = 1e12  # for what costs nothing; a plan holds finite figures


def with_alternatives(
    plan: Plan,
    choice: Choice,
    structure: Structure,
    *,
    link_codecs: Mapping[tuple[str, str], Sequence[str]],
    measure: MeasureLoss | None,
) -> Plan:
    """The same plan with the codecs that its transfers may use. `link_codecs`: the only ones on a link, as the user wished."""
    permitted = _Permitted(plan, choice, structure, link_codecs)
    if choice.budget is None:
        return permitted.plan(None)
    chosen = {t: permitted.error(t, t.codec) for t in plan.transfers}
    spare = max(choice.budget - sum(chosen.values()), 0.0) * (1 - 1e-9)
    moving = sum(permitted.may_lose(t) for t in plan.transfers)
    for each in (spare / max(moving, 1), 0.0):
        limits = {t: error + each for t, error in chosen.items()}
        found = permitted.plan(limits)
        worst = permitted.worst(found)
        if worst == plan or measure is None or measure(worst) <= choice.budget:
            return found
    return permitted.plan(dict.fromkeys(plan.transfers, 0.0))


@dataclasses.dataclass(frozen=True)
class _Permitted:
    base: Plan
    choice: Choice
    structure: Structure
    link_codecs: Mapping[tuple[str, str], Sequence[str]]

    def plan(self, limits: Mapping[Transfer, float] | None) -> Plan:
        """With what loses no more than its limit, and what the plan has; None: no limit was set."""
        return dataclasses.replace(
            self.base, transfers=tuple(dataclasses.replace(t, codecs=self._options(t, limits)) for t in self.base.transfers)
        )

    def worst(self, plan: Plan) -> Plan:
        """The same with the codec that loses most on every transfer, and without alternatives."""
        return dataclasses.replace(
            plan,
            transfers=tuple(
                dataclasses.replace(t, codec=max((o.name for o in t.codecs), key=lambda name: self.error(t, name), default=t.codec), codecs=())
                for t in plan.transfers
            ),
        )  # fmt: skip

    def may_lose(self, transfer: Transfer) -> bool:
        """Whether the accuracy of what it carries is counted: the cost model and a calibration look at what goes between stages."""
        a, b = self._ends(transfer)
        return CLIENT not in (transfer.source, transfer.target) and a != b and transfer.bytes > 0

    def error(self, transfer: Transfer, codec: str) -> float:
        figures = self.choice.every.get(codec)
        if figures is None or not self.may_lose(transfer):
            return 0.0
        return max(figures.error_of(self.structure.producer[tensor].name) for tensor in transfer.tensors)

    def _options(self, transfer: Transfer, limits: Mapping[Transfer, float] | None) -> tuple[CodecOption, ...]:
        """Empty where there is no choice."""
        ends = self._ends(transfer)
        if ends[0] == ends[1] or not transfer.bytes or transfer.codec not in self.choice.every:
            return ()
        wished = self.link_codecs.get(ends, tuple(self.choice.every))
        names = [
            name
            for name in self.choice.every
            if name == transfer.codec or (name in wished and name in codec_names() and self._keeps(transfer, name, limits))
        ]
        return tuple(self._option(transfer, name, *ends) for name in names) if len(names) > 1 else ()

    def _keeps(self, transfer: Transfer, name: str, limits: Mapping[Transfer, float] | None) -> bool:
        if get_codec(name).lossless:
            return True
        if not self.may_lose(transfer):
            return False
        return limits is None or self.error(transfer, name) <= limits[transfer]

    def _option(self, transfer: Transfer, name: str, source: str, target: str) -> CodecOption:
        figures: CodecFigures = self.choice.every[name]
        makers = {self.structure.producer[tensor].name for tensor in transfer.tensors}

        def speed(seconds_per_byte: float) -> float:
            return min(1.0 / seconds_per_byte, _FASTEST_BYTES_PER_S) if seconds_per_byte else _FASTEST_BYTES_PER_S

        ratio = transfer.bytes / figures.sent_bytes(transfer.bytes, makers)
        return CodecOption(name, ratio, speed(figures.encode_s(1.0, source)), speed(figures.decode_s(1.0, target)))

    def _ends(self, transfer: Transfer) -> tuple[str, str]:
        node = {stage.name: stage.node for stage in self.base.stages} | {CLIENT: self.base.ingress.name}
        return node[transfer.source], node[transfer.target]
