"""The reference engine: a shard's graph document, run operator by operator with torch on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import safetensors
import torch

from nodes.engines.base import check_inputs
from splitnet.errors import BadShard
from splitnet.graph import GraphDocument, Operator, WeightSpec, parse
from splitnet.interpreter import Program
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.shard import Shard
from splitnet.tensors import TensorSpec

__all__ = ["TorchGraphEngine", "to_array", "to_tensor"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMBERS = {"int": int, "float": float, "bool": bool}
_FINE_S = 1e-6


class TorchGraphEngine:
    """See `nodes.engines.base.Engine`. Bit for bit what the original module computes with the same number of threads."""

    name: ClassVar[str] = "torch-graph"

    def __init__(
        self,
        document: GraphDocument,
        weights: Mapping[str, torch.Tensor],
        inputs: Sequence[TensorSpec],
        max_value_bytes: int = MAX_VALUE_BYTES,
    ) -> None:
        self._inputs = document.inputs
        self._specs = inputs
        self._outputs = document.outputs
        self._memory_bytes = sum(w.nbytes for w in weights.values())
        self._program = Program(document, torch, weights, max_value_bytes=max_value_bytes)

    @classmethod
    def load(cls, shard: Shard, *, threads: int, made_up: bool = False, max_value_bytes: int = MAX_VALUE_BYTES) -> Self:
        torch.set_num_threads(threads)
        document = parse(shard.member("graph.json").read_bytes())
        for what, listed, there in (
            ("input", shard.manifest.inputs, [i.name for i in document.inputs]),
            ("output", shard.manifest.outputs, list(document.outputs)),
        ):
            if sorted(spec.name for spec in listed) != sorted(there):
                raise BadShard(f"{shard.path}: the manifest's {what}s are not the graph's", remedy="cut the model again")
        return cls(document, _load_weights(shard, document.weights, made_up), shard.manifest.inputs, max_value_bytes)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._run(inputs, None)

    def run_timed(self, inputs: Mapping[str, np.ndarray], on_operator: Callable[[str, float], None]) -> dict[str, np.ndarray]:
        def on_step(op: Operator, seconds: float, _result: Any) -> None:
            if op.results:
                on_operator(op.results[0], seconds)

        return self._run(inputs, on_step, _operator_clock())

    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        on_step: Callable[[Operator, float, Any], None] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, np.ndarray]:
        check_inputs(inputs, self._specs)
        values: list[Any] = []
        with self._mode():
            for given in self._inputs:
                array = inputs[given.name]
                values.append(self._laid_out(to_tensor(array)) if given.kind == "tensor" else _NUMBERS[given.kind](array.item()))
            results = self._program.run(values, on_step, clock)
            return {name: to_array(value) for name, value in zip(self._outputs, results, strict=True)}

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _mode(self) -> AbstractContextManager[None]:
        """no_grad, and weights that say they are trainable, as in the original: torch chooses kernels by that, and in inference mode it
        would not see it."""
        return torch.no_grad()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor with the same strides (a copy only where torch has no such strides: negative, or not whole
    elements)."""
    kind = array.dtype
    if any(step < 0 or step % kind.itemsize for step in array.strides):
        array = np.ascontiguousarray(array).reshape(array.shape)
    if kind == _BFLOAT16:
        array = array.view(np.int16)
    if not array.flags.writeable:
        array = np.asarray(_Writeable(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if kind == _BFLOAT16 else tensor


class _Writeable:
    """torch has no read-only tensors and warns of read-only arrays. Graph documents hold functional operators only, so that
    nothing is written: this presents the same memory without the flag."""

    def __init__(self, array: np.ndarray) -> None:
        self._owner = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def to_array(value: torch.Tensor | float) -> np.ndarray:
    """The same memory as an array with the same strides; a number becomes a 0-dimensional array."""
    if not isinstance(value, torch.Tensor):
        return np.array(value)  # int64, float64 or bool
    value = value.detach().resolve_conj().resolve_neg()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(_BFLOAT16)
    return value.numpy()


def _load_weights(shard: Shard, specs: Mapping[str, WeightSpec], made_up: bool) -> dict[str, torch.Tensor]:
    """Each weight in fresh memory (torch starts it on a 64-byte boundary), so that no file stays mapped."""
    if made_up:
        needed = sum(math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize for spec in specs.values())
        if needed > shard.manifest.param_bytes:  # what was declared is what was checked against the node's memory
            raise BadShard(f"{shard.path}: the weights take {needed} bytes, the manifest declares {shard.manifest.param_bytes}")
    weights: dict[str, torch.Tensor] = {}
    for path in shard.weights:
        with safetensors.safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is not a mapping)
                if name not in specs:
                    raise BadShard(f"{path}: the graph does not know the weight {name!r}", remedy="cut the model again")
                weights[name] = _restore(file.get_tensor(name), name, specs[name], str(path))
    if made_up:
        weights |= {name: _made_up(spec) for name, spec in specs.items() if name not in weights}
    if missing := sorted(set(specs) - set(weights)):
        raise BadShard(f"{shard.path}: the weight {missing[0]!r} is missing", remedy="cut the model again, or load the shard again")
    return weights


def _restore(stored: torch.Tensor, name: str, spec: WeightSpec, path: str) -> torch.Tensor:
    shape = tuple(spec.shape[axis] for axis in spec.order)
    if stored.dtype != getattr(torch, spec.dtype) or tuple(stored.shape) != shape:
        raise BadShard(
            f"{path}: weight {name!r} should be {spec.dtype} {shape}, the file has {str(stored.dtype).removeprefix('torch.')} {tuple(stored.shape)}",
            remedy="cut the model again",
        )
    return _empty(spec).copy_(stored.permute([spec.order.index(axis) for axis in range(len(shape))])).requires_grad_(spec.grad)


def _empty(spec: WeightSpec) -> torch.Tensor:
    """With the strides of the original; a tensor of its own, not a view of one: a view's views would ask the base whether it is trainable."""
    stored = tuple(spec.shape[axis] for axis in spec.order)
    like = torch.empty(stored, dtype=getattr(torch, spec.dtype), device="meta").permute([spec.order.index(a) for a in range(len(stored))])
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def _made_up(spec: WeightSpec) -> torch.Tensor:
    """Ordinary numbers that keep an activation's size from layer to layer (a vector may be a variance: positive); subnormal ones or
    infinities would be timed instead of arithmetic. Ones where an element is no float."""
    weight = _empty(spec)
    if not weight.is_floating_point():
        weight.fill_(1)
    elif weight.ndim > 1:
        weight.normal_(0.0, (weight.shape[0] / max(weight.numel(), 1)) ** 0.5)
    else:
        weight.uniform_(0.5, 1.5)
    return weight.requires_grad_(spec.grad)


def _operator_clock() -> Callable[[], float]:
    """The thread's processor time where one thread computes and its clock is fine enough: a box that is held to a share of its processors stops
    at the same operators of every run, which must not bear all of it."""
    fine = time.get_clock_info("thread_time").resolution <= _FINE_S
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
