"""A new plan takes the place of one that serves, without a gap; and the way back.

The new generation is loaded beside the old one, on whichever nodes it needs; when all of it is there, the ingress sends new requests to it,
and those that were admitted before are finished by the old one: no request sees two versions. The old one stays loaded, to go back to,
unless that was not wanted or its memory is needed. When the new plan's requests enter at another node, the old ingress sends clients there.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from splitnet import background
from splitnet.batching import Batching
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, BadPlan, InsufficientMemory, NodeUnavailable, NotFound, SplitnetError
from splitnet.installation import Installation, OnProgress, all_done, switch_node, unload_node, used_nodes
from splitnet.noise import Noise
from splitnet.plan import NodeRef, Plan
from splitnet.preflight import missing_memory, open_shards
from splitnet.shard import Shard
from splitnet.survey import Generation, Survey, take_survey
from splitnet.tensors import TensorSpec

__all__ = ["DRAIN_S", "Updated", "go_back", "go_back_async", "update", "update_async"]

DRAIN_S = 30.0  #: that requests in flight may still take where their generation is to go
Shards = Mapping[str, Shard | str | Path] | str | Path


@dataclass(frozen=True, slots=True)
class Updated:
    """`generation` takes `share` of the new requests now; `before` was active until then (and still is, with a share below 1). `kept`: what
    `go_back` would go back to; 0: nothing. `cancelled`: requests that were not done within the time to drain. `changed`: False where it
    was so already. `sent_bytes`, `taken_bytes`, `load_s`: as of `Deployed`."""

    name: str
    ingress: str
    generation: int
    before: int
    share: float = 1.0
    kept: int = 0
    sent_bytes: Mapping[str, int] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    cancelled: int = 0
    changed: bool = True
    taken_bytes: Mapping[str, int] = field(default_factory=dict)


async def update_async(
    plan: Plan,
    shards: Shards,
    *,
    name: str,
    where: Cluster | Plan | None = None,
    canary: float = 1.0,
    keep: bool = True,
    force: bool = False,
    replace: bool = False,
    drain_s: float = DRAIN_S,
    batching: Batching | None = None,
    on_progress: OnProgress | None = None,
    concurrency: int = 8,
) -> Updated:
    """Puts a plan in the place of the one that is deployed under `name`, which is looked for on the plan's nodes and on those of `where`.

    `canary`: the share of new requests that it gets; the same plan again with a larger share, or with 1, goes on from there. Raises before
    anything is changed: NotFound where nothing of that name takes requests; BadPlan where inputs or outputs are not those of the present
    plan, unless `force` (clients that know the old ones must connect again); InsufficientMemory where both do not fit at once, even without the
    generation that is kept to go back to. `replace`: then the old one is drained and taken off first, and requests are refused
    meanwhile. When a node fails to load its part, what was loaded is taken off again, and the old plan has served all the time.

    `keep`: the old generation stays loaded. Otherwise its requests have `drain_s` to finish, and it is taken off."""
    if not 0 < canary <= 1:
        raise BadInput(f"a canary's share is {canary:g}", remedy="give more than 0%, and at most 100%")
    opened = await asyncio.to_thread(open_shards, plan, shards)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in opened.items()})
    plan = plan if batching is None else dataclasses.replace(plan, batching=batching)
    survey = await take_survey(name, [*used_nodes(plan), *_nodes(where)])
    work = _Update(plan, opened, survey, canary, keep, drain_s, on_progress)
    work.check(force)
    if work.there is work.active:
        return Updated(name, plan.ingress.address, work.active.number, work.active.number, kept=work.kept_number(), changed=False)
    spared = work.spared_for_memory(replace)
    updated = await (work.replaced(concurrency) if spared is None else work.run(concurrency, spared))
    return dataclasses.replace(updated, taken_bytes=work.taken_bytes)


async def go_back_async(where: Cluster | Plan, name: str, *, drain_s: float = DRAIN_S) -> Updated:
    """Gives up a canary, or else puts the generation in its place again that was active before; the one that served until now is taken off
    once its requests are done, for which they have `drain_s`. Raises NotFound where there is nothing to go back to, NodeUnavailable,
    and what loading raises, where a node has lost its part meanwhile: then nothing has changed."""
    survey = await take_survey(name, _nodes(where))
    active = survey.require_active()
    canary, kept = survey.in_state("canary"), survey.in_state("kept")
    if canary is not None:
        await _switch(survey, canary, 0.0, keep=kept is not None)
        cancelled = await _take_off(survey, canary, drain_s)
        return Updated(
            name, active.plan.ingress.address, active.number, canary.number, kept=kept.number if kept else 0, cancelled=cancelled
        )
    if kept is None:
        raise NotFound(
            f"{name!r} has nothing to go back to: generation {active.number} is the only one",
            remedy="only an update leaves something to go back to (unless it was made with --no-keep); deploy the older plan with --update",
        )
    shards = {stage.name: kept.shards.get(stage.name) or stage.shard for stage in kept.plan.stages}
    await Installation(kept.plan, name, shards, generation=kept.number, wait=True).activate_all(already=kept.holders)
    await _switch(survey, kept, 1.0, keep=False)
    cancelled = await _take_off(survey, active, drain_s)
    return Updated(name, kept.plan.ingress.address, kept.number, active.number, cancelled=cancelled)


def update(plan: Plan, shards: Shards, **options: Any) -> Updated:
    """As `update_async`, blocking."""
    return background.run(update_async(plan, shards, **options))


def go_back(where: Cluster | Plan, name: str, *, drain_s: float = DRAIN_S) -> Updated:
    """As `go_back_async`, blocking."""
    return background.run(go_back_async(where, name, drain_s=drain_s))


class _Update:
    """`there`: the plan's own generation, where some node has it already."""

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[str, Shard],
        survey: Survey,
        share: float,
        keep: bool,
        drain_s: float,
        on_progress: OnProgress | None,
    ) -> None:
        self.plan = plan
        self.shards = shards
        self.survey = survey
        self.share = share
        self.keep = keep
        self.drain_s = drain_s
        self.on_progress = on_progress
        self.active = survey.require_active()
        self.there = self.active if self.active.plan.sha256 == plan.sha256 else survey.of_plan(plan)
        self.taken_bytes: dict[str, int] = {}
        self.number = survey.next_number if self.there is None else self.there.number

    def kept_number(self) -> int:
        kept = self.survey.in_state("kept")
        return kept.number if kept is not None else 0

    def check(self, force: bool) -> None:
        """Before anything is changed."""
        silent = [status for node in used_nodes(self.plan) if (status := self.survey.statuses[node.address]).error]
        if silent:
            raise NodeUnavailable(
                "; ".join(f"node {s.name!r} at {s.address}: {s.error}" for s in silent),
                remedy="start `splitnet node` there, or make a plan without it",
            )
        name, canary = self.survey.name, self.survey.in_state("canary")
        if canary is not None and self.there is not canary:
            raise BadInput(
                f"generation {canary.number} of {name!r} is being tried with {canary.share * 100:g}% of the requests",
                remedy=f"finish that first: `splitnet deploy --update` with its plan, or `splitnet rollback {name}`",
            )
        if not force:
            _check_signature(self.active.plan, self.plan)
            _check_noise(self.active.plan.noise, self.plan.noise)
        if self.share < 1 and self.plan.ingress.address != self.active.plan.ingress.address:
            raise BadInput(
                f"requests for {name!r} enter at node {self.active.plan.ingress.name!r}, the new plan's at {self.plan.ingress.name!r}: a canary must share the ingress",
                remedy=f"plan with `--input-at {self.active.plan.ingress.name}`, or update without --canary",
            )

    def spared_for_memory(self, replace: bool) -> list[Generation] | None:
        """Generations that serve nobody and must go first; None where all must go first, and may. Raises InsufficientMemory where that may
        not be, or would not be enough."""
        idle = [g for g in self.survey.generations.values() if g.state in ("kept", "loaded") and g is not self.there]
        if not self._missing([]):
            return []
        if not self._missing(idle):
            return idle
        if lacking := self._missing([*idle, self.active]):
            _refuse(
                "the new plan does not fit even without the old one",
                lacking,
                "plan with the memory that is there, or raise the nodes' --memory",
            )
        if not replace:
            _refuse(
                "the new plan does not fit beside the old one",
                self._missing(idle),
                "--replace takes the old one off first (requests are refused meanwhile); or raise the nodes' --memory, or unload something else",
            )
        return None

    def _missing(self, without: Sequence[Generation]) -> dict[str, int]:
        gone = [generation.number for generation in without]
        return missing_memory(self.plan, self.survey.name, self.shards, self.survey.statuses, gone)

    async def run(self, concurrency: int, spared: Sequence[Generation]) -> Updated:
        survey, name = self.survey, self.survey.name
        for generation in spared:
            await _take_off(survey, generation, 0.0)
        installation = Installation(self.plan, name, self.shards, self.on_progress, generation=self.number, wait=True)
        sent = await self._ship(installation, concurrency)
        load_s = await installation.activate_all(already=self.there.holders if self.there is not None else ())
        new = Generation(self.number, self.plan, "loaded", 0.0, {}, frozenset(n.address for n in used_nodes(self.plan)))
        installation.report("switch", self.plan.ingress)
        await _switch(survey, new, self.share, keep=self.keep)
        if self.share < 1:
            return Updated(name, self.plan.ingress.address, self.number, self.active.number, self.share, self._kept(spared), sent, load_s)
        leaving = [g for g in survey.generations.values() if g.number not in (self.number, self.active.number) and g not in spared]
        leaving += [] if self.keep else [self.active]
        installation.report("drain", self.active.plan.ingress)
        cancelled = sum([await _take_off(survey, generation, self.drain_s) for generation in leaving])
        kept = self.active.number if self.keep else 0
        return Updated(name, self.plan.ingress.address, self.number, self.active.number, 1.0, kept, sent, load_s, cancelled)

    def _kept(self, spared: Sequence[Generation]) -> int:
        kept = self.survey.in_state("kept")
        return kept.number if kept is not None and kept not in spared else 0

    async def _ship(self, installation: Installation, concurrency: int) -> dict[str, int]:
        carried = await installation.ship_all(concurrency)
        self.taken_bytes = {node: one.taken_bytes for node, one in carried.items()}
        return {node: one.sent_bytes for node, one in carried.items()}

    async def replaced(self, concurrency: int) -> Updated:
        """The old one goes before the new one comes. Where that fails, the old one is put back."""
        survey, name = self.survey, self.survey.name
        installation = Installation(self.plan, name, self.shards, self.on_progress, generation=self.number)
        sent = await self._ship(installation, concurrency)
        installation.report("drain", self.active.plan.ingress)
        cancelled = 0
        for generation in sorted(survey.generations.values(), key=lambda g: g is self.active):
            cancelled += await _take_off(survey, generation, self.drain_s)
        try:
            load_s = await installation.activate_all()
        except SplitnetError:
            old = self.active
            shards = {stage.name: old.shards.get(stage.name) or stage.shard for stage in old.plan.stages}
            await Installation(old.plan, name, shards, generation=old.number).activate_all()
            raise
        if self.active.plan.ingress.address != self.plan.ingress.address:
            new = Generation(self.number, self.plan, "active", 1.0, {}, frozenset(n.address for n in used_nodes(self.plan)))
            await _switch(survey, new, 1.0, keep=False)
        return Updated(name, self.plan.ingress.address, self.number, self.active.number, 1.0, 0, sent, load_s, cancelled)


