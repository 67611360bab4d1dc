"""How a deployment comes onto this node, and how it goes again."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

from nodes.admission import Admission
from nodes.compute import ComputeThread
from nodes.deployment import Deployment, Stage, routes
from nodes.engines import AUTO, load_engine
from nodes.engines.base import Engine
from nodes.engines.choosing import choose_engine
from nodes.ledger import Ledger
from nodes.link import Links
from nodes.memory import give_back
from nodes.noising import check_same_noise
from nodes.reserving import check_reserved
from nodes.shelf import EngineShelf
from nodes.store import BlobStore
from splitnet.errors import (
    AlreadyExists,
    BadInput,
    BadPlan,
    BadShard,
    Cancelled,
    InsufficientMemory,
    NodeUnavailable,
    SplitnetError,
)
from splitnet.generations import FIRST, generation_key, parse_key
from splitnet.plan import NodeRef, Plan, StageSpec
from splitnet.shard import Shard
from splitnet.stage_memory import stage_memory_bytes
from splitnet.tensors import TensorSpec

__all__ = ["Installer"]

_MOST_RELEASED = 65536  # blobs in one call
_VALUE_SHARE = 4  # what a stage may make for itself may be that much larger than what it may receive


class Kept(Protocol):
    """See `nodes.restoring.Keeper`."""

    async def settled(self) -> None: ...


class Installer:
    """One thing at a time: what a deployment reserves is decided before the next one is looked at."""

    def __init__(self, ledger: Ledger, store: BlobStore, compute: ComputeThread, links: Links) -> None:
        self._ledger = ledger
        self._config = ledger.config
        self._log = ledger.log
        self._store = store
        self._compute = compute
        self._links = links
        self._shelf = EngineShelf()
        self._lock = asyncio.Lock()
        self.keeper: Kept | None = None  #: who writes down what is here, where that is wanted

    @property
    def reserved_bytes(self) -> int:
        return sum(deployment.reserved_bytes for deployment in self._ledger.deployments.values()) - self._shelf.saved_bytes

    async def activate(
        self,
        name: str,
        plan_json: bytes,
        node: str,
        shards: Mapping[str, str],
        *,
        generation: int = 0,
        wait: bool = False,
        check: Callable[[Mapping[str, str]], None] | None = None,
    ) -> tuple[Deployment, float]:
        """The deployment, and how long loading took (0 where it was active already). `wait`: it takes no new calls before `switch`.
        `check` sees the shards that are about to be used here, by stage, whoever named them, and raises where they must not be. Nothing is left behind when this raises: BadPlan, BadShard, NotFound (a shard was not shipped), AlreadyExists,
        InsufficientMemory, NodeUnavailable (draining)."""
        plan = await asyncio.to_thread(Plan.from_json, plan_json)
        own = plan.node(node)
        specs = list(plan.held_at(node))
        if not name or not specs:
            raise BadPlan("the deployment has no name" if not name else f"no stage of the plan is on node {node!r}")
        if parse_key(name)[1]:
            raise BadPlan(f"{name!r} is a generation's key, not a deployment's name", remedy="give the name and the generation apart")
        generation = generation or FIRST
        key = generation_key(name, generation)
        wanted = {spec.name: _shard_name(spec, shards) for spec in specs}
        if check is not None:
            check(wanted)
        while True:
            async with self._lock:
                active = self._ledger.deployments.get(key)
                if active is None or not active.draining:
                    done = await self._activate(key, plan, own, specs, wanted, wait)
                    break
            await active.gone.wait()
        if name not in self._ledger.families.restoring:
            await self.kept()
        return done

    async def _activate(
        self, key: str, plan: Plan, own: NodeRef, specs: list[StageSpec], wanted: Mapping[str, str], wait: bool
    ) -> tuple[Deployment, float]:
        if self._ledger.draining:
            raise NodeUnavailable("the node is being stopped", remedy="start it again")
        families, (name, generation) = self._ledger.families, parse_key(key)
        if not wait:
            families.check_serving(name, generation or FIRST)
        load_s, deployment = 0.0, self._ledger.deployments.get(key)
        if deployment is None:
            deployment, load_s = await self._load(key, plan, own, specs, wanted)
        else:
            self._check_same(deployment, plan, own, wanted)
            for link in deployment.links.values():
                link.hurry()
        families.add(deployment, wait=wait)
        return deployment, load_s

    async def kept(self) -> None:
        """What is here now is written down, or it is told that it could not be."""
        if self.keeper is not None:
            await self.keeper.settled()

    def switch(self, name: str, generation: int, share: float, address: str, *, keep: bool, term: int = 0) -> int:
        """See `Families.switch`."""
        before = self._ledger.families.switch(name, generation, share, address, keep=keep, term=term)
        self._ledger.recovery.switched(name)
        self._log.info("switched", deployment=name, before=before, generation=generation, share=share)
        return before

    async def unload(self, name: str, drain_s: float, delete_blobs: bool, *, generation: int = 0) -> int:
        """Takes no new requests for the deployment (or for that generation of it), waits up to `drain_s` for those in flight, cancels the
        rest (how many is returned), and lets go of its engines. Raises NotFound."""
        leaving = self._ledger.families.held(name, generation)
        for deployment in leaving:
            deployment.draining = True
        until_s = self._ledger.loop.time() + drain_s
        for deployment in leaving:  # others may be loaded meanwhile
            await self._ledger.idle(max(until_s - self._ledger.loop.time(), 0.0), deployment)
        async with self._lock:
            cancelled = sum([await self._remove(d) for d in leaving if self._ledger.deployments.get(d.name) is d])
            if not generation:
                self._ledger.families.forget(name)
            if delete_blobs:
                await asyncio.to_thread(self._store.delete_unused, self._in_use())
        await self.kept()
        self._log.info("unloaded", deployment=generation_key(name, generation), cancelled=cancelled)
        return cancelled

    async def _remove(self, deployment: Deployment) -> int:
        deployment.released.set()
        cancelled = self._ledger.fail_all(
            deployment, lambda: Cancelled(f"deployment {deployment.name!r} was unloaded", remedy="deploy it again")
        )
        self._ledger.families.remove(deployment)
        for link in deployment.links.values():
            await self._links.release(link)
        engines = [_shelf_key(stage.shard, deployment.plan) for stage in deployment.held.values()]

        def forget() -> None:
            deployment.forget_engines()
            self._shelf.give_back(engines)

        await self._compute.call(forget)
        await asyncio.to_thread(give_back)
        deployment.gone.set()
        return cancelled

    async def release(self, blobs: Sequence[str]) -> int:
        """Removes those of the blobs that nothing uses; returns the bytes that became free. Raises BadInput for what is no blob's name."""
        if len(blobs) > _MOST_RELEASED:
            raise BadInput(f"expected at most {_MOST_RELEASED} blobs, got {len(blobs)}")
        async with self._lock:
            return await asyncio.to_thread(self._store.delete, blobs, self._in_use())

    def _in_use(self) -> set[str]:
        return {stage.shard for d in self._ledger.deployments.values() for stage in d.held.values()}

    def _check_same(self, active: Deployment, plan: Plan, own: NodeRef, shards: Mapping[str, str]) -> None:
        same = active.plan_sha256 == plan.sha256 and active.node == own and {s.spec.name: s.shard for s in active.held.values()} == shards
        if not same:
            raise AlreadyExists(
                f"deployment {active.name!r} is here already, with another plan",
                remedy=f"unload it first: `splitnet unload` {active.name}, or deploy under another name",
            )

    async def _load(
        self, name: str, plan: Plan, own: NodeRef, specs: list[StageSpec], wanted: Mapping[str, str]
    ) -> tuple[Deployment, float]:
        started = time.perf_counter()
        found = {spec.name: await asyncio.to_thread(self._store.shard, wanted[spec.name]) for spec in specs}
        reserved = {spec.name: _checked(plan, spec, found[spec.name]) for spec in specs}
        check_reserved(name, plan, list(self._ledger.deployments.values()), self._config.sessions)
        self._check_memory(name, reserved, {_shelf_key(sha256, plan) for sha256 in wanted.values()})
        engines: dict[str, Engine] = {}
        try:
            for spec in specs:
                engines[spec.name] = await self._take_engine(found[spec.name], plan, spec.name)
        except BaseException:
            taken = [_shelf_key(wanted[stage], plan) for stage in engines]
            engines.clear()
            await asyncio.shield(self._compute.call(lambda: self._shelf.give_back(taken)))
            raise
        stages = {
            spec.name: Stage(
                spec, engines[spec.name], wanted[spec.name], {t.name: t for t in spec.inputs}, routes(plan, spec.name), reserved[spec.name]
            )
            for spec in specs
        }
        deployment = Deployment(
            name,
            plan,
            plan.sha256,
            own,
            {name: stage for name, stage in stages.items() if stage.spec.node == own.name},
            Admission(plan.max_in_flight, plan.prediction, plan.batching.max_batch),
            standby={name: stage for name, stage in stages.items() if stage.spec.node != own.name},
        )
        deployment.links = {node.name: self._links.take(own, node) for node in deployment.neighbours()}
        load_s = time.perf_counter() - started
        self._log.info(
            "activated", deployment=name, stages=sorted(stages), reserved_bytes=deployment.reserved_bytes, load_s=round(load_s, 3)
        )
        return deployment, load_s

    async def _take_engine(self, shard: Shard, plan: Plan, stage: str) -> Engine:
        """One that is here for this very shard, or a new one."""
        key = _shelf_key(shard.sha256, plan)
        engine = self._shelf.take(key)
        if engine is None:
            try:
                engine = await self._compute.call(functools.partial(self._engine, shard, plan, stage))
            except SplitnetError as error:
                raise error.at(stage=stage) from error.__cause__
            self._shelf.put(key, engine, shard.manifest.param_bytes)
        return engine

    def _engine(self, shard: Shard, plan: Plan, stage: str) -> Engine:
        """In the compute thread."""
        config = self._config
        max_value_bytes = _VALUE_SHARE * config.max_tensor_bytes
        if plan.generation is not None:
            tokens = plan.generation.cache_tokens
            return load_engine(shard, threads=config.threads, max_value_bytes=max_value_bytes, cache_tokens=tokens)
        if config.engine != AUTO:
            return load_engine(shard, threads=config.threads, engine=config.engine, max_value_bytes=max_value_bytes)
        symbols = plan.prediction.symbols if plan.prediction is not None else {}
        chosen = choose_engine(shard, symbols, threads=config.threads, max_value_bytes=max_value_bytes)
        self._log.info("engine chosen", stage=stage, engine=chosen.engine.name, why=chosen.why)
        return chosen.engine

    def _check_memory(self, name: str, reserved: Mapping[str, int], engines: Set[str]) -> None:
        held = sum(self._shelf.held_bytes(engine) for engine in engines)
        limit, used, needed = self._config.memory_bytes, self.reserved_bytes, sum(reserved.values()) - held
        if limit and used + needed > limit:
            each = ", ".join(f"{stage}: {size}" for stage, size in reserved.items())
            raise InsufficientMemory(
                f"{name!r} needs {needed} bytes here ({each}); of the limit of {limit} bytes {used} are taken: {used + needed - limit} bytes are missing",
                remedy="unload another deployment, raise the node's --memory, or plan with the memory that is left",
            )


