"""From torch's exported graph to operators of a graph document: names, plain arguments, sizes as expressions."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from partitioner.expressions import Expression, Tree, render
from partitioner.fxnodes import as_tuple, is_whole, keeps_layout, live_nodes, placeholders, refuse_chance, scope_of, where, without_garbage
from splitnet.errors import CaptureError
from splitnet.graph import DEVICE, Dtype, GraphDocument, Input, Layout, MemoryFormat, Operator, Ref, Weight
from splitnet.operators import is_allowed
from splitnet.tensors import DTYPES

__all__ = ["Lowered", "Lowering", "Value"]

_ODD = re.compile(r"[^A-Za-z0-9_.\-]")
_REMEDY = "splitnet runs torch's functional operators; replace this one in the module, or keep it out of the captured part"
_PYTHON: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.floordiv: "floordiv", operator.mod: "mod",
    operator.truediv: "truediv", operator.neg: "neg", operator.pow: "pow", operator.eq: "eq", operator.ne: "ne", operator.lt: "lt",
    operator.le: "le", operator.gt: "gt", operator.ge: "ge", operator.and_: "and", operator.or_: "or", torch.sym_not: "not",
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_int: "int", torch.sym_float: "float",
}  # fmt: skip
_IDENTITIES = {"aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default", "aten.clone.default"}
_CHANCE = re.compile(r"rand|bernoulli|dropout|multinomial|poisson|normal_functional|exponential|uniform|gumbel|rrelu|cauchy|geometric")


@dataclass(frozen=True)
class Value:
    """A value of the model: its dtype and symbolic shape as texts, and its kind ("tensor", "int", "float", "bool")."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass
class Lowered:
    operators: list[Operator] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    scopes: dict[str, str] = field(default_factory=dict)  # first result -> module path
    names: dict[str, str] = field(default_factory=dict)  # first result -> vertex name
    sizes: dict[str, Tree] = field(default_factory=dict)  # size value -> expression


