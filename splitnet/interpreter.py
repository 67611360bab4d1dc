"""Runs a graph document with torch. No code is generated: a loop over operators that were looked up once.

The caller hands in the torch module, so that nothing here needs torch to be installed.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from splitnet.errors import BadShard, EngineFailure
from splitnet.graph import Device, Dtype, GraphDocument, Layout, MemoryFormat, Operator, Ref, Weight, references
from splitnet.guards import check_kinds, guarded, numbers_only
from splitnet.operators import is_allowed
from splitnet.output_sizes import MAX_VALUE_BYTES, sized

__all__ = ["Program"]

_LARGEST = 1 << 63

# The same kernels through torch's own Python bindings, which parse arguments about twice as fast as torch.ops does.
_BINDINGS = {
    "aten.linear.default": "_C._nn.linear",
    "aten.gelu.default": "_C._nn.gelu",
    "aten.scaled_dot_product_attention.default": "_C._nn.scaled_dot_product_attention",
    "aten.layer_norm.default": "layer_norm",
    "aten.embedding.default": "embedding",
    "aten.add.Tensor": "add",
    "aten.sub.Tensor": "sub",
    "aten.mul.Tensor": "mul",
    "aten.div.Tensor": "div",
    "aten.relu.default": "relu",
    "aten.silu.default": "_C._nn.silu",
    "aten.sigmoid.default": "sigmoid",
    "aten.tanh.default": "tanh",
    "aten.matmul.default": "matmul",
    "aten.conv2d.default": "conv2d",
    "aten.batch_norm.default": "batch_norm",
    "aten.view.default": "Tensor.view",
    "aten.expand.default": "Tensor.expand",
    "aten.transpose.int": "transpose",
    "aten.permute.default": "permute",
    "aten.unsqueeze.default": "unsqueeze",
    "aten.select.int": "select",
    "aten.cat.default": "cat",
    "aten.softmax.int": "softmax",
}


class _Step(NamedTuple):
    function: Callable[..., Any]
    template: list[Any]  # positional arguments, constants and weights in place
    slots: tuple[tuple[int, int], ...]  # (position in the arguments, register)
    makers: tuple[tuple[int, Callable[[list[Any]], Any]], ...]  # (position, makes a list that holds registers)
    kwargs: dict[str, Any]
    kwmakers: tuple[tuple[str, Callable[[list[Any]], Any]], ...]
    out: int  # register; -1: several results
    outs: tuple[int, ...]  # registers; -1: not used
    dead: tuple[int, ...]  # registers that are not used after this step
    operator: Operator


class Program:
    """A document made ready to run. It holds the weights that it uses, and no activation between runs."""

    def __init__(
        self, document: GraphDocument, torch: Any, weights: Mapping[str, Any], device: str = "cpu", max_value_bytes: int = MAX_VALUE_BYTES
    ) -> None:
        """`max_value_bytes`: see `splitnet.output_sizes`. Raises BadShard for an operator that this torch does not have."""
        self._max_value_bytes = max_value_bytes
        self._torch = torch
        self._device = torch.device(device)
        self._weights = weights
        self._registers: dict[str, int] = {}
        for given in document.inputs:
            self._registers[given.name] = len(self._registers)
        for op in document.operators:
            for name in op.results:
                self._registers[name] = len(self._registers)
        self._outputs = tuple(self._registers[name] for name in document.outputs)
        last = {r.name: i for i, op in enumerate(document.operators) for r in references((op.args, op.kwargs)) if isinstance(r, Ref)}
        self._unused = tuple(self._registers[i.name] for i in document.inputs if i.name not in last and i.name not in document.outputs)
        dying: dict[int, list[str]] = {}
        for i, op in enumerate(document.operators):
            for name in op.results:
                last.setdefault(name, i)
        for name, i in last.items():
            if name not in document.outputs:
                dying.setdefault(i, []).append(name)
        self._steps = [self._step(op, dying.get(i, [])) for i, op in enumerate(document.operators)]

    def run(
        self,
        inputs: Sequence[Any],
        on_step: Callable[[Operator, float, Any], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> list[Any]:
        """The outputs, in the document's order. `on_step` is called after each operator with its seconds by `clock` and its result. Raises
        EngineFailure that names the operator which failed. The caller chooses the gradient mode."""
        registers: list[Any] = [None] * len(self._registers)
        registers[: len(inputs)] = inputs
        for slot in self._unused:
            registers[slot] = None
        step = None
        try:
            if on_step is None:
                for step in self._steps:
                    function, template, slots, makers, kwargs, kwmakers, out, outs, dead, _ = step
                    args = template.copy()
                    for position, slot in slots:
                        args[position] = registers[slot]
                    for position, make in makers:
                        args[position] = make(registers)
                    if kwmakers:
                        kwargs = kwargs | {key: make(registers) for key, make in kwmakers}
                    if out >= 0:
                        registers[out] = function(*args, **kwargs)
                    else:
                        for slot, result in zip(outs, function(*args, **kwargs), strict=False):
                            if slot >= 0:
                                registers[slot] = result
                        result = None
                    for slot in dead:
                        registers[slot] = None
            else:
                for step in self._steps:
                    self._observed(step, registers, on_step, clock)
        except Exception as error:  # whatever a kernel raises becomes ours, with its place
            if step is None:
                raise
            raise _failure(step.operator, error) from error
        return [registers[slot] for slot in self._outputs]

    @staticmethod
    def _observed(step: _Step, registers: list[Any], on_step: Callable[[Operator, float, Any], None], clock: Callable[[], float]) -> None:
        start = clock()
        args = step.template.copy()
        for position, slot in step.slots:
            args[position] = registers[slot]
        for position, make in step.makers:
            args[position] = make(registers)
        result = step.function(*args, **step.kwargs, **{key: make(registers) for key, make in step.kwmakers})
        seconds = clock() - start
        if step.out >= 0:
            registers[step.out] = result
        else:
            for slot, item in zip(step.outs, result, strict=False):
                if slot >= 0:
                    registers[slot] = item
        for slot in step.dead:
            registers[slot] = None
        on_step(step.operator, seconds, result)

    # ---------------------------------------------------------------------------------------------------------- preparation

    def _step(self, op: Operator, dying: list[str]) -> _Step:
        template, slots, makers = [], [], []
        for position, argument in enumerate(op.args):
            constant = None
            if isinstance(argument, Ref):
                slots.append((position, self._registers[argument.name]))
            elif any(isinstance(r, Ref) for r in references(argument)):
                makers.append((position, self._maker(argument)))
            else:
                constant = self._constant(argument)
            template.append(constant)
        varying = {key for key, argument in op.kwargs.items() if any(isinstance(r, Ref) for r in references(argument))}
        return _Step(
            function=self._function(op),
            template=template,
            slots=tuple(slots),
            makers=tuple(makers),
            kwargs={key: self._constant(argument) for key, argument in op.kwargs.items() if key not in varying},
            kwmakers=tuple((key, self._maker(op.kwargs[key])) for key in sorted(varying)),
            out=self._registers[op.out] if isinstance(op.out, str) else -1,
            outs=() if isinstance(op.out, str) else tuple(-1 if name is None else self._registers[name] for name in op.out),
            dead=tuple(self._registers[name] for name in dying),
            operator=op,
        )

    def _maker(self, argument: Any) -> Callable[[list[Any]], Any]:
        if isinstance(argument, Ref):
            return operator.itemgetter(self._registers[argument.name])
        if isinstance(argument, tuple):
            items = [self._maker(item) for item in argument]
            return lambda registers: [make(registers) for make in items]
        constant = self._constant(argument)
        return lambda registers: constant

    def _constant(self, argument: Any) -> Any:
        match argument:
            case Weight(name):
                return self._weights[name]
            case Dtype(name) | Layout(name) | MemoryFormat(name):
                return getattr(self._torch, name)
            case Device():
                return self._device
            case GraphDocument():
                return Program(argument, self._torch, {}, str(self._device), self._max_value_bytes)
            case tuple():
                return [self._constant(item) for item in argument]
        return argument

    def _function(self, op: Operator) -> Callable[..., Any]:
        name = op.op
        if not is_allowed(name):
            raise BadShard(f"operator {name!r} is not allowed", remedy="only the operators that splitnet lists may run on a node")
        if name.startswith("py."):
            return _PYTHON[name[3:]]
        found = self._torch
        try:
            _, packet, overload = name.split(".")
            torch_operator = getattr(getattr(found.ops.aten, packet), overload)
            if binding := _BINDINGS.get(name):
                for part in binding.split("."):
                    found = getattr(found, part)
            else:
                found = torch_operator._op
        except AttributeError:
            raise BadShard(
                f"operator {name!r}: torch {self._torch.__version__} does not have it",
                remedy="install on this node the version of torch that cut the model",
            ) from None
        check_kinds(op, torch_operator._schema)
        return sized(name, guarded(name, found), torch_operator._schema, self._torch, self._max_value_bytes)


def _failure(op: Operator, error: Exception) -> EngineFailure:
    if isinstance(error, EngineFailure):
        return error
    result = ", ".join(op.results)
    text = str(error).strip().splitlines()
    return EngineFailure(f"operator {op.op} (-> {result}) failed: {type(error).__name__}: {text[0] if text else ''}"[:2000])


# --------------------------------------------------------------------------------------------------------- Python's operators


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A size has 64 bits: a document must not make numbers grow without end."""
    of_numbers = numbers_only(function)

    def run(*args: Any) -> Any:
        result = of_numbers(*args)
        if isinstance(result, int) and not -_LARGEST <= result < _LARGEST:
            raise OverflowError("a size of more than 64 bits")
        return result

    return run