async def _switch(survey: Survey, generation: Generation, share: float, *, keep: bool) -> None:
    """The new ingress first, so that it is ready for those whom the old one sends; then the old one, and it is done. The others are only told, and
    a node that cannot be reached now has nothing to say about it. When the old ingress answered before and cannot be told, the new one gives the
    requests back to it."""
    active, name = survey.require_active(), survey.name
    new, old = generation.plan.ingress.address, active.plan.ingress.address
    tell = _teller(name, generation.number, share, new, keep, survey.next_term)
    await tell(new)
    if old != new and not survey.statuses[old].error:
        try:
            await tell(old)
        except SplitnetError:
            await asyncio.gather(
                switch_node(new, name, active.number, 1.0, old, keep=False, term=survey.next_term + 1), return_exceptions=True
            )
            raise
    others = {*survey.concerned, *generation.holders} - {new, old}
    await asyncio.gather(*(tell(address) for address in sorted(others)), return_exceptions=True)


def _teller(name: str, number: int, share: float, ingress: str, keep: bool, term: int) -> Callable[[str], Coroutine[Any, Any, None]]:
    def tell(address: str) -> Coroutine[Any, Any, None]:
        return switch_node(address, name, number, share, ingress, keep=keep, term=term)

    return tell


async def _take_off(survey: Survey, generation: Generation, drain_s: float) -> int:
    """From the nodes that hold it, its ingress first: when that has nothing in flight any more, the others have nothing to come. How many
    requests had to be cancelled. A node that does not answer asks the others once it was started again."""
    ingress = generation.plan.ingress.address
    held = sorted(a for a in generation.holders if not survey.statuses[a].error)
    cancelled = 0
    for at_ingress in (True, False):
        batch = [address for address in held if (address == ingress) is at_ingress]
        left_s = drain_s if at_ingress else 0.0
        work = {address: unload_node(address, survey.name, left_s, generation=generation.number) for address in batch}
        cancelled += sum((await all_done(work)).values())
    return cancelled


