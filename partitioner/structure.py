"""The shape of a model without its arithmetic: vertices, values, sizes. Pure and JSON-able; planning needs nothing else.

A vertex is one operator. It produces values (almost always one) and uses values of other vertices and parameters by name.
A model input is a vertex of op "input", a symbolic size one of op "size". A value is a tensor, or a size: an integer that is known once the inputs are there, for
which `Structure.sizes` holds an expression over the symbols of the input shapes ("batch", "2*batch + 1").
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from splitnet.errors import BadInput, BadModel
from splitnet.plan import OutputSpec
from splitnet.tensors import TensorSpec

if TYPE_CHECKING:
    import networkx

__all__ = ["STRUCTURE_VERSION", "Structure", "Vertex"]

STRUCTURE_VERSION = 1


@dataclass(frozen=True)
class Vertex:
    """One operator. Bytes are at the example batch, as the wire would carry them (an expanded dimension counts once)."""

    name: str
    op: str  # "aten.linear.default", ...; "input" for a model input
    values: tuple[TensorSpec, ...]  # what it produces; names are unique in the model, a single value is called like its vertex
    inputs: tuple[str, ...] = ()  # the values that it uses, each once
    params: tuple[str, ...] = ()  # the parameters, buffers and constants that it uses, each once
    param_bytes: int = 0
    value_bytes: tuple[int, ...] = ()  # one figure per value
    activation_bytes: int = 0  # inputs and outputs together
    flops: float = 0.0  # an estimate, at the example batch
    cheap: bool = False  # may be computed again in another stage instead of being sent there
    scope: str = ""  # the module that it came from, for people: "encoder.layer.0.attention"

    @property
    def output_bytes(self) -> int:
        return sum(self.value_bytes)


@dataclass(frozen=True)
class Structure:
    """Raises BadModel unless names are unique and every value that is used was produced by an earlier vertex."""

    name: str
    sha256: str  # of the graph and its weights
    batch: int  # the example batch, for which all figures hold; 1 where no input has a batch dimension
    vertices: tuple[Vertex, ...]  # in a topological order; all inputs are among them
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    param_sizes: Mapping[str, int] = field(default_factory=dict)  # bytes of each parameter, buffer and constant
    sizes: Mapping[str, str] = field(default_factory=dict)  # size value -> expression over symbols; "" where it depends on data
    symbols: Mapping[str, int] = field(default_factory=dict)  # symbol -> its size in the example inputs
    notes: tuple[str, ...] = ()  # what the user should know: a dimension that became static, say

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for vertex in self.vertices:
            if len(vertex.values) != len(vertex.value_bytes):
                raise BadModel(f"vertex {vertex.name!r}: {len(vertex.values)} values but {len(vertex.value_bytes)} sizes")
            for value in vertex.inputs:
                if value not in seen:
                    raise BadModel(f"vertex {vertex.name!r} uses {value!r}, which no vertex before it produces")
            for name in vertex.params:
                if name not in self.param_sizes:
                    raise BadModel(f"vertex {vertex.name!r} uses the parameter {name!r}, which has no size")
            for spec in vertex.values:
                if spec.name in seen:
                    raise BadModel(f"value {spec.name!r} is produced twice")
                seen.add(spec.name)
        if len({vertex.name for vertex in self.vertices}) != len(self.vertices):
            raise BadModel("two vertices have the same name")
        if self.inputs != tuple(spec for vertex in self.vertices if vertex.op == "input" for spec in vertex.values):
            raise BadModel("the model inputs are not its input vertices, in order")
        for output in self.outputs:
            if output.value not in seen:
                raise BadModel(f"output {output.spec.name!r} is the value {output.value!r}, which no vertex produces")

    @functools.cached_property
    def vertex(self) -> Mapping[str, Vertex]:
        """Vertices by name."""
        return {vertex.name: vertex for vertex in self.vertices}

    @functools.cached_property
    def producer(self) -> Mapping[str, Vertex]:
        """The vertex that produces each value."""
        return {spec.name: vertex for vertex in self.vertices for spec in vertex.values}

    @functools.cached_property
    def value(self) -> Mapping[str, TensorSpec]:
        """The spec of each value."""
        return {spec.name: spec for vertex in self.vertices for spec in vertex.values}

    @functools.cached_property
    def value_bytes(self) -> Mapping[str, int]:
        """Bytes of each value at the example batch."""
        return {spec.name: size for vertex in self.vertices for spec, size in zip(vertex.values, vertex.value_bytes, strict=True)}

    @property
    def param_bytes(self) -> int:
        return sum(self.param_sizes.values())

    def graph(self) -> networkx.DiGraph:
        """The same as a networkx.DiGraph: vertices carry param_bytes, activation_bytes, output_bytes, flops, op, cheap and scope;
        an edge carries the bytes of what its end uses from its start."""
        import networkx  # not needed where only the document is read

        graph = networkx.DiGraph(name=self.name)
        for v in self.vertices:
            graph.add_node(
                v.name, op=v.op, scope=v.scope, cheap=v.cheap, flops=v.flops,
                param_bytes=v.param_bytes, activation_bytes=v.activation_bytes, output_bytes=v.output_bytes,
            )  # fmt: skip
            for value in v.inputs:
                source = self.producer[value].name
                carried = graph.edges[source, v.name]["bytes"] if graph.has_edge(source, v.name) else 0
                # a size is read from a shape: its source need not be sent for it
                graph.add_edge(source, v.name, bytes=carried + (8 if v.op == "size" else self.value_bytes[value]))
        return graph

    def to_json(self) -> str:
        return json.dumps({"version": STRUCTURE_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Structure:
        """Raises BadModel where the document is not a structure of this version."""
        try:
            document: dict[str, Any] = json.loads(text)
            if document.get("version") != STRUCTURE_VERSION:
                raise BadModel(
                    f"the structure has version {document.get('version')!r}, this splitnet reads version {STRUCTURE_VERSION}",
                    remedy="profile the model again with `splitnet profile`",
                )
            del document["version"]
            document["vertices"] = tuple(_vertex(v) for v in document["vertices"])
            document["inputs"] = tuple(TensorSpec.from_json(s) for s in document["inputs"])
            document["outputs"] = tuple(OutputSpec(o["value"], TensorSpec.from_json(o["spec"])) for o in document["outputs"])
            document["notes"] = tuple(document["notes"])
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadInput) as error:
            raise BadModel(f"not a model structure: {type(error).__name__}: {error}") from None


def _vertex(document: dict[str, Any]) -> Vertex:
    lists = {key: tuple(document[key]) for key in ("inputs", "params", "value_bytes")}
    return Vertex(**{**document, **lists, "values": tuple(TensorSpec.from_json(s) for s in document["values"])})
