"""What a node says about a deployment, and whether a client's inputs fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from splitnet import wire
from splitnet.errors import BadInput, Moved, NodeUnavailable, NotFound, NotPermitted, Overloaded
from splitnet.generation import TextModel
from splitnet.generations import FIRST, generation_key
from splitnet.noise import Noise
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec

__all__ = ["Deployment", "Inputs", "as_arrays", "choose"]

_RESTORED_S = 0.5  # after which to ask again for what is being restored
#: Arrays by name; or, for a model with one input, the array alone. An array is whatever `numpy.asarray` takes.
Inputs: TypeAlias = Mapping[str, Any] | np.ndarray | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A plan that is served. `max_in_flight` is how many requests the ingress takes at once, from all its clients. `text`: of a decoder model, which takes requests
    to generate and no others."""

    name: str
    node: str  # the ingress, by its name in the plan
    address: str
    model: str
    plan_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_in_flight: int
    max_tensor_bytes: int
    text: TextModel | None = None
    noise: Noise | None = None  # on what leaves that node for others: what each answer has cost of privacy
    followers: tuple[str, ...] = ()  # addresses of those that take over, one after the other, when the ingress is lost


def choose(reply: pb.DescribeReply, name: str, address: str) -> Deployment:
    """The deployment called `name`; without a name the one whose ingress the node is, if there is exactly one.

    Raises NotFound where there is none or the choice is the caller's, NotPermitted where another node takes the requests (Moved where that
    was not always so), NodeUnavailable where the node is about to go, and Overloaded where it was started again and is loading it. `name` may be the key of one generation: NAME@2.
    """
    if reply.draining:
        raise NodeUnavailable(
            f"the node at {address} is draining: it takes no new requests", node=reply.name, remedy="try again once it is back"
        )
    named: dict[str, pb.DeploymentStatus] = {}
    for status in reply.deployments:  # the active generation of each stands first
        named.setdefault(status.name, status)
    pinned = {generation_key(s.name, s.generation): s for s in reply.deployments if s.generation > FIRST}
    listed = ", ".join(repr(known) for known in sorted(named)) or "none"
    if name:
        if name not in named and name not in pinned:
            raise NotFound(
                f"no deployment {name!r} at {address}; it has {listed}",
                node=reply.name,
                remedy="name one of these, or run `splitnet deploy`",
            )
        found = named[name] if name in named else pinned[name]
    else:
        if not named:
            raise NotFound(f"nothing is deployed at {address}", node=reply.name, remedy="run `splitnet deploy plan.json`")
        entered_here = [status for status in named.values() if status.ingress and not status.moved_to]
        if len(entered_here) > 1 or (not entered_here and len(named) > 1):
            raise NotFound(f"several deployments are at {address}: {listed}", node=reply.name, remedy="say which: deployment=NAME")
        found = entered_here[0] if entered_here else next(iter(named.values()))
    if found.state == "restoring":
        raise Overloaded(
            f"{found.name!r} is being loaded from the disk of the node at {address}, which was started again",
            node=reply.name,
            remedy="try again in a moment",
            retry_after_s=_RESTORED_S,
        )
    if found.moved_to and name not in pinned:
        raise Moved(
            f"requests for {found.name!r} go to another node now",
            node=reply.name,
            address=found.moved_to,
            remedy=f"connect to {found.moved_to}",
        )
    if not found.ingress:
        where = found.ingress_address or "the node of the plan's first stage"
        raise NotPermitted(
            f"the node at {address} serves a later stage of {found.name!r}, it does not take its requests",
            node=reply.name,
            remedy=f"connect to {where}",
        )
    return Deployment(
        name=name if name in pinned else found.name,
        node=found.node or reply.name,
        address=address,
        model=found.model,
        plan_sha256=found.plan_sha256,
        inputs=tuple(wire.spec_from_message(spec) for spec in found.inputs),
        outputs=tuple(wire.spec_from_message(spec) for spec in found.outputs),
        max_in_flight=max(1, found.max_in_flight),
        max_tensor_bytes=reply.max_tensor_bytes or wire.MAX_TENSOR_BYTES,
        followers=tuple(found.followers),
        noise=Noise.from_message(found.noise) if found.HasField("noise") else None,
        text=TextModel.from_message(found.generating) if found.HasField("generating") else None,
    )


def as_arrays(inputs: Inputs, specs: Sequence[TensorSpec], max_tensor_bytes: int = wire.MAX_TENSOR_BYTES) -> dict[str, np.ndarray]:
    """The inputs as arrays, in the order of `specs`. No value is converted: a list of Python floats is float64, and is refused where
    float32 is expected; only the byte order is made this machine's. Nothing is copied that is an array already.

    Raises BadInput for a name, dtype, shape or size that does not fit.
    """
    names = [spec.name for spec in specs]
    if not isinstance(inputs, Mapping):
        if len(names) != 1:
            raise BadInput(f"the model has {len(names)} inputs: {', '.join(names)}", remedy="give a mapping from name to array")
        inputs = {names[0]: inputs}
    if unknown := [name for name in inputs if name not in names]:
        raise BadInput(f"no input {unknown[0]!r}; the model has {', '.join(names)}")
    if missing := [name for name in names if name not in inputs]:
        raise BadInput(f"input {missing[0]!r} is missing; the model has {', '.join(names)}")
    symbols: dict[str, int] = {}
    arrays = {}
    for spec in specs:
        array = arrays[spec.name] = _as_array(spec.name, inputs[spec.name])
        spec.check(array, symbols)
        if array.nbytes > max_tensor_bytes:
            raise BadInput(
                f"input {spec.name!r}: {array.nbytes} bytes are more than the node's limit of {max_tensor_bytes}",
                remedy="send smaller batches, or raise the node's --max-tensor",
            )
    return arrays


def _as_array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        raise BadInput(f"input {name!r}: a masked array would lose its mask", remedy="fill it: array.filled(value)")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; a torch tensor that is bfloat16, or requires grad
        raise BadInput(f"input {name!r} cannot become an array: {error}") from None
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