def _refuse(what: str, missing: Mapping[str, int], remedy: str) -> NoReturn:
    each = ", ".join(f"{size} bytes are missing on node {node!r}" for node, size in missing.items())
    raise InsufficientMemory(f"{what}: {each}", node=next(iter(missing)), remedy=remedy)


def _check_signature(old: Plan, new: Plan) -> None:
    for what, before, after in (
        ("inputs", old.inputs, new.inputs),
        ("outputs", [o.spec for o in old.outputs], [o.spec for o in new.outputs]),
    ):
        if _faces(before) != _faces(after):
            raise BadPlan(
                f"the {what} of the new plan are {', '.join(_faces(after))}; those of the one that serves are {', '.join(_faces(before))}",
                remedy="deploy it under another name; or --force, where all clients expect the new ones: they must connect again",
            )


def _check_noise(old: Noise | None, new: Noise | None) -> None:
    if old is not None and new != old:
        raise BadPlan(
            f"what leaves the first node is {old.promise()}; by the new plan it would be {'without noise' if new is None else new.promise()}"
            + ("" if new is None else f" with norms up to {new.clip_norm:g} (now {old.clip_norm:g})"),
            remedy="plan with the same noise; or --force, where nobody relies on it",
        )


def _faces(specs: Sequence[TensorSpec]) -> list[str]:
    """Sizes that are free in either are only marked: what a symbol is called says nothing."""
    return [f"{s.name} {s.dtype}({', '.join(str(size) if isinstance(size, int) else '*' for size in s.shape)})" for s in specs]


def _nodes(where: Cluster | Plan | None) -> list[NodeRef]:
    return [] if where is None else [NodeRef(node.name, node.address) for node in where.nodes]
