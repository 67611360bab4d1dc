"""What people ask of a plan besides that it be good: who may run what, what is taken, which codecs, how much loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from splitnet.errors import BadInput, NoPlan
from splitnet.noise import Noise

__all__ = ["Constraints", "Operator", "allowed_operators", "matching", "stage_range"]


@dataclass(frozen=True)
class Operator:
    """What a pattern is matched with. `reads_input`: it uses a raw input. `gives_output`: its result is an answer. `before`: the
    operators that it uses, by position."""

    name: str
    scope: str = ""
    reads_input: bool = False
    gives_output: bool = False
    before: tuple[int, ...] = ()
    counts: bool = True  # among "the first k"; inputs and what may be computed anywhere do not


@dataclass(frozen=True)
class Constraints:
    """pin: pattern -> node that runs what matches. forbid: nodes that run nothing. forbid_operators: node -> patterns that it does not run.
    input_at: the node whose stage takes the raw input, the ingress. output_at: the node that makes the answer. private: (node, k or pattern):
    raw inputs, the first k operators (or all that match, and what comes before them) stay on the node. taken: node -> (bytes, share of its time)
    that others use. noise: on what leaves the node of `private` for others. link_codecs: (a, b) -> the codecs that may be used there. max_accuracy_loss: what the codecs' errors may add up to.

    A pattern is an operator's name, a module path ("encoder.layer.6": all that is inside), or either with * and ?.
    """

    pin: Mapping[str, str] = field(default_factory=dict)
    forbid: Sequence[str] = ()
    forbid_operators: Mapping[str, Sequence[str]] = field(default_factory=dict)
    input_at: str = ""
    output_at: str = ""
    private: tuple[str, int | str] | None = None
    taken: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    link_codecs: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    max_accuracy_loss: float | None = None
    noise: Noise | None = None

    def check(self, devices: Sequence[str], codecs: Sequence[str]) -> None:
        """Raises BadInput naming the wish that cannot be."""
        named = [("pin", node) for node in self.pin.values()]
        named += [("forbid", node) for node in (*self.forbid, *self.forbid_operators)]
        named += [("taken", node) for node in self.taken]
        named += [(what, node) for what, node in (("input_at", self.input_at), ("output_at", self.output_at)) if node]
        named += [("private", self.private[0])] if self.private else []
        named += [("link_codecs", end) for pair in self.link_codecs for end in pair]
        for what, node in named:
            if node not in devices:
                raise BadInput(f"{what}: there is no node {node!r}; there are {', '.join(devices)}")
            if what not in ("forbid", "taken", "link_codecs") and node in self.forbid:
                raise BadInput(f"{what} asks for node {node!r}, which is forbidden", remedy="take back one of the two")
        for (a, b), names in self.link_codecs.items():
            for name in names:
                if name not in codecs:
                    raise BadInput(f"link {a!r} -> {b!r}: there are no figures for the codec {name!r}; there are for {', '.join(codecs)}")
        for node, (size, share) in self.taken.items():
            if not (0 <= size < math.inf and 0 <= share < 1):
                raise BadInput(
                    f"taken: node {node!r}: bytes must be finite and not negative, and the share be within [0, 1), got {size}, {share}"
                )
        if self.max_accuracy_loss is not None and not self.max_accuracy_loss >= 0:
            raise BadInput(f"max_accuracy_loss must not be negative, got {self.max_accuracy_loss}")
        if self.noise is not None and not self.private:
            raise BadInput(
                "noise needs `private`: the node that may see the raw input, and what else stays there",
                remedy="say which, as --private camera=1",
            )
        if self.noise is not None and self.max_accuracy_loss:
            raise BadInput(
                "max_accuracy_loss is about what codecs lose, and noise loses more, by chance",
                remedy="leave it out; `splitnet privacy` measures what noise costs",
            )
        if self.private and self.input_at and self.private[0] != self.input_at:
            raise BadInput(f"private keeps the raw input on {self.private[0]!r}, but input_at asks for {self.input_at!r}")

    @property
    def ingress(self) -> str:
        return self.private[0] if self.private else self.input_at


def matching(pattern: str, operators: Sequence[Operator]) -> list[int]:
    """The positions that a pattern stands for. Raises BadInput where there are none."""
    found = [i for i, o in enumerate(operators) if o.name == pattern]
    found = found or [i for i, o in enumerate(operators) if o.scope == pattern or o.scope.startswith(pattern + ".")]
    found = found or [i for i, o in enumerate(operators) if fnmatchcase(o.name, pattern) or fnmatchcase(o.scope, pattern)]
    if not found:
        close = sorted({text for o in operators for text in (o.name, o.scope) if text and pattern.strip("*?") in text}, key=len)[:3]
        raise BadInput(
            f"no operator {pattern!r} in the model, and no module of that name", remedy=f"did you mean {', '.join(close)}?" if close else ""
        )
    return found


def allowed_operators(wishes: Constraints, devices: Sequence[str], operators: Sequence[Operator]) -> np.ndarray | None:
    """(M, L) bool: which device may run which operator; None where all may run all. Raises NoPlan naming the operator and the wishes where no
    device is left for it."""
    allowed = np.ones((len(devices), len(operators)), dtype=bool)
    why: dict[int, list[str]] = {}

    def only(positions: Sequence[int], node: str, reason: str) -> None:
        for i in positions:
            allowed[[d for d, name in enumerate(devices) if name != node], i] = False
            why.setdefault(i, []).append(reason)

    for pattern, node in wishes.pin.items():
        only(matching(pattern, operators), node, f"{pattern!r} is pinned to {node!r}")
    for node, patterns in wishes.forbid_operators.items():
        for pattern in patterns:
            for i in matching(pattern, operators):
                allowed[devices.index(node), i] = False
                why.setdefault(i, []).append(f"{pattern!r} is forbidden on {node!r}")
    for node in wishes.forbid:
        allowed[devices.index(node)] = False
        for i in range(len(operators)):
            why.setdefault(i, []).append(f"node {node!r} is forbidden")
    if wishes.ingress:
        only([i for i, o in enumerate(operators) if o.reads_input], wishes.ingress, f"the raw input stays on {wishes.ingress!r}")
    if wishes.output_at:
        only([i for i, o in enumerate(operators) if o.gives_output], wishes.output_at, f"the answer is made on {wishes.output_at!r}")
    if wishes.private:
        node, first = wishes.private
        only(_first(first, operators), node, f"the first layers are private to {node!r}")
    for i in map(int, np.flatnonzero(~allowed.any(axis=0))):
        raise NoPlan(
            f"no node may run operator {operators[i].name!r}: {'; '.join(why[i])}",
            remedy="take back one of these wishes",
        )
    return None if allowed.all() else allowed


def _first(which: int | str, operators: Sequence[Operator]) -> list[int]:
    if not isinstance(which, str):
        if which < 0:
            raise BadInput(f"private: how many layers must not be negative, got {which}")
        return [i for i, o in enumerate(operators) if o.counts][:which]
    wanted, pending = set(), matching(which, operators)
    while pending:
        at = pending.pop()
        if at not in wanted:
            wanted.add(at)
            pending.extend(operators[at].before)
    return sorted(wanted)


def stage_range(devices: int, stages: int | range | None, max_stages: int | None = None) -> range:
    """How many stages there may be: so many, from..to as a range, or at most. Raises BadInput for a number below 1."""
    low, high = 1, devices
    if isinstance(stages, range):
        low, high = min(stages, default=0), min(max(stages, default=0), devices)
    elif stages is not None:
        low = high = stages
    for name, figure in (("stages", low), ("max_stages", max_stages)):
        if figure is not None and figure < 1:
            raise BadInput(f"{name} must be at least 1, got {figure}")
    asked = f"{'at least ' if isinstance(stages, range) else ''}{low} stages were asked for"
    if low > devices:
        raise NoPlan(f"{asked}, but there are {devices} nodes", remedy="ask for fewer stages, or add nodes")
    if max_stages is not None and low > max_stages:
        raise NoPlan(f"{asked}, and at most {max_stages}", remedy="take back one of the two")
    return range(low, min(high, max_stages or high) + 1)
