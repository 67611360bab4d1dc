"""From a module to torch's functional graph with a symbolic batch, or an error that names the operator or the line."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from partitioner.quiet import quiet_torch
from partitioner.trees import InputTree, flatten_output
from splitnet.errors import CaptureError

__all__ = ["DynamicShapes", "Exported", "export"]

#: input name -> axis -> the symbol's name; the same name means the same size
DynamicShapes = Mapping[str, Mapping[int, str]]

BATCH = "batch"


@dataclass(frozen=True)
class Exported:
    program: ExportedProgram
    symbols: dict[Any, str]  # sympy symbol -> name
    notes: tuple[str, ...]


class _Flat(torch.nn.Module):
    """The module with flat tensors in and out, so that torch.export has no trees to know about."""

    def __init__(self, module: torch.nn.Module, inputs: InputTree) -> None:
        super().__init__()
        self.module = module
        self._fill = inputs.fill
        self.training = module.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self._fill(tensors)
        return tuple(as_tensor(value) for _, value in flatten_output(self.module(*args, **kwargs)))


def as_tensor(value: Any) -> torch.Tensor:
    """A number among the outputs, as a 0-dimensional tensor."""
    if isinstance(value, torch.Tensor):
        return value
    for kinds, dtype in (
        ((bool, torch.SymBool), torch.bool),
        ((int, torch.SymInt), torch.int64),
        ((float, torch.SymFloat), torch.float64),
    ):
        if isinstance(value, kinds):
            return torch.full((), value, dtype=dtype)  # type: ignore[arg-type]
    raise AssertionError(value)


def export(module: torch.nn.Module, inputs: InputTree, dynamic: DynamicShapes) -> Exported:
    """Exports with dimension 0 of the inputs symbolic: as one symbol, else as torch finds them, else (with a warning) fixed. The
    dimensions in `dynamic` are symbolic in each attempt. Raises CaptureError."""
    batched = _batched(inputs)
    tensors = [_tile(t) if name in batched else t for name, t in zip(inputs.names, inputs.tensors, strict=True)]
    notes: list[str] = []
    first: Exception | None = None
    for attempt in ("shared", "found", "fixed") if batched else ("fixed",):
        example = inputs.tensors if attempt == "fixed" else tensors
        shapes = tuple(
            _shape_of(name, t, attempt if name in batched else "fixed", dynamic) for name, t in zip(inputs.names, example, strict=True)
        )
        try:
            program = _export(_Flat(module, inputs), tuple(example), shapes)
        except CaptureError:
            raise
        except Exception as error:  # noqa: BLE001 - torch.export raises many kinds; the first attempt's is the one that is told
            first = first or error
            continue
        symbols = _name_symbols(program, inputs.names, dynamic)
        if batched and not any(name == BATCH for name in symbols.values()):
            reason = _reason(first) if first is not None else "torch.export made it so"
            notes.append(f"the batch size is fixed at {example[inputs.names.index(batched[0])].shape[0]}: {reason}")
        return Exported(program, symbols, tuple(notes))
    assert first is not None
    raise CaptureError(
        f"{type(module).__name__} cannot be exported: {_reason(first)}",
        remedy="see https://docs.pytorch.org/docs/stable/export.html for what a module may do; change the line named above",
    ) from first


def _batched(inputs: InputTree) -> list[str]:
    """The inputs whose dimension 0 counts the items of a batch: those that agree with the first one that has dimensions."""
    first = next((t.shape[0] for t in inputs.tensors if t.ndim), 0)
    return [name for name, t in zip(inputs.names, inputs.tensors, strict=True) if t.ndim and t.shape[0] == first > 0]


def _tile(tensor: torch.Tensor) -> torch.Tensor:
    """A batch of one would become a constant."""
    return torch.cat([tensor, tensor]) if tensor.shape[0] == 1 else tensor


def _shape_of(name: str, tensor: torch.Tensor, attempt: str, dynamic: DynamicShapes) -> dict[int, Any]:
    shape: dict[int, Any] = {}
    if attempt == "shared":
        shape[0] = Dim(BATCH)
    elif attempt == "found":
        shape[0] = Dim.AUTO
    for axis in dynamic.get(name, {}):
        if axis < tensor.ndim and axis not in shape:
            shape[axis] = Dim.AUTO
    return shape


def _export(module: torch.nn.Module, args: tuple[torch.Tensor, ...], shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), quiet_torch():
        warnings.simplefilter("ignore")  # torch's own, about its internals
        try:
            program = torch.export.export(module, args, dynamic_shapes=(shapes,), strict=False)
        except CaptureError:
            raise
        except Exception as loose:  # noqa: BLE001 - raised again below
            try:
                program = torch.export.export(module, args, dynamic_shapes=(shapes,), strict=True)
            except Exception:  # noqa: BLE001 - the first one says more
                raise loose from None
        functional: ExportedProgram = program.run_decompositions({})
        return functional


def _name_symbols(program: ExportedProgram, names: list[str], dynamic: DynamicShapes) -> dict[Any, str]:
    """ "batch" for the first dimension 0 that is a symbol, the name that `dynamic` gives, else the input's name and the axis."""
    symbols: dict[Any, str] = {}
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    values = [placeholders[name].meta["val"] for name in program.graph_signature.user_inputs if name in placeholders]
    rest = []
    for name, value in zip(names, values, strict=True):
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                wanted = dynamic.get(name, {}).get(axis) or (BATCH if axis == 0 else "")
                plain = re.sub(r"\W", "_", f"{name}_{axis}")
                if expression.is_Symbol and expression not in symbols:
                    symbols[expression] = wanted if wanted and wanted not in symbols.values() else plain
                rest += [(symbol, plain) for symbol in expression.free_symbols]
    for symbol, plain in rest:
        symbols.setdefault(symbol, f"{plain}_size")
    return symbols


def _reason(error: BaseException) -> str:
    """One paragraph: what torch says, the operator if it names one, and the user's line."""
    text = str(error).strip()
    head = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    operator = re.search(r"aten\.\w+(?:\.\w+)?|torch\.ops\.[\w.]+", text)
    told = f"{type(error).__name__}: {head[:400]}"
    if operator and operator.group() not in told:
        told += f"; operator {operator.group()}"
    place = _user_line(error, text)
    return f"{told}; at {place}" if place else told


def _user_line(error: BaseException, text: str) -> str:
    """The innermost line that is neither torch's nor ours."""
    frames = [(f.filename, f.lineno, f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    frames += [(m[0], int(m[1]), m[2], "") for m in re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)]
    own = [f for f in frames if not re.search(r"[/\\]torch[/\\]|[/\\]partitioner[/\\]|<eval|<string>|^<frozen|contextlib\.py", f[0])]
    if not own:
        return ""
    filename, line, function, source = own[-1]
    return f"{filename}:{line}, in {function}" + (f": {source.strip()}" if source else "")
