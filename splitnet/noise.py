"""What leaves the node that holds the raw input, with noise: the bound and the promise, and where in a plan they hold.

The promise: what the other nodes see of one sample hardly depends on what the sample was. Precisely, for any two inputs of the same shapes that
differ in one sample (any other in its place: replacement), whatever the other nodes together could find out from what crosses the first cut is as likely
from one as from the other, up to a factor e^epsilon and an addition of delta. All that crosses the first cut counts as one vector; it is scaled down to a norm
of at most `clip_norm`, so replacement moves it by at most twice that, and normal noise is added (`splitnet.gaussian`, `splitnet.releasing`). What comes after, codecs and
all other stages included, only processes it. docs/privacy.md says what this is worth, and what it does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from splitnet.batching import find_batch_axes
from splitnet.errors import BadPlan
from splitnet.gaussian import epsilon_of, ratio_of

if TYPE_CHECKING:
    from splitnet.plan import Plan
    from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["FLOATS", "REQUEST", "SAMPLE", "Noise", "check_noise", "noised_values"]

SAMPLE, REQUEST = "sample", "request"
FLOATS = ("float64", "float32", "float16", "bfloat16")  #: what noise can be added to
_CLIENT = ""  # splitnet.plan.CLIENT, which that module defines after it has read this one
_RANGES = {"epsilon": (1e-4, 1e4), "delta": (1e-15, 0.1), "clip_norm": (1e-9, 1e12)}


@dataclass(frozen=True, slots=True)
class Noise:
    """(`epsilon`, `delta`) for each sample, or for each request as a whole (`per`), of vectors of norm at most `clip_norm`. Per sample: rows of a batch, each clipped
    by itself; it is for whoever asks for it to say that the model treats them one by one, as with `Batching`. Raises BadPlan."""

    epsilon: float
    delta: float
    clip_norm: float
    per: str = SAMPLE

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise BadPlan(f"noise: {name} must be a number from {least:g} to {most:g}, got {value!r:.80}")
            object.__setattr__(self, name, float(value))
        if self.per not in (SAMPLE, REQUEST):
            raise BadPlan(f"noise: it is per {SAMPLE!r} or per {REQUEST!r}, got {self.per!r:.80}")

    @property
    def sensitivity(self) -> float:
        """How far replacement can move what is released."""
        return 2 * self.clip_norm

    @property
    def sigma(self) -> float:
        """The deviation of the noise that is added to every value."""
        return self.sensitivity / _ratio(self.epsilon, self.delta)

    def epsilon_after(self, releases: int) -> float:
        """For the same delta: what so many samples (or requests) about one person come to together."""
        return epsilon_of(self.sensitivity / self.sigma * math.sqrt(releases), self.delta)

    @classmethod
    def from_message(cls, message: pb.NoiseStatus) -> Noise:
        """Raises BadPlan for what cannot be."""
        return cls(message.epsilon, message.delta, message.clip_norm, message.per)

    def promise(self) -> str:
        """For people, in a few words."""
        return f"({self.epsilon:g}, {self.delta:g})-differentially private per {self.per}"


@lru_cache(maxsize=256)
def _ratio(epsilon: float, delta: float) -> float:
    return ratio_of(epsilon, delta)


def noised_values(plan: Plan) -> Mapping[str, int | None]:
    """The values that leave the plan's first stage for other stages, and the axis of each along which samples lie (None: per request). Raises BadPlan
    where noise per sample is asked for and there is no such axis."""
    noise, first = plan.noise, plan.stages[0]
    if noise is None:
        return {}
    leaving = {t for transfer in plan.transfers if transfer.source == first.name and transfer.target != _CLIENT for t in transfer.tensors}
    specs = {spec.name: spec for spec in first.outputs if spec.name in leaving}
    if noise.per == REQUEST:
        return dict.fromkeys(specs)
    try:
        return dict(find_batch_axes(plan.inputs, specs).outputs)
    except BadPlan as error:
        raise BadPlan(f"noise per sample: {error.message}", remedy="ask for noise per request") from None


def check_noise(plan: Plan) -> None:
    """Everything that is made of the raw input leaves the first stage's node with noise, or not at all. Raises BadPlan."""
    noise, first = plan.noise, plan.stages[0]
    if noise is None:
        return
    if plan.generation is not None:
        raise BadPlan(
            "noise is for models that answer a request at once: text that is generated would release every token's activations anew",
            remedy="leave the noise away, or keep the layers that matter on your own node",
        )
    for transfer in plan.transfers:
        if transfer.source == _CLIENT and transfer.target != first.name:
            raise BadPlan(
                f"the raw input {transfer.tensors[0]!r} goes to stage {transfer.target!r} as it is, past the noise of stage {first.name!r}",
                remedy="cut where the rest of the model needs no raw input",
            )
    if first.replicas:
        raise BadPlan(
            f"stage {first.name!r} sees the raw input, and has a replica on {first.replicas[0]!r}, which would see it too",
            remedy="give replicas to the other stages only",
        )
    axes = noised_values(plan)
    if not axes:
        raise BadPlan("nothing crosses a cut of this plan, so there is nothing to add noise to", remedy="leave the noise away")
    for spec in first.outputs:
        if spec.name in axes and spec.dtype not in FLOATS:
            raise BadPlan(
                f"value {spec.name!r}, which leaves stage {first.name!r}, is {spec.dtype}: it would pass without noise, which is for floating-point numbers",
                remedy="cut elsewhere, or give the model without that input (such as a mask: send requests without padding)",
            )
    if plan.batching.on and noise.per == REQUEST:
        raise BadPlan(
            "noise per request: requests cannot be joined or divided, each is clipped as a whole",
            remedy="leave --max-batch and --microbatch away, or ask for noise per sample",
        )
