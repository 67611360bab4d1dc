"""What is checked before a byte is shipped: that plan and shards belong together, and that the nodes can take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from splitnet.errors import AlreadyExists, BadPlan, InsufficientMemory, NodeUnavailable
from splitnet.node_status import NodeStatus
from splitnet.plan import Plan
from splitnet.shard import Shard, open_shard
from splitnet.stage_memory import stage_memory_bytes

__all__ = ["check_nodes", "find_shards", "missing_memory", "open_shards"]


def find_shards(plan: Plan, directory: str | Path) -> dict[str, str | Path]:
    """In a directory, a folder or a packed file per stage. Raises BadPlan that names what is missing."""
    found: dict[str, str | Path] = {}
    for stage in plan.stages:
        folder, packed = Path(directory) / stage.name, Path(directory) / f"{stage.name}.zip"
        if not folder.is_dir() and not packed.is_file():
            raise BadPlan(
                f"no shard for stage {stage.name!r}: neither {str(folder)!r} nor {str(packed)!r} is there",
                remedy="run `splitnet plan` again, which cuts the model, or say where the shards are (--shards)",
            )
        found[stage.name] = folder if folder.is_dir() else packed
    return found


def open_shards(plan: Plan, shards: Mapping[str, Shard | str | Path] | str | Path) -> dict[str, Shard]:
    """Every stage's shard, checked against the plan; `shards` by stage, or a directory for `find_shards`. Raises BadPlan or BadShard."""
    if isinstance(shards, str | Path):
        shards = find_shards(plan, shards)
    names = [stage.name for stage in plan.stages]
    if missing := [stage for stage in names if stage not in shards]:
        raise BadPlan(f"there is no shard for stage {missing[0]!r}", remedy="cut the model: `splitnet plan` does it, and `partitioner.cut`")
    if strange := sorted(set(shards) - set(names)):
        raise BadPlan(
            f"there is a shard for stage {strange[0]!r}, which the plan does not have", remedy="give the shards that were cut for this plan"
        )
    opened = {}
    for stage in plan.stages:
        given = shards[stage.name]
        shard = given if isinstance(given, Shard) else open_shard(given)
        opened[stage.name] = shard
        _check_shard(plan, stage.name, stage.shard, shard)
    return opened


def _check_shard(plan: Plan, stage: str, planned_sha256: str, shard: Shard) -> None:
    manifest = shard.manifest
    remedy = "cut the model for this plan: `splitnet plan` does it, and `partitioner.cut`"
    if manifest.model_sha256 != plan.model_sha256:
        raise BadPlan(
            f"the plan is for model {plan.model!r} ({plan.model_sha256[:12]}), the shard {shard.path} was cut from {manifest.model!r} ({manifest.model_sha256[:12]})",
            stage=stage,
            remedy=remedy,
        )
    if manifest.stage != stage:
        raise BadPlan(f"the shard {shard.path} is for stage {manifest.stage!r}", stage=stage, remedy=remedy)
    if planned_sha256 and planned_sha256 != shard.sha256:
        raise BadPlan(f"the plan names shard {planned_sha256[:12]}, {shard.path} is {shard.sha256[:12]}", stage=stage, remedy=remedy)
    spec = plan.stage(stage)
    for side in ("inputs", "outputs"):
        if {t.name for t in getattr(spec, side)} != {t.name for t in getattr(manifest, side)}:
            raise BadPlan(f"plan and shard {shard.path} differ in the stage's {side}", stage=stage, remedy=remedy)


def check_nodes(plan: Plan, name: str, shards: Mapping[str, Shard], statuses: Mapping[str, NodeStatus]) -> None:
    """Before a byte is shipped: every node answers, the name is free, the memory suffices as far as a node tells."""
    if silent := [status for status in statuses.values() if status.error]:
        raise NodeUnavailable(
            "; ".join(f"node {s.name!r} at {s.address}: {s.error}" for s in silent),
            remedy="start `splitnet node` there, or correct the addresses in the plan's cluster file and plan again",
        )
    for node, status in statuses.items():
        held = status.deployment(name)
        if held is not None and (held.plan_sha256 != plan.sha256 or held.state != "active"):
            raise AlreadyExists(
                f"it already serves another plan under the name {name!r} (model {held.model!r})",
                node=node,
                remedy=f"put this one in its place with --update, choose another --name, or take that one off first: `splitnet unload {name}`",
            )
        needed = sum(_stage_bytes(plan, shards).get(stage.name, 0) for stage in plan.held_at(node))
        free = status.memory_limit_bytes - status.memory_used_bytes
        if status.memory_limit_bytes and held is None and needed > free:
            raise InsufficientMemory(
                f"its stages need {needed} bytes, {max(0, free)} of {status.memory_limit_bytes} are free",
                node=node,
                remedy="unload another deployment, raise the node's --memory, or plan again with its true limit in the cluster file",
            )


def missing_memory(
    plan: Plan, name: str, shards: Mapping[str, Shard], statuses: Mapping[str, NodeStatus], without: Collection[int] = ()
) -> dict[str, int]:
    """By node: the bytes that a node with a limit lacks to hold the plan beside what it holds, once the generations `without` have gone.
    Weights of shards that it holds already count once. `statuses`: by address, with shards."""
    needed = _stage_bytes(plan, shards)
    missing = {}
    for node in plan.nodes:
        stages = plan.held_at(node.name)
        status = statuses[node.address] if stages else None
        if status is None or not status.memory_limit_bytes:
            continue
        staying = [d for d in status.deployments if d.name != name or d.generation not in without]
        if any(d.name == name and d.plan_sha256 == plan.sha256 for d in staying):
            continue
        loaded = {sha256 for d in staying for sha256 in d.shards.values()}
        own = {stage.name: shards[stage.name] for stage in stages}
        needed_bytes = sum(needed[s] - (shard.manifest.param_bytes if shard.sha256 in loaded else 0) for s, shard in own.items())
        leaving = [d for d in status.generations(name) if d.generation in without]
        freed = sum(s.reserved_bytes for d in leaving for s in d.stages if d.shards.get(s.name) not in loaded)
        lacking = needed_bytes - (status.memory_limit_bytes - status.memory_used_bytes + freed)
        if lacking > 0:
            missing[node.name] = lacking
    return missing


def _stage_bytes(plan: Plan, shards: Mapping[str, Shard]) -> dict[str, int]:
    """What each stage takes of its node."""
    received = {stage.name: sum(t.bytes for t in plan.transfers if t.target == stage.name) for stage in plan.stages}
    manifests = {stage: shard.manifest for stage, shard in shards.items()}
    caches = {stage: plan.generation.cache_bytes(stage) if plan.generation is not None else 0 for stage in manifests}
    return {stage: stage_memory_bytes(m.param_bytes, m.activation_bytes, received[stage]) + caches[stage] for stage, m in manifests.items()}