def _power(base: float, exponent: float) -> float:
    if isinstance(exponent, int) and not 0 <= exponent <= 64:
        raise OverflowError(f"power {exponent} of a size")
    return base**exponent  # type: ignore[no-any-return]


def _size(tensor: Any, axis: int) -> int:
    return tensor.shape[axis]  # type: ignore[no-any-return]


def _read(tensor: Any, axis: int, scale: int, offset: int) -> int:
    size, rest = divmod(tensor.shape[axis] - offset, scale)
    if rest:
        raise ValueError(f"dimension {axis} is {tensor.shape[axis]}, which is not {scale} times a whole number plus {offset}")
    return int(size)


def _cond(chosen: Any, then: Program, otherwise: Program, operands: Sequence[Any]) -> list[Any]:
    return (then if bool(chosen) else otherwise).run(operands)


_PYTHON: dict[str, Callable[..., Any]] = {
    "add": _bounded(operator.add), "sub": _bounded(operator.sub), "mul": _bounded(operator.mul), "floordiv": numbers_only(operator.floordiv),
    "mod": numbers_only(operator.mod), "truediv": numbers_only(operator.truediv), "neg": operator.neg, "pow": _bounded(_power), "abs": abs, "min": min, "max": max,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "not": operator.not_, "and": operator.and_, "or": operator.or_, "int": int, "float": float, "sqrt": math.sqrt, "floor": math.floor,
    "ceil": math.ceil, "trunc": math.trunc, "round": round, "size": _size, "read": _read, "cond": _cond,
}  # fmt: skip
