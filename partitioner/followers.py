"""How a plan that is followed is made again, priced and cut: for models that were captured, and for those that generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from partitioner.graph import ModelGraph
from partitioner.observing import Measured, price
from partitioner.profiling import Profile
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, BadPlan
from splitnet.plan import Plan
from splitnet.shard import Shard

__all__ = ["CapturedFollower", "Follower"]

P_contra = TypeVar("P_contra", bound=Measured, contravariant=True)


class Follower(Protocol[P_contra]):
    """`asked` are wishes, as for `partitioner.plan`. What cannot be planned is NoPlan, BadInput or BadCluster; a plan that cannot serve takes infinitely long."""

    @property
    def can_cut(self) -> bool: ...

    def price(self, plan: Plan, profile: P_contra, cluster: Cluster) -> float: ...

    def plan(self, present: Plan, profile: P_contra, cluster: Cluster, asked: Mapping[str, Any]) -> Plan: ...

    def cut(self, plan: Plan, folder: Path) -> Mapping[str, Shard]: ...


class CapturedFollower:
    """Of a captured model; without one nothing can be cut."""

    def __init__(self, model: ModelGraph | None, profile: Profile) -> None:
        if model is not None and model.sha256 != profile.structure.sha256:
            raise BadPlan("the profile is of another model", remedy="profile this model")
        self._model = model

    @property
    def can_cut(self) -> bool:
        return self._model is not None

    def price(self, plan: Plan, profile: Profile, cluster: Cluster) -> float:
        return price(plan, profile, cluster)

    def plan(self, present: Plan, profile: Profile, cluster: Cluster, asked: Mapping[str, Any]) -> Plan:
        from partitioner.planning import plan as make_plan

        best = make_plan(profile, cluster, objective=present.objective, **asked)
        return dataclasses.replace(best, model=present.model, batching=present.batching)

    def cut(self, plan: Plan, folder: Path) -> Mapping[str, Shard]:
        from partitioner.cutting import cut

        if self._model is None:
            raise BadInput("nothing can be cut without the model", remedy="give the model")
        return cut(self._model, plan, folder)
