"""A plan that follows what its nodes say: look, plan again, and switch where it pays. `splitnet watch` does it from the command line.

One look takes a Describe call per node and a plan (milliseconds); nothing else happens until another plan is better by enough for long enough
(`partitioner.watching`). Before a switch the links that the new plan needs are probed, if they were not seen lately. The switch itself is that of
`splitnet deploy --update`: the new shards are loaded beside the old ones, and no request fails or is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from partitioner.followers import Follower
from partitioner.observing import Measured, Observer, identity
from partitioner.watching import Judge, Rules, Verdict
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster
from splitnet.codecs import get_codec
from splitnet.errors import BadCluster, BadInput, BadPlan, NoPlan, NotFound, ServiceError, SplitnetError
from splitnet.node_status import NodeStatus, status_of
from splitnet.plan import CLIENT, Plan
from splitnet.rollout import Updated, update_async
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Look", "Watch"]

_PROBE_S = 0.4
_GRACE_S = 15.0
_FRESH_S = 20.0  # a link that was seen so lately need not be probed before a switch
_LOOK_S = 2.0
_LEASE_S = 12.0  # so long an ingress waits for what is brought here, after the last word from here
_RENEWED_S = 3.0
_LEASE_S = 120.0  # as long as cutting, shipping and loading another plan may take


@dataclass(frozen=True)
class Look:
    """One look, for people and programs. `present_s` and `best_s` are the objective's seconds, infinite for a plan that cannot serve. `switched`: what
    was done, where something was; `error`: why it was not."""

    generation: int
    present_s: float
    best_s: float
    gain: float
    why: str
    best: Plan | None
    changed: tuple[str, ...] = ()
    planning_s: float = 0.0
    switched: Updated | None = None
    would: bool = False  # a switch was due, and not wanted
    error: str = ""
    probed: tuple[str, ...] = field(default=())


P = TypeVar("P", bound=Measured)


class Watch(Generic[P]):
    """`follower`: what new plans are made and cut by; where it cannot cut, nothing is ever switched. `folder`: where the shards of new plans go. `asked` are
    wishes, as for `partitioner.plan`. `on_switch` hears of a switch before it begins."""

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        profile: P,
        *,
        follower: Follower[P],
        folder: Path,
        rules: Rules | None = None,
        asked: Mapping[str, Any] | None = None,
        move_ingress: bool = False,
        probe_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        on_switch: Callable[[Plan], None] | None = None,
    ) -> None:
        self.name = name
        self.judge = Judge(rules or Rules())
        self._cluster = cluster
        self._follower = follower
        self._folder = folder
        self._asked = dict(asked or {})
        self._move_ingress = move_ingress
        self._probe_s = probe_s
        self._clock = clock
        self._on_switch = on_switch
        self._observer = Observer(cluster, profile)
        self._last_plan: Plan | None = None
        self._exact: bool | None = None  # whether the first plan with a link on its way permitted codecs without loss only
        self.lease_s = _LEASE_S

    async def look(self) -> Look:
        """Raises NotFound where nothing is deployed under the name, BadPlan where it is another model; what fails in planning or switching stands
        in the look, and the next one tries again. The ingress is told that somebody looks: requests that lack a node wait for the next plan; where
        there can be none, it is told so, and they fail."""
        renewing = asyncio.create_task(self._renew())
        try:
            look = await self._look()
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        if math.isinf(look.present_s) and look.error:
            await self._tell_ingress(0.0, look.error)
        return look

    async def _renew(self) -> None:
        while True:
            await self._tell_ingress(self.lease_s)
            await asyncio.sleep(_RENEWED_S)

    async def _tell_ingress(self, lease_s: float, hopeless: str = "") -> None:
        """An ingress that cannot be reached has no requests that wait."""
        if self._last_plan is None or not self._follower.can_cut:
            return
        address = self._last_plan.ingress.address
        request = pb.WatchRequest(deployment=self.name, lease_s=lease_s, hopeless=hopeless[:200])
        with contextlib.suppress(SplitnetError):
            async with open_channel(address) as channel:
                with translated(address):
                    await stub(channel).Watch(request, timeout=_LOOK_S)

    async def _look(self) -> Look:
        statuses = await status_of(self._cluster, timeout_s=_LOOK_S, plans=True)
        generation, present = self._active(statuses)
        self._observer.look(statuses, self.name, present, self._clock())
        idle = self._observer.doubtful(self._clock(), self._probe_s) if self._probe_s else []
        probed = await self._probe(idle[:1])  # one at a time: it takes room on a link
        await self._say_so(present)
        look = await asyncio.to_thread(self._plan, generation, present)
        best = look.best
        if best is None and look.error:
            await self._say_so(present, look.error)
        verdict = self._verdict(look, present)
        if not verdict.switch or best is None:
            return dataclasses.replace(look, gain=verdict.gain, why=verdict.why, probed=probed)
        unsure = self._observer.doubtful(self._clock(), _FRESH_S, best)
        if unsure:  # not to be taken from one bad link onto another
            probed += await self._probe(unsure)
            look = await asyncio.to_thread(self._plan, generation, present)
            verdict = self._verdict(look, present)
            if not verdict.switch or look.best is None or self._observer.doubtful(self._clock(), _FRESH_S, look.best):
                return dataclasses.replace(look, gain=verdict.gain, why=verdict.why, probed=probed)
        return await self._switch(dataclasses.replace(look, gain=verdict.gain, why=verdict.why, probed=probed), present)

    async def _say_so(self, present: Plan, hopeless: str = "") -> None:
        """To the ingress: requests that lack a node wait for another plan; or there is none, and they fail at once, saying why."""
        if not self._follower.can_cut:
            return
        address = present.ingress.address
        request = pb.WatchRequest(deployment=self.name, lease_s=_LEASE_S, hopeless=hopeless)
        try:
            async with open_channel(address) as channel:
                with translated(address):
                    await stub(channel).Watch(request, timeout=_LOOK_S)
        except ServiceError:  # it is the ingress itself that is lost; clients wait for who follows it
            return

    def _active(self, statuses: list[NodeStatus]) -> tuple[int, Plan]:
        """As its ingress says; where that is gone, as the others do, or as it was."""
        held = [d for status in statuses for d in status.generations(self.name) if d.state == "active" and d.plan_json]
        held.sort(key=lambda d: (not d.ingress, -d.generation))
        if not held:
            if self._last_plan is not None and any(status.error for status in statuses):
                return 0, self._last_plan
            raise NotFound(f"nothing is deployed under the name {self.name!r}", remedy="deploy a plan first: `splitnet deploy`")
        plan = Plan.from_json(held[0].plan_json)
        if plan.model_sha256 != self._observer.profile().structure.sha256:
            raise BadPlan(f"{self.name!r} is of another model than the profile", remedy="profile this model, or name another deployment")
        self._last_plan = plan
        if self._exact is None:
            self._exact = _exact(plan)
        return held[0].generation, plan

    def _plan(self, generation: int, present: Plan) -> Look:
        """In a thread: the planner may take its time."""
        started = time.perf_counter()
        changed = tuple(self._observer.changed())
        try:
            cluster, profile = self._observer.cluster(), self._observer.profile()
        except BadCluster as error:
            return Look(generation, float("inf"), float("inf"), 0.0, "", None, changed, error=error.message)
        present_s = self._follower.price(present, profile, cluster)
        asked = dict(self._asked)
        if self._exact:
            asked["lossless"] = True
        if present.noise is not None:  # what was promised stays promised, whatever was asked here
            asked["noise"] = present.noise
            if not asked.get("private"):
                why = "the plan promises noise on what leaves its first node, and a new one needs to know what must stay there: give --private, as for the plan"
                return Look(generation, present_s, float("inf"), 0.0, "", None, changed, error=why)
        ingress = present.ingress.name
        if not self._move_ingress and not asked.get("input_at") and any(node.name == ingress for node in cluster.nodes):
            asked["input_at"] = ingress  # where the clients are
        try:
            best = self._follower.plan(present, profile, cluster, asked)
        except (NoPlan, BadInput, BadCluster) as error:
            return Look(generation, present_s, float("inf"), 0.0, "", None, changed, error=error.message)
        best_s = self._follower.price(best, profile, cluster)
        return Look(generation, present_s, best_s, 0.0, "", best, changed, planning_s=time.perf_counter() - started)

    def _verdict(self, look: Look, present: Plan) -> Verdict:
        if look.best is None:
            return Verdict(False, 0.0, look.error)
        return self.judge.consider(self._clock(), identity(present), look.present_s, identity(look.best), look.best_s)

    async def _switch(self, look: Look, present: Plan) -> Look:
        best = look.best
        assert best is not None
        if not self._follower.can_cut:
            return dataclasses.replace(look, would=True)
        if self._on_switch is not None:
            self._on_switch(best)
        try:
            file = self._folder / f"generation-{look.generation + 1}.json"
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            shards = await asyncio.to_thread(self._follower.cut, best, file.with_suffix(".shards"))
            best = best.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
            await asyncio.to_thread(best.save, file)
            able = math.isfinite(look.present_s)  # else there is nothing to go back to
            updated = await update_async(best, shards, name=self.name, where=self._cluster, keep=able)
        except SplitnetError as error:
            self.judge.failed(self._clock())
            return dataclasses.replace(look, error=error.message)
        self.judge.switched(self._clock(), identity(present), identity(best))
        return dataclasses.replace(look, switched=updated, best=best)

    async def _probe(self, pairs: list[tuple[str, str]]) -> tuple[str, ...]:
        """What does not answer is left as it was: the next look sees why."""
        done = []
        for a, b in pairs:
            source, target = self._cluster.node(a), self._cluster.node(b)
            try:
                async with open_channel(source.address) as channel:
                    with translated(source.address):
                        request = pb.MeasureRequest(peer_address=target.address, budget_s=_PROBE_S)
                        reply = await stub(channel).Measure(request, timeout=_PROBE_S + _GRACE_S)
            except ServiceError:
                continue
            self._observer.probed(a, b, reply.bandwidth_bytes_per_s, reply.round_trip_s / 2, self._clock())
            done.append(f"{a}->{b}")
        return tuple(done)


def _exact(plan: Plan) -> bool | None:
    """Whether all codecs that the plan permits between nodes change no bit; None where nothing crosses, and it does not say."""
    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.ingress.name}
    crossing = [t for t in plan.transfers if t.bytes and node[t.source] != node[t.target]]
    names = {name for t in crossing for name in (t.codec, *(option.name for option in t.codecs))}
    return all(get_codec(name).lossless for name in names) if names else None
