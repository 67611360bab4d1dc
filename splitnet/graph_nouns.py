"""The nouns of the graph document, and how they are written. `splitnet.graph` describes the format and reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DEVICE", "GRAPH_VERSION", "Device", "Dtype", "GraphDocument", "Input", "Layout", "MemoryFormat", "Operator", "Ref", "Weight",
    "WeightSpec", "references",
]  # fmt: skip

GRAPH_VERSION = 1


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class Layout:
    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """The device of the engine that runs the graph, whichever that is."""


DEVICE = Device()


@dataclass(frozen=True, slots=True)
class Input:
    name: str
    kind: str = "tensor"  # or a number that arrives as a 0-dimensional array: "int", "float", "bool"


@dataclass(frozen=True, slots=True)
class WeightSpec:
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]  # axes from the outermost in memory; stored with shape [shape[a] for a in order]
    grad: bool = False  # requires_grad of the original


@dataclass(frozen=True, slots=True)
class Operator:
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: str | tuple[str | None, ...]

    @property
    def results(self) -> tuple[str, ...]:
        return (self.out,) if isinstance(self.out, str) else tuple(name for name in self.out if name is not None)


@dataclass(frozen=True)
class GraphDocument:
    inputs: tuple[Input, ...]
    weights: Mapping[str, WeightSpec]
    operators: tuple[Operator, ...]
    outputs: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same graph has the same bytes."""
        return json.dumps(_encode_document(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def references(argument: Any) -> Iterator[Ref | Weight]:
    """Every value and weight in an argument, nested lists included; a branch's body uses only what it is handed."""
    if isinstance(argument, Ref | Weight):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from references(item)
    elif isinstance(argument, Mapping):
        for item in argument.values():
            yield from references(item)


def _encode_document(document: GraphDocument) -> dict[str, Any]:
    return {
        "format": GRAPH_VERSION,
        "inputs": [{"name": i.name, "kind": i.kind} for i in document.inputs],
        "weights": {
            n: {"dtype": w.dtype, "shape": list(w.shape), "order": list(w.order), "grad": w.grad} for n, w in document.weights.items()
        },
        "operators": [
            {
                "op": o.op,
                "args": [_encode(a) for a in o.args],
                "kwargs": {k: _encode(a) for k, a in o.kwargs.items()},
                "out": o.out if isinstance(o.out, str) else list(o.out),
            }
            for o in document.operators
        ],
        "outputs": list(document.outputs),
    }


def _encode(argument: Any) -> Any:
    match argument:
        case Ref(name):
            return {"ref": name}
        case Weight(name):
            return {"weight": name}
        case Dtype(name):
            return {"dtype": name}
        case Layout(name):
            return {"layout": name}
        case MemoryFormat(name):
            return {"memory_format": name}
        case Device():
            return {"device": "engine"}
        case GraphDocument():
            return {"graph": _encode_document(argument)}
        case tuple():
            return [_encode(item) for item in argument]
        case complex():
            return {"complex": [_encode(argument.real), _encode(argument.imag)]}
        case float() if not math.isfinite(argument):
            return {"float": "nan" if math.isnan(argument) else "inf" if argument > 0 else "-inf"}
        case None | bool() | int() | float() | str():
            return argument
        case _:
            raise TypeError(f"a graph document cannot hold {type(argument).__name__}")
