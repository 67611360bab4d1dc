"""Every error that splitnet raises on purpose, and how it travels.

    SplitnetError
     |-- UserError                 the caller must change something (exit status 2)
     |    |-- BadInput             a tensor with a wrong name, dtype or shape; a bad option
     |    |-- BadModel             a MODEL argument that cannot be loaded
     |    |-- CaptureError         a module that cannot be exported or divided
     |    |-- BadPlan              a plan that is malformed, of another version, or for another model
     |    |-- BadCluster           a cluster file that is malformed, or describes what cannot be
     |    |-- BadShard             a shard that is malformed, tampered with, or not allowed
     |    |-- NoPlan               nothing fits: memory, links or constraints leave no plan
     |    |-- NotFound             no such deployment, stage, shard or node
     |    |-- AlreadyExists        the name is taken by something else
     |    |-- NotPermitted         refused by policy (plaintext on an open address, a role)
     |    `-- MissingExtra         an optional dependency is not installed
     `-- ServiceError              the system could not do it now (exit status 1)
          |-- Overloaded           the pipeline is full; `retry_after_s` says when to come back
          |-- InsufficientMemory   a shard does not fit under the node's memory limit
          |-- StorageFailure       the disk is full, or cannot be written
          |-- DeadlineExceeded     the request's time ran out
          |-- Cancelled            somebody cancelled the request
          |-- NodeUnavailable      a node cannot be reached, or went away
          |-- Moved                another node takes the requests now; `address` says which
          |-- EngineFailure        the shard's computation failed
          |-- ReferenceLost        a delta frame refers to one that was lost; sending the request again helps
          `-- ProtocolError        a peer sent what the contract does not allow

An error names the place (node, stage, request), what was expected, what came, and the remedy. It crosses the network as a
`Failure` message or a gRPC status (see `splitnet.channel`) and comes out as the same class.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AlreadyExists", "BadCluster", "BadInput", "BadModel", "BadPlan", "BadShard", "Cancelled", "CaptureError", "DeadlineExceeded",
    "EngineFailure", "InsufficientMemory", "MissingExtra", "Moved", "NoPlan", "NodeUnavailable", "NotFound", "NotPermitted", "Overloaded",
    "ProtocolError", "ReferenceLost", "ServiceError", "SplitnetError", "StorageFailure", "UserError", "error_class",
]  # fmt: skip


class SplitnetError(Exception):
    """Base of all. `grpc_code` is the numeric gRPC status that it travels as."""

    grpc_code: ClassVar[int] = 2  # UNKNOWN
    exit_status: ClassVar[int] = 1
    batch: int | None = None  #: its place in a stream of batches, where it arose in one

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        node: str = "",
        stage: str = "",
        request: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.node = node
        self.stage = stage
        self.request = request
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        named = (("node", self.node), ("stage", self.stage), ("request", self.request))
        place = ", ".join(f"{noun} {name!r}" for noun, name in named if name)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n  remedy: {self.remedy}" if self.remedy else text

    def at(self, *, node: str = "", stage: str = "", request: str = "") -> SplitnetError:
        """Fills in the place where it is still empty; returns self, to be raised."""
        self.node = self.node or node
        self.stage = self.stage or stage
        self.request = self.request or request
        return self


class UserError(SplitnetError):
    grpc_code = 3  # INVALID_ARGUMENT
    exit_status = 2


class BadInput(UserError):
    pass


class BadModel(UserError):
    pass


class CaptureError(UserError):
    pass


class BadPlan(UserError):
    pass


class BadCluster(UserError):
    pass


class BadShard(UserError):
    pass


class NoPlan(UserError):
    grpc_code = 9  # FAILED_PRECONDITION


class NotFound(UserError):
    grpc_code = 5


class AlreadyExists(UserError):
    grpc_code = 6


class NotPermitted(UserError):
    grpc_code = 7


class MissingExtra(UserError):
    grpc_code = 9


class ServiceError(SplitnetError):
    pass


class Overloaded(ServiceError):
    grpc_code = 8  # RESOURCE_EXHAUSTED


class InsufficientMemory(ServiceError):
    grpc_code = 9


class StorageFailure(ServiceError):
    grpc_code = 9


class DeadlineExceeded(ServiceError):
    grpc_code = 4


class Cancelled(ServiceError):
    grpc_code = 1


class NodeUnavailable(ServiceError):
    grpc_code = 14


class Moved(ServiceError):
    """`address`: of the ingress now. The client SDK goes there by itself."""

    grpc_code = 9

    def __init__(self, message: str, *, address: str = "", **place: Any) -> None:
        super().__init__(message, **place)
        self.address = address


class EngineFailure(ServiceError):
    grpc_code = 13  # INTERNAL


class ReferenceLost(ServiceError):
    grpc_code = 10  # ABORTED


class ProtocolError(ServiceError):
    grpc_code = 3


_BY_NAME: dict[str, type[SplitnetError]] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, SplitnetError)
}


def error_class(kind: str) -> type[SplitnetError]:
    """The class that travelled as `kind`; ServiceError for a name that this version does not know."""
    return _BY_NAME.get(kind, ServiceError)
