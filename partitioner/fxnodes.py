"""Reading nodes of torch's exported graphs: which count, what they leave as it is, and where in the user's module they came from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from splitnet.errors import CaptureError

__all__ = ["as_tuple", "is_whole", "keeps_layout", "live_nodes", "placeholders", "refuse_chance", "scope_of", "where", "without_garbage"]


def as_tuple(items: Any) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, list | tuple) else (items,)


def live_nodes(module: GraphModule) -> set[Node]:
    """What the output needs; assertions of tracing are not among it."""
    live: set[Node] = set()
    pending = [n for n in module.graph.nodes if n.op == "output"]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return live


def placeholders(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def keeps_layout(node: Node) -> bool:
    """Whether an identity of a functional graph can go: its input has the same strides and starts its memory, so that every kernel
    behind sees the same."""
    source = node.args[0]
    if node.kwargs or len(node.args) != 1 or not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    alike = [str(s) for s in before.stride()] == [str(s) for s in after.stride()]
    return alike and str(before.storage_offset()) == "0"


def is_whole(node: Node) -> bool:
    """x[0:] in one dimension, as indexing leaves behind."""
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    to_the_end = end is None or (isinstance(end, int) and end >= (1 << 63) - 1)
    return bool(not isinstance(start, Node) and not start and to_the_end and step == 1 and not node.kwargs)


_FILLED: dict[str, tuple[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {
    "aten.empty.memory_format": ("aten.zeros.default", lambda args: args),
    "aten.new_empty.default": ("aten.new_zeros.default", lambda args: args),
    "aten.empty_like.default": ("aten.zeros_like.default", lambda args: args),
}


def without_garbage(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Memory that nobody wrote becomes zeros: whatever overwrites it gives the same, and nothing leaks."""
    if op in _FILLED:
        op, change = _FILLED[op]
        kwargs = {k: a for k, a in kwargs.items() if k != "memory_format" or op == "aten.zeros_like.default"}
        return op, change(args), kwargs
    return op, args, kwargs


def refuse_chance(op: str, node: Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    given = {a.name: value for a, value in zip(target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    if given.get("dropout_p") or (given.get("train") is True and given.get("dropout")):
        raise CaptureError(
            f"operator {op} drops out at random, so that a split answer could not equal the whole{where(node)}",
            remedy="call module.eval()",
        )
    if op == "aten.batch_norm.default" and given.get("training"):
        raise CaptureError(f"operator {op} is in training mode and changes its buffers{where(node)}", remedy="call module.eval()")


def scope_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("module.").removeprefix("module")


def where(node: Node) -> str:
    """The user's line, from the stack that export recorded."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [m for m in lines if not re.search(r"[/\\]torch[/\\]|[/\\]partitioner[/\\]", m[0])] or lines
    if not own:
        return ""
    filename, line, function, source = own[-1]
    return f" (at {filename}:{line}, in {function}: {source.strip()})"
