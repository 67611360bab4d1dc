"""A .onnx file as a model: its operators are the vertices, its shards hold ONNX graphs only, and ONNX Runtime runs it here too.

The file is the user's own and is read with the `onnx` package; what becomes of it obeys the same rules as what a node takes from a stranger
(`splitnet.onnx_format`): operators of the standard domain, from the list, without control flow.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from partitioner.graph import ModelGraph
from partitioner.layout import StageLayout
from partitioner.structure import Structure, Vertex
from splitnet.errors import BadInput, BadModel, BadShard, MissingExtra
from splitnet.graph import GraphDocument
from splitnet.onnx_format import ELEMENT_TYPES, from_bytes, to_bytes
from splitnet.onnx_nouns import ALLOWED_OPERATORS, NEWEST_OPSET, OLDEST_OPSET, WEIGHT, Attribute, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.plan import OutputSpec
from splitnet.tensors import DTYPES, TensorSpec

__all__ = ["OnnxModel", "load_onnx"]

_CONSTANT_BYTES = 1 << 10  # what is not larger, and all whole numbers, stand in the graph: sizes, axes, scalars
_OTHER_SIZE = 32  # of a symbolic dimension that is not the batch, in the example inputs
_DTYPE_OF = {number: name for name, number in ELEMENT_TYPES.items()}
_REMEDY = "splitnet runs the standard operators of ONNX without control flow; export the model otherwise, or capture it from torch"
_SMALL_OPS = frozenset(
    {"Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Slice", "Range", "ConstantOfShape", "Equal", "Where", "Size"}
)


@dataclass(frozen=True, eq=False)
class OnnxModel(ModelGraph):
    """As `ModelGraph`, but for `document`: there is no graph document. Example inputs are made up: a batch of one, ones where whole numbers are
    expected. ONNX Runtime runs it here, with as many threads as torch is set to."""

    graph: OnnxGraph

    def document(self, stage: StageLayout) -> GraphDocument:
        raise BadModel(f"{self.name} came as a .onnx file and has no graph document", remedy="capture it from torch for what needs one")

    def stage_graph(self, stage: StageLayout) -> OnnxGraph:
        """The part of the graph that one stage runs."""
        nodes = tuple(self._node_of[name] for name in stage.executed)
        return self._part(nodes, [_as_value(spec) for spec in stage.inputs], [_as_value(spec) for spec in stage.outputs])

    def stage_runner(self, stage: StageLayout) -> Callable[[list[Any]], Sequence[Any]]:
        """As `ModelGraph.stage_runner`, by ONNX Runtime, which runs on a node too."""
        session = _open(self.stage_graph(stage), self.weights, _options())
        names = [spec.name for spec in stage.inputs]

        def run(values: list[Any]) -> Sequence[Any]:
            results = session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in zip(names, values, strict=True)})
            return [torch.from_numpy(array) for array in results]

        return run

    def run(self, inputs: Mapping[str, torch.Tensor], on_vertex: Callable[[str, float], None] | None = None) -> dict[str, torch.Tensor]:
        if missing := [spec.name for spec in self.structure.inputs if spec.name not in inputs]:
            raise BadInput(f"input {missing[0]!r} is missing; the model needs {', '.join(s.name for s in self.structure.inputs)}")
        given = {spec.name: inputs[spec.name].numpy() for spec in self.structure.inputs}
        if on_vertex is None:
            results = self._session.run(None, given)
        else:
            results = self._run_timed(given, on_vertex)
        return {output.spec.name: torch.from_numpy(array) for output, array in zip(self.structure.outputs, results, strict=True)}

    def _run_timed(self, given: Mapping[str, np.ndarray], on_vertex: Callable[[str, float], None]) -> list[np.ndarray]:
        """Without fused operators, so that each has a time of its own."""
        import onnxruntime as ort

        with tempfile.TemporaryDirectory(prefix="splitnet-onnx-") as folder:
            options = _options()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/run"
            session = _open(self.graph, self.weights, options)
            results: list[np.ndarray] = session.run(None, given)
            events = json.loads(Path(session.end_profiling()).read_text())
        for event in events:
            if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
                node = self.graph.nodes[int(event["args"]["node_index"])]
                on_vertex(_vertex_name(node), float(event["dur"]) * 1e-6)
        return results

    @cached_property
    def _session(self) -> Any:
        return _open(self.graph, self.weights, _options())

    @cached_property
    def _node_of(self) -> Mapping[str, OnnxNode]:
        return {_vertex_name(node): node for node in self.graph.nodes}

    def _part(self, nodes: tuple[OnnxNode, ...], inputs: list[OnnxValue], outputs: list[OnnxValue]) -> OnnxGraph:
        used = {name for node in nodes for name in node.inputs}
        return OnnxGraph(
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=tuple(weight for weight in self.graph.weights if weight.name in used),
            constants={name: tensor for name, tensor in self.graph.constants.items() if name in used},
            nodes=nodes,
            opset=self.graph.opset,
        )


def load_onnx(path: Path, spec: str) -> OnnxModel:
    """Raises BadModel where there is no such file, or it holds what splitnet does not run; MissingExtra."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"{spec}: {package} is not installed", remedy="pip install 'splitnet[onnx]'")
    import onnx
    import onnx.inliner

    if not path.is_file():
        raise BadModel(f"{spec}: no such file", remedy="give the path of a .onnx file")
    try:
        model = onnx.load(str(path))
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        model = onnx.shape_inference.infer_shapes(model)
    except (ValueError, TypeError, OSError, RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadModel(f"{spec}: not an ONNX model: {str(error)[:300]}", remedy="check it with onnx.checker.check_model") from None
    except Exception as error:  # protobuf's DecodeError has no public home that all its versions share
        if type(error).__name__ != "DecodeError":
            raise
        raise BadModel(f"{spec}: not an ONNX model: {str(error)[:300]}", remedy="check it with onnx.checker.check_model") from None
    return _Reader(model, spec).model(path.stem)


class _Reader:
    def __init__(self, proto: Any, spec: str) -> None:
        self._graph = proto.graph
        self._spec = spec
        used = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
        if used:
            self._refuse(f"operators of the domain {min(used)!r}")
        self._opset = next((opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx")), 0)
        if not OLDEST_OPSET <= self._opset <= NEWEST_OPSET:
            self._refuse(f"operator set {self._opset}; {OLDEST_OPSET} to {NEWEST_OPSET} are read")
        self._constants: dict[str, OnnxTensor] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._symbols: dict[str, str] = {}

    def _refuse(self, what: str) -> NoReturn:
        raise BadModel(f"{self._spec}: {what}", remedy=_REMEDY)

    def model(self, name: str) -> OnnxModel:
        import onnx

        for initializer in self._graph.initializer:
            self._store(initializer.name, onnx.numpy_helper.to_array(initializer))
        nodes = [node for node in self._graph.node if not self._constant_node(node)]
        inputs = [
            self._value(value) for value in self._graph.input if value.name not in self._constants and value.name not in self._weights
        ]
        outputs = [self._value(value) for value in self._graph.output]
        typed = {value.name: self._value(value) for value in (*self._graph.value_info, *self._graph.output)}
        read = tuple(self._node(node) for node in nodes)
        graph = OnnxGraph(
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=tuple(OnnxValue(WEIGHT + n, str(w.dtype), w.shape) for n, w in self._weights.items()),
            constants=self._constants,
            nodes=read,
            opset=self._opset,
        )
        try:
            from_bytes(to_bytes(graph), place=self._spec)
        except BadShard as error:
            self._refuse(error.message.removeprefix(f"{self._spec}: "))
        weights = {n: torch.from_numpy(np.array(w)) for n, w in self._weights.items()}
        symbols = {size: 1 if size == "batch" else _OTHER_SIZE for value in inputs for size in value.shape if isinstance(size, str)}
        example = {value.name: _made_up(value, symbols) for value in inputs}
        structure = self._structure(name, graph, typed, weights, example, symbols)
        return OnnxModel(
            structure=structure,
            operators={},
            kinds={spec.name: "tensor" for vertex in structure.vertices for spec in vertex.values},
            sizes={},
            weights={n: w for n, w in weights.items() if n in structure.param_sizes},
            example_inputs={n: torch.from_numpy(array) for n, array in example.items()},
            graph=graph,
        )

    def _structure(
        self,
        name: str,
        graph: OnnxGraph,
        typed: Mapping[str, OnnxValue],
        weights: Mapping[str, torch.Tensor],
        example: Mapping[str, np.ndarray],
        symbols: Mapping[str, int],
    ) -> Structure:
        made = [output for node in graph.nodes for output in node.outputs if output]
        if unknown := [value for value in made if value not in typed]:
            self._refuse(f"the element type of the value {unknown[0]!r} cannot be inferred")
        everything = OnnxGraph(graph.inputs, tuple(typed[v] for v in made), graph.weights, graph.constants, graph.nodes, graph.opset)
        arrays = dict(zip(made, _open(everything, weights, _options()).run(None, dict(example)), strict=True))
        bytes_of = {n: a.nbytes for n, a in (*example.items(), *arrays.items())}
        vertices = [
            Vertex(v.name, "input", (_as_spec(v),), value_bytes=(bytes_of[v.name],), activation_bytes=bytes_of[v.name])
            for v in graph.inputs
        ]
        cheap: set[str] = set()
        for node in graph.nodes:
            used = tuple(dict.fromkeys(i for i in node.inputs if i in bytes_of))
            params = tuple(dict.fromkeys(i.removeprefix(WEIGHT) for i in node.inputs if i.startswith(WEIGHT)))
            results = [output for output in node.outputs if output]
            sizes = tuple(bytes_of[output] for output in results)
            is_cheap = not params and (
                not used or (node.op in _SMALL_OPS and sum(sizes) <= _CONSTANT_BYTES and all(v in cheap or v in example for v in used))
            )
            cheap.update(results if is_cheap else ())
            vertices.append(
                Vertex(
                    name=results[0],
                    op=f"onnx.{node.op}",
                    values=tuple(_as_spec(typed[output]) for output in results),
                    inputs=used,
                    params=params,
                    param_bytes=sum(weights[p].nbytes for p in params),
                    value_bytes=sizes,
                    activation_bytes=sum(sizes) + sum(bytes_of[v] for v in used),
                    cheap=is_cheap,
                )
            )
        used_names = {p for vertex in vertices for p in vertex.params}
        return Structure(
            name=name,
            sha256=_digest(graph, weights),
            batch=symbols.get("batch", 1),
            vertices=tuple(vertices),
            inputs=tuple(_as_spec(value) for value in graph.inputs),
            outputs=tuple(OutputSpec(value.name, _as_spec(value)) for value in graph.outputs),
            param_sizes={n: w.nbytes for n, w in weights.items() if n in used_names},
            symbols=dict(symbols),
            notes=() if "batch" in symbols else ("the batch size is fixed in the file",),
        )

    def _store(self, name: str, array: np.ndarray) -> None:
        if array.dtype not in DTYPES.values() or str(array.dtype) not in ELEMENT_TYPES:
            self._refuse(f"{name!r} has the element type {array.dtype}")
        if array.nbytes <= _CONSTANT_BYTES or not np.issubdtype(array.dtype, np.floating):
            self._constants[name] = OnnxTensor(str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())
        else:
            self._weights[name] = np.ascontiguousarray(array)

    def _constant_node(self, node: Any) -> bool:
        import onnx

        if node.op_type != "Constant" or not node.output:
            return False
        (attribute,) = node.attribute
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            array = onnx.numpy_helper.to_array(value)
        elif attribute.name.startswith("value_float"):
            array = np.array(value, np.float32)
        elif attribute.name.startswith("value_int"):
            array = np.array(value, np.int64)
        else:
            self._refuse(f"a constant given as {attribute.name!r}")
        self._store(node.output[0], array)
        return True

    def _node(self, node: Any) -> OnnxNode:
        import onnx

        if node.op_type not in ALLOWED_OPERATORS:
            self._refuse(f"operator {node.op_type} (-> {', '.join(node.output)}) is not supported")
        attributes: dict[str, Attribute] = {}
        for attribute in sorted(node.attribute, key=lambda a: str(a.name)):
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, onnx.TensorProto):
                array = onnx.numpy_helper.to_array(value)
                value = OnnxTensor(str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())
            elif isinstance(value, bytes):
                value = value.decode()
            elif isinstance(value, list) and all(isinstance(item, int | float) for item in value):
                value = tuple(value)
            elif not isinstance(value, int | float):
                self._refuse(
                    f"operator {node.op_type} (-> {', '.join(node.output)}) has the attribute {attribute.name!r} of a kind that is not supported"
                )
            attributes[attribute.name] = value
        names = tuple(WEIGHT + name if name in self._weights else name for name in node.input)
        return OnnxNode(node.op_type, names, tuple(node.output), attributes)

    def _value(self, value: Any) -> OnnxValue:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _DTYPE_OF:
            self._refuse(f"value {value.name!r} has an element type that is not supported")
        shape: list[int | str] = []
        for axis, dimension in enumerate(tensor.shape.dim):
            if dimension.HasField("dim_value"):
                shape.append(int(dimension.dim_value))
            else:
                shape.append(self._symbol(dimension.dim_param or f"{value.name}_{axis}", axis))
        return OnnxValue(value.name, _DTYPE_OF[tensor.elem_type], tuple(shape))

    def _symbol(self, text: str, axis: int) -> str:
        """The first symbol that stands at an input's dimension 0 is the batch; the others keep their names, as far as a plan can hold them."""
        if text not in self._symbols:
            plain = re.sub(r"\W", "_", text) or "size"
            plain = plain if plain[0].isalpha() else f"size_{plain}"
            first = axis == 0 and "batch" not in self._symbols.values()
            self._symbols[text] = "batch" if first else f"{plain}_" if plain == "batch" else plain
        return self._symbols[text]


def _vertex_name(node: OnnxNode) -> str:
    return next(name for name in node.outputs if name)


def _as_spec(value: OnnxValue) -> TensorSpec:
    return TensorSpec(value.name, value.dtype, value.shape)


def _as_value(spec: TensorSpec) -> OnnxValue:
    return OnnxValue(spec.name, spec.dtype, spec.shape)


def _made_up(value: OnnxValue, symbols: Mapping[str, int]) -> np.ndarray:
    shape = tuple(size if isinstance(size, int) else symbols[size] for size in value.shape)
    kind = DTYPES[value.dtype]
    if not np.issubdtype(kind, np.floating):
        return np.ones(shape, kind)
    return np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(kind)


def _options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _open(graph: OnnxGraph, weights: Mapping[str, torch.Tensor], options: Any) -> Any:
    import onnxruntime as ort

    places, parts, position = {}, [], 0
    for weight in graph.weights:
        data = weights[weight.name.removeprefix(WEIGHT)].numpy().view(np.uint8).reshape(-1)
        places[weight.name] = ("weights", position, data.nbytes)
        parts.append(data)
        position += data.nbytes
    whole = np.concatenate(parts) if parts else None  # must live until the session is made
    if whole is not None:
        options.add_external_initializers_from_files_in_memory(["weights"], [whole], [position])
    return ort.InferenceSession(to_bytes(graph, places), options, providers=["CPUExecutionProvider"])


def _digest(graph: OnnxGraph, weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(to_bytes(graph))
    for weight in graph.weights:
        digest.update(memoryview(weights[weight.name.removeprefix(WEIGHT)].numpy().view(np.uint8).reshape(-1)))
    return digest.hexdigest()
