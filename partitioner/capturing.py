"""capture: any module that torch.export takes becomes a ModelGraph, and is held against the module itself."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from partitioner.aligning import aligned, is_aligned
from partitioner.describing import describe
from partitioner.exporting import DynamicShapes, Exported, as_tensor, export
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from partitioner.lowering import Lowered, Lowering
from partitioner.sizes import find_sources
from partitioner.structure import Structure
from partitioner.trees import InputTree, flatten_output
from splitnet.errors import CaptureError
from splitnet.graph import Operator, Ref, Weight, references
from splitnet.interpreter import Program
from splitnet.tensors import TensorSpec

__all__ = ["capture"]


def capture(module: torch.nn.Module, example_inputs: Any, *, name: str = "", dynamic_shapes: DynamicShapes | None = None) -> ModelGraph:
    """The module as a graph of operators, with a symbolic batch (dimension 0 of the inputs).

    `example_inputs`: a tensor, a tuple of positional inputs, or a dict of keyword inputs; they may nest. `dynamic_shapes` makes more
    dimensions symbolic, by flat input name: {"input_ids": {1: "sequence"}}. The module is captured as it is in eval mode and is
    left as it was; its weights are shared, not copied, but for those that do not start on a 64-byte boundary (see `partitioner.aligning`).

    The graph is run once beside the module on the example inputs. Raises CaptureError, naming the operator or the line, for a
    module that cannot be exported or that computes something else than its graph; BadInput for example inputs of a wrong kind. Warns
    where a dimension could not be symbolic, or where results agree only within rounding; `structure.notes` says the same.
    """
    inputs = InputTree(module, example_inputs)
    training = [m for m in module.modules() if m.training]
    with contextlib.suppress(NotImplementedError):  # what torch.export made has no modes
        module.eval()
    try:
        outputs = _run_eagerly(module, inputs)
        return _capture(module, inputs, outputs, name or type(module).__name__, dynamic_shapes or {})
    finally:
        for m in training:
            m.training = True


def _run_eagerly(module: torch.nn.Module, inputs: InputTree) -> list[tuple[str, torch.Tensor]]:
    args, kwargs = inputs.fill(inputs.tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module's own business
        # torch's fused attention layer runs only without gradients, rounds otherwise than the module's own forward, and is no
        # operator of the exported graph: the module is held to what it computes with gradients on.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            result = module(*args, **kwargs)
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise CaptureError(
                f"{type(module).__name__} fails on its own example inputs: {type(error).__name__}: {text[:300]}",
                remedy="give the inputs with which the module runs",
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    leaves = [(path, as_tensor(value)) for path, value in flatten_output(result)]
    if not leaves:
        raise CaptureError(f"{type(module).__name__} returns no tensor", remedy="return at least one tensor")
    return leaves


def _capture(
    module: torch.nn.Module, inputs: InputTree, outputs: list[tuple[str, torch.Tensor]], name: str, dynamic: DynamicShapes
) -> ModelGraph:
    exported = export(module, inputs, dynamic)
    notes = list(exported.notes)
    lowered, weights, results = _lower(exported, inputs, notes)
    if len(results) != len(outputs):
        raise CaptureError(f"the exported graph has {len(results)} outputs, the module {len(outputs)}")
    _drop_unused(lowered, [r.name for r in results])
    example = dict(zip(inputs.names, inputs.tensors, strict=True))
    symbols = _example_symbols(lowered, example)
    unmeasured = describe(name, lowered, weights, example, results, [path for path, _ in outputs], symbols, {})
    draft = _model(unmeasured, lowered, weights, example)
    values, answers = _measure(draft, name)
    misaligned = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if not is_aligned(t)]
    _compare(name, outputs, answers, notes, misaligned)
    for note in notes:
        warnings.warn(f"{name}: {note}", stacklevel=4)
    structure = describe(name, lowered, weights, example, results, [path for path, _ in outputs], symbols, values, tuple(notes))
    return _model(structure, lowered, weights, example)


def _lower(exported: Exported, inputs: InputTree, notes: list[str]) -> tuple[Lowered, dict[str, torch.Tensor], list[Ref]]:
    program = exported.program
    signature = program.graph_signature
    lowering = Lowering(exported.symbols, set(inputs.names))
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    environment: dict[Any, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    twins: dict[Any, str] = {}
    user_inputs = iter(inputs.names)
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            given = next(user_inputs)
            lowering.result.values[given] = _input_value(lowering, given, node.meta["val"])
            environment[node] = Ref(given)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = str(spec.target)
            tensor = program.state_dict[target] if target in program.state_dict else program.constants[target]
            identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else target
            plain = twins.setdefault(identity, target.removeprefix("module."))
            if plain not in weights:
                weights[plain] = aligned(tensor)
            environment[node] = Weight(plain)
        else:
            raise CaptureError(f"the module holds {spec.target!r} of kind {spec.kind.name}, which a shard cannot hold")
    returned = lowering.lower(program.graph_module, environment)
    results: list[Ref] = []
    kept: list[tuple[str, str]] = []
    metas = [getattr(a, "meta", {}).get("val") for a in program.graph.output_node().args[0]]
    for spec, value, meta in zip(signature.output_specs, returned, metas, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(_as_value(lowering, value, meta, inputs.names))
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            kept.append((str(spec.target).removeprefix("module."), getattr(value, "name", "")))
        elif spec.kind is not OutputKind.USER_INPUT_MUTATION:  # the client's own array stays as it was
            raise CaptureError(f"the module has an output of kind {spec.kind.name}, which a shard cannot have")
    _check_state(lowering.result, kept, results, notes)
    return lowering.result, weights, results


def _input_value(lowering: Lowering, name: str, meta: torch.Tensor) -> Any:
    lowering._define(name, meta, name)
    return lowering.result.values[name]


def _as_value(lowering: Lowering, value: Any, meta: Any, inputs: list[str]) -> Ref:
    """A result as a value that an operator produces, also where it is an input, a weight or a number."""
    if isinstance(value, Ref) and value.name not in inputs and lowering.result.values[value.name].kind == "tensor":
        return value
    if isinstance(value, Ref) and lowering.result.values[value.name].kind == "tensor":
        return lowering.alias(value, meta)
    if isinstance(value, Weight):
        return lowering.alias(value, meta)
    raise CaptureError(f"an output is {value!r:.80}, which is no tensor")


def _check_state(lowered: Lowered, kept: list[tuple[str, str]], results: list[Ref], notes: list[str]) -> None:
    """A buffer that forward changes is refused where the answer depends on it: the next request would have to see the change."""
    producer = {name: op for op in lowered.operators for name in op.results}
    needed, pending = set(), [r.name for r in results]
    weights: set[str] = set()
    while pending:
        op = producer.get(pending.pop())
        if op is not None and op.results[0] not in needed:
            needed.add(op.results[0])
            used = list(references((op.args, op.kwargs)))
            pending += [r.name for r in used if isinstance(r, Ref)]
            weights |= {r.name for r in used if isinstance(r, Weight)}
    for buffer, _ in kept:
        if buffer in weights:
            raise CaptureError(
                f"forward changes the buffer {buffer!r} and its answer depends on it, so that requests would depend on each other",
                remedy="keep state out of forward: pass it in and return it, or call module.eval()",
            )
        notes.append(f"forward changes the buffer {buffer!r}; the answer does not depend on it, so the change is left out")


def _drop_unused(lowered: Lowered, results: list[str]) -> None:
    needed = set(results)
    kept = []
    for op in reversed(lowered.operators):
        if needed.intersection(op.results):
            kept.append(op)
            needed |= {r.name for r in references((op.args, op.kwargs)) if isinstance(r, Ref)}
    lowered.operators[:] = reversed(kept)
    for size in set(lowered.sizes) - needed:
        del lowered.sizes[size]


def _example_symbols(lowered: Lowered, example: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The value of each symbol in the example inputs."""
    specs = [TensorSpec(v.name, v.dtype, v.shape) for name in example for v in [lowered.values[name]]]
    return {
        text: (example[source.value].shape[source.axis] - source.offset) // source.scale
        for text, source in find_sources(specs).items()
        if text.isidentifier()
    }