def _shelf_key(sha256: str, plan: Plan) -> str:
    """Plans that use a shard in the same way share its engine: caches of decoder models are a part of it."""
    return sha256 if plan.generation is None else f"{sha256} {plan.generation}"


def _shard_name(spec: StageSpec, shards: Mapping[str, str]) -> str:
    named = shards.get(spec.name) or spec.shard
    if not named:
        raise BadPlan(f"stage {spec.name!r} has no shard", remedy="cut the model with this plan first: `splitnet plan`")
    if spec.shard and named != spec.shard:
        raise BadPlan(
            f"stage {spec.name!r}: the plan names shard {spec.shard[:12]}, the request {named[:12]}",
            remedy="deploy the plan with the shards cut for it",
        )
    return named


def _checked(plan: Plan, spec: StageSpec, shard: Shard) -> int:
    """What the stage reserves. Raises BadShard where plan and shard do not belong together."""
    manifest = shard.manifest
    if manifest.model_sha256 != plan.model_sha256:
        raise BadShard(
            f"shard {shard.sha256[:12]} of stage {spec.name!r} was cut from another model ({manifest.model_sha256[:12]}) than the plan ({plan.model_sha256[:12]})",
            remedy="cut the model with this plan again",
        )
    for what, planned, cut in (("inputs", spec.inputs, manifest.inputs), ("outputs", spec.outputs, manifest.outputs)):
        if _faces(planned) != _faces(cut):
            raise BadShard(
                f"stage {spec.name!r}: the {what} of the plan are {_faces(planned)}, those of shard {shard.sha256[:12]} {_faces(cut)}",
                remedy="cut the model with this plan again",
            )
    check_same_noise(plan, spec, shard)
    if not spec.inputs:
        raise BadPlan(f"stage {spec.name!r} has no input, so nothing would start it", remedy="make the plan again")
    received_bytes = sum(transfer.bytes for transfer in plan.transfers if transfer.target == spec.name)
    cache_bytes = plan.generation.cache_bytes(spec.name) if plan.generation is not None else 0
    return stage_memory_bytes(manifest.param_bytes, manifest.activation_bytes, received_bytes) + cache_bytes


def _faces(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str, int]]:
    return sorted((spec.name, spec.dtype, len(spec.shape)) for spec in specs)
