"""Noise on what leaves the stage with the raw input, and its memory: what has left once leaves again as it was, or not at all.

When a node is lost, the ingress sends what was under way again, from the inputs. Noise that were drawn anew would show other nodes the same values twice, which is
a second release: half of the noise's protection, and more each time. So a call keeps what has left of it until it has ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from splitnet.errors import BadShard, NodeUnavailable
from splitnet.noise import Noise, noised_values
from splitnet.plan import Plan, StageSpec
from splitnet.releasing import Randomness, release
from splitnet.shard import Shard

__all__ = ["Released", "StageNoise", "check_same_noise"]


@dataclass(eq=False)
class StageNoise:
    """Of one stage. `axes`: the values that leave for other stages, and where samples lie in them. `released`: how many samples (or requests) have left, since
    activation, what was sent again not counted."""

    noise: Noise
    axes: Mapping[str, int | None]
    shard: str
    randomness: Randomness = os.urandom
    released: int = 0

    @classmethod
    def of(cls, plan: Plan, spec: StageSpec, shard: str) -> StageNoise | None:
        """None for a stage that sees nothing raw, and where there is no noise."""
        if plan.noise is None or spec.name != plan.stages[0].name:
            return None
        return cls(plan.noise, noised_values(plan), shard)

    def protect(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The stage's outputs, those that leave with noise. In the compute thread. Raises EngineFailure; then nothing may leave."""
        return {**outputs, **release(outputs, self.noise, self.axes, self.randomness)}


class Released:
    """What has left of one call, by one cut."""

    def __init__(self) -> None:
        self._by: tuple[str, Noise] | None = None
        self._kept: dict[str, np.ndarray] = {}
        self._there = np.zeros(0, bool)  # which rows

    def replace(self, values: dict[str, np.ndarray], noise: StageNoise, start: int, first: int, rows: int | None, of: int) -> int:
        """Where rows have left before, puts what left then into `values`; keeps the others, and says how many bytes that takes. `values` hold rows of several calls: this one's,
        `first` and so many `rows` of all `of`, begin at `start`. `rows` None: they hold this call and nothing else. Raises NodeUnavailable where the call has left by another cut: that would be a
        second look at it, from another side."""
        by = noise.shard, noise.noise
        if self._kept and self._by != by:
            raise NodeUnavailable(
                "a node was lost with the request, and the plan that took over cuts elsewhere: what has left of it with noise may not leave another way",
                remedy="send the request again; it counts as another one",
            )
        self._by = by
        if rows is None:
            return self._whole(values, noise)
        taken = {n: _rows(values[n], axis, start, rows) for n, axis in noise.axes.items() if axis is not None}
        new_bytes = 0
        if not self._kept:
            self._there = np.zeros(of, bool)
            self._kept = {n: np.empty(_shape(a, noise.axes[n], of), a.dtype) for n, a in taken.items()}
            new_bytes = sum(array.nbytes for array in self._kept.values())
        known = self._there[first : first + rows]
        for name, array in taken.items():
            axis = noise.axes[name] or 0
            kept = np.moveaxis(_rows(self._kept[name], axis, first, rows), axis, 0)
            fresh = np.moveaxis(array, axis, 0)
            fresh[known] = kept[known]
            kept[~known] = fresh[~known]
        noise.released += int((~known).sum())
        known[:] = True
        return new_bytes

    def _whole(self, values: dict[str, np.ndarray], noise: StageNoise) -> int:
        if self._kept:
            values.update(self._kept)
            return 0
        self._kept = {name: values[name] for name in noise.axes}
        name, axis = next(iter(noise.axes.items()))
        noise.released += 1 if axis is None else values[name].shape[axis]
        return sum(array.nbytes for array in self._kept.values())


def check_same_noise(plan: Plan, spec: StageSpec, shard: Shard) -> None:
    """Raises BadShard where the plan would serve the shard with other noise than it was cut for, or with none: whoever may bring a plan here, as the other nodes may to
    replace a lost one, cannot turn off what the operator has signed."""
    planned = plan.noise if spec.name == plan.stages[0].name else None
    if (cut := shard.manifest.noise) != planned:
        raise BadShard(
            f"stage {spec.name!r}: shard {shard.sha256[:12]} was cut to be served {_said(cut)}, and the plan says {_said(planned)}",
            remedy="cut the model with this plan again: noise is a part of the shard",
        )


def _said(noise: Noise | None) -> str:
    return "without noise" if noise is None else f"with noise ({noise.promise()}, norms up to {noise.clip_norm:g})"


def _rows(array: np.ndarray, axis: int, first: int, rows: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(first, first + rows),)]


def _shape(array: np.ndarray, axis: int | None, rows: int) -> tuple[int, ...]:
    return tuple(rows if k == axis else size for k, size in enumerate(array.shape))