class Lowering:
    """Lowers one graph; the bodies of wrappers are inlined, the bodies of branches become documents of their own."""

    def __init__(self, symbols: Mapping[Any, str], taken: set[str]) -> None:
        self.result = Lowered()
        self._symbols = symbols
        self._taken = taken
        self._sizes: dict[str, str] = {}  # rendered expression -> value

    def lower(self, module: GraphModule, environment: dict[Node, Any]) -> list[Any]:
        """Adds the operators of a graph whose placeholders stand in `environment` (as Ref, Weight or constant). Returns what it
        gives back."""
        live = live_nodes(module)
        for node in module.graph.nodes:
            if node not in live:
                continue
            if node.op == "output":
                return [self._argument(item, environment, node) for item in as_tuple(node.args[0])]
            if node.op == "call_function" and node not in environment:
                self._call(module, node, environment)
            elif node.op not in ("placeholder", "get_attr", "call_function"):
                raise CaptureError(f"the exported graph has a {node.op} node ({node.target}){where(node)}", remedy=_REMEDY)
        raise AssertionError("a graph without an output")

    def name(self, wanted: str) -> str:
        """A free name, like the wanted one."""
        base = _ODD.sub("_", wanted) or "value"
        name, n = base, 1
        while name in self._taken:
            name, n = f"{base}_{n}", n + 1
        self._taken.add(name)
        return name

    def add(self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: str, meta: Any, scope: str) -> Ref:
        """Appends an operator with one result."""
        name = self.name(wanted)
        self._define(name, meta, wanted)
        self._append(Operator(op, args, kwargs, name), name, scope)
        return Ref(name)

    def alias(self, source: Ref | Weight, meta: Any) -> Ref:
        """The same tensor as a value of its own."""
        name = self.name(f"{source.name}_out")
        self._define(name, meta, name)
        self._append(Operator("aten.alias.default", (source,), {}, name), name, "")
        return Ref(name)

    def _append(self, op: Operator, vertex: str, scope: str) -> None:
        self.result.operators.append(op)
        if op.results:
            self.result.names[op.results[0]] = vertex
            self.result.scopes[op.results[0]] = scope

    # ------------------------------------------------------------------------------------------------------------- one node

    def _call(self, module: GraphModule, node: Node, environment: dict[Node, Any]) -> None:
        target = node.target
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and self._size(node, value, environment):
            return
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._higher_order(module, node, environment)
            return
        if target is operator.getitem:
            return  # its source defined it
        op = self._operator_name(node)
        if op in _IDENTITIES and keeps_layout(node):
            environment[node] = self._argument(node.args[0], environment, node)
            return
        if op == "aten.slice.Tensor" and is_whole(node):
            environment[node] = self._argument(node.args[0], environment, node)
            return
        args = tuple(self._argument(a, environment, node) for a in node.args)
        kwargs = {k: self._argument(a, environment, node) for k, a in node.kwargs.items() if not (k == "pin_memory" and not a)}
        op, args, kwargs = without_garbage(op, args, kwargs)
        if not is_allowed(op):
            chance = "draws random numbers, so that a split answer could not equal the whole" if _CHANCE.search(op) else "is not supported"
            raise CaptureError(f"operator {op} {chance}{where(node)}", remedy=_REMEDY)
        refuse_chance(op, node)
        self._results(node, op, args, kwargs, environment)

    def _results(self, node: Node, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: dict[Node, Any]) -> None:
        value = node.meta.get("val")
        if not isinstance(value, list | tuple):
            environment[node] = self.add(op, args, kwargs, node.name, value, scope_of(node))
            return
        users = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        out: list[str | None] = []
        for i, item in enumerate(value):
            user = users.get(i)
            if user is None:
                out.append(None)
            else:
                name = self.name(user.name)
                self._define(name, item, user.name)
                environment[user] = Ref(name)
                out.append(name)
        twins = [user for user in node.users if user.target is operator.getitem and user is not users[user.args[1]]]
        for twin in twins:
            environment[twin] = environment[users[twin.args[1]]]
        self._append(Operator(op, args, kwargs, tuple(out)), self.name(node.name), scope_of(node))

    def _operator_name(self, node: Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target is torch.ops.aten.sym_size.int:
                return "py.size"
            namespace, name = target.name().split("::")
            return f"{namespace}.{name.split('.')[0]}.{target._overloadname}"
        if target in _PYTHON:
            return f"py.{_PYTHON[target]}"
        text = getattr(target, "__name__", str(target)).removeprefix("sym_").removeprefix("_sym_")
        return f"py.{text}"

    def _size(self, node: Node, value: torch.SymInt, environment: dict[Node, Any]) -> bool:
        """A size that follows from the shapes of the inputs is an expression, however the graph came to it."""
        tree = Expression(value.node.expr, self._symbols).tree
        if tree is None:
            return False
        text = render(tree)
        if isinstance(tree, int):
            environment[node] = tree
            return True
        if text not in self._sizes:
            name = self._sizes[text] = self.name(text if isinstance(tree, str) else node.name)
            self.result.sizes[name] = tree
            self.result.values[name] = Value(name, "int", "int64", ())
        environment[node] = Ref(self._sizes[text])
        return True

    def _define(self, name: str, meta: Any, wanted: str) -> None:
        if isinstance(meta, torch.Tensor):
            dtype = str(meta.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise CaptureError(
                    f"value {wanted!r} has the dtype {dtype}, which cannot be sent", remedy=f"convert it to one of {', '.join(DTYPES)}"
                )
            shape = tuple(self.dimension(size) for size in meta.shape)
            self.result.values[name] = Value(name, "tensor", dtype, shape)
            return
        for kinds, kind, dtype in (
            ((torch.SymBool, bool), "bool", "bool"),
            ((torch.SymInt, int), "int", "int64"),
            ((torch.SymFloat, float), "float", "float64"),
        ):
            if isinstance(meta, kinds):
                self.result.values[name] = Value(name, kind, dtype, ())
                return
        raise CaptureError(f"value {wanted!r} is a {type(meta).__name__}, which splitnet cannot divide", remedy=_REMEDY)

    def dimension(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        tree = Expression(size.node.expr, self._symbols).tree
        if tree is None:
            return _ODD.sub("_", str(size.node.expr))[:64]
        return tree if isinstance(tree, int) else render(tree)

    # ------------------------------------------------------------------------------------------------------- arguments, bodies

    def _argument(self, a: Any, environment: dict[Node, Any], node: Node) -> Any:
        match a:
            case Node():
                if a not in environment:
                    raise CaptureError(f"value {a.name!r} ({a.target}) cannot be expressed{where(a)}", remedy=_REMEDY)
                return environment[a]
            case list() | tuple():
                return tuple(self._argument(item, environment, node) for item in a)
            case torch.dtype():
                name = str(a).removeprefix("torch.")
                if name not in DTYPES:
                    raise CaptureError(f"operator {node.target} makes {name}, which is not supported{where(node)}", remedy=_REMEDY)
                return Dtype(name)
            case torch.device():
                return DEVICE
            case torch.layout() if a is torch.strided:
                return Layout("strided")
            case torch.memory_format():
                return MemoryFormat(str(a).removeprefix("torch."))
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                raise CaptureError(f"operator {node.target} has the inline size {a}{where(node)}", remedy=_REMEDY)
            case None | bool() | int() | float() | complex() | str():
                return a
        raise CaptureError(f"operator {node.target} has an argument {a!r:.80} of type {type(a).__name__}{where(node)}", remedy=_REMEDY)

    def _higher_order(self, module: GraphModule, node: Node, environment: dict[Node, Any]) -> None:
        name = str(node.target)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
            body = getattr(module, str(node.args[at].target))  # type: ignore[union-attr]
            inner = dict(environment)
            for placeholder, operand in zip(placeholders(body), node.args[at + 1 :], strict=True):
                inner[placeholder] = self._argument(operand, environment, node)
            results = self.lower(body, inner)
            for user in node.users:
                environment[user] = results[user.args[1]]  # type: ignore[index]
        elif name == "cond":
            chosen, then, otherwise, operands = node.args
            bodies = [self._branch(getattr(module, str(body.target)), len(as_tuple(operands))) for body in (then, otherwise)]  # type: ignore[union-attr]
            args = (self._argument(chosen, environment, node), *bodies, self._argument(operands, environment, node))
            self._results(node, "py.cond", args, {}, environment)
        else:
            raise CaptureError(f"control flow {name!r} is not supported{where(node)}", remedy=_REMEDY)

    def _branch(self, body: GraphModule, count: int) -> GraphDocument:
        lowering = Lowering({}, set())
        environment: dict[Node, Any] = {}
        inputs = []
        for placeholder in placeholders(body):
            name = lowering.name(placeholder.name)
            lowering._define(name, placeholder.meta["val"], name)
            inputs.append(Input(name, lowering.result.values[name].kind))
            environment[placeholder] = Ref(name)
        results = lowering.lower(body, environment)
        if len(inputs) != count or not all(isinstance(r, Ref) for r in results):
            raise CaptureError(
                "a branch of cond returns a constant, or uses what it is not handed", remedy="pass tensors in, return tensors"
            )
        return GraphDocument(tuple(inputs), {}, tuple(lowering.result.operators), tuple(r.name for r in results))
