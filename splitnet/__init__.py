"""splitnet: one neural network served by several small machines.

This package is what everybody shares (plans, clusters, shards, codecs, the client); `partitioner` measures and cuts models, `nodes`
serves them. Names are imported when they are first used, so `import splitnet` costs little and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "Alternative",
    "AsyncClient",
    "BadCluster",
    "BadInput",
    "BadModel",
    "BadPlan",
    "BadShard",
    "Batching",
    "Cancelled",
    "CaptureError",
    "Client",
    "Cluster",
    "ClusterNode",
    "Credentials",
    "DeadlineExceeded",
    "Deployed",
    "Deployment",
    "EngineFailure",
    "InsufficientMemory",
    "Link",
    "MissingExtra",
    "Moved",
    "NoPlan",
    "NodeRef",
    "NodeStatus",
    "NodeUnavailable",
    "NotFound",
    "NotPermitted",
    "OutputSpec",
    "Overloaded",
    "Plan",
    "Prediction",
    "Progress",
    "ProtocolError",
    "ReferenceLost",
    "ServiceError",
    "Shard",
    "SplitnetError",
    "StageSpec",
    "StorageFailure",
    "TensorSpec",
    "Transfer",
    "UserError",
    "deploy",
    "deploy_async",
    "open_shard",
    "status",
    "status_async",
    "undeploy",
    "undeploy_async",
]

_MODULES: dict[str, tuple[str, ...]] = {
    "splitnet.batching": ("Batching",),
    "splitnet.client": ("AsyncClient",),
    "splitnet.cluster": ("Cluster", "ClusterNode", "Link"),
    "splitnet.deployment": ("Deployment",),
    "splitnet.install": ("Deployed", "Progress", "deploy", "deploy_async", "status", "status_async", "undeploy", "undeploy_async"),
    "splitnet.node_status": ("NodeStatus",),
    "splitnet.plan": ("Alternative", "NodeRef", "OutputSpec", "Plan", "Prediction", "StageSpec", "Transfer"),
    "splitnet.security.credentials": ("Credentials",),
    "splitnet.shard": ("Shard", "open_shard"),
    "splitnet.sync": ("Client",),
    "splitnet.tensors": ("TensorSpec",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'splitnet' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "splitnet.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from splitnet.batching import Batching
    from splitnet.client import AsyncClient
    from splitnet.cluster import Cluster, ClusterNode, Link
    from splitnet.deployment import Deployment
    from splitnet.errors import (
        AlreadyExists,
        BadCluster,
        BadInput,
        BadModel,
        BadPlan,
        BadShard,
        Cancelled,
        CaptureError,
        DeadlineExceeded,
        EngineFailure,
        InsufficientMemory,
        MissingExtra,
        Moved,
        NodeUnavailable,
        NoPlan,
        NotFound,
        NotPermitted,
        Overloaded,
        ProtocolError,
        ReferenceLost,
        ServiceError,
        SplitnetError,
        StorageFailure,
        UserError,
    )
    from splitnet.install import Deployed, Progress, deploy, deploy_async, status, status_async, undeploy, undeploy_async
    from splitnet.node_status import NodeStatus
    from splitnet.plan import Alternative, NodeRef, OutputSpec, Plan, Prediction, StageSpec, Transfer
    from splitnet.security.credentials import Credentials
    from splitnet.shard import Shard, open_shard
    from splitnet.sync import Client
    from splitnet.tensors import TensorSpec