def _model(structure: Structure, lowered: Lowered, weights: Mapping[str, torch.Tensor], example: Mapping[str, torch.Tensor]) -> ModelGraph:
    return ModelGraph(
        structure=structure,
        operators={lowered.names[op.results[0]]: op for op in lowered.operators},
        kinds={v.name: v.kind for v in lowered.values.values()},
        sizes=dict(lowered.sizes),
        weights={n: w for n, w in weights.items() if n in structure.param_sizes},
        example_inputs=example,
    )


def _measure(model: ModelGraph, name: str) -> tuple[dict[str, tuple[tuple[int, ...], int]], list[torch.Tensor]]:
    """Runs the graph on the example inputs: shape and bytes of each value, and the outputs in order."""
    structure = model.structure
    stage = lay_out(structure, {v.name: 0 for v in structure.vertices if v.op != "input"}).stages[0]
    measured: dict[str, tuple[tuple[int, ...], int]] = {}

    def observe(op: Operator, _seconds: float, result: Any) -> None:
        items = (result,) if isinstance(op.out, str) else result
        names = (op.out,) if isinstance(op.out, str) else op.out
        for value, item in zip(names, items, strict=False):
            if value is not None:
                measured[value] = (tuple(item.shape), _stored_bytes(item)) if isinstance(item, torch.Tensor) else ((), 8)

    with torch.no_grad():
        program = Program(model.document(stage), torch, model.weights)
        results = program.run([model.example_inputs[spec.name] for spec in stage.inputs], observe)
    by_value = dict(zip((spec.name for spec in stage.outputs), results, strict=True))
    return measured, [by_value[o.value] for o in structure.outputs]


def _stored_bytes(tensor: torch.Tensor) -> int:
    """What the wire sends: a broadcast dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _compare(
    name: str, outputs: list[tuple[str, torch.Tensor]], answers: list[torch.Tensor], notes: list[str], misaligned: list[str]
) -> None:
    """The graph against the module: equal bits are expected; rounding is noted; anything else is refused. `misaligned`: the module's
    weights that lie otherwise than the graph's."""
    why = "another kernel rounds otherwise"
    if misaligned:
        why += f": the module's {misaligned[0]!r} does not start on a 64-byte boundary, as it does on a node"
    for (path, expected), actual in zip(outputs, answers, strict=True):
        if expected.dtype != actual.dtype or expected.shape != actual.shape:
            raise CaptureError(
                f"output {path!r} of {name} is {expected.dtype} {tuple(expected.shape)}, its graph gives {actual.dtype} {tuple(actual.shape)}",
                remedy="does the module depend on what it was called with before?",
            )
        if same_bits(expected, actual):
            continue
        difference = (expected - actual).abs().nan_to_num().max().item() if expected.dtype != torch.bool and expected.numel() else 1.0
        if not torch.allclose(expected, actual, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise CaptureError(
                f"output {path!r} of {name} differs from its graph's by up to {difference:g}",
                remedy="the module computes something else each time, or keeps state: make forward a function of its inputs and weights",
            )
        notes.append(f"output {path!r} of the graph differs from the module's by up to {difference:g} ({why})")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; all NaNs are alike."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
