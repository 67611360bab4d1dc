"""Nested inputs and outputs as flat, named tensors: {"a": [x, {"b": y}]} is "a.0" and "a.1.b"."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from splitnet.errors import BadInput, CaptureError

__all__ = ["InputTree", "flatten_output"]

_ODD = re.compile(r"[^A-Za-z0-9_.\-]")
_Leaf = tuple[str, Any]


class InputTree:
    """The arguments of a module's forward with its tensors taken out: `names` and `tensors` are flat, and `fill(tensors)` gives
    (args, kwargs) again. Whatever is not a tensor (None, numbers, text) stays as it is."""

    def __init__(self, module: torch.nn.Module, example_inputs: Any) -> None:
        """Raises BadInput where there is no tensor, or something that is neither tensor nor plain data."""
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        if isinstance(example_inputs, Mapping):
            named = list(example_inputs.items())
            self._positional = 0
        else:
            given = list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]
            parameters = _parameter_names(module, len(given))
            named = list(zip(parameters, given, strict=True))
            self._positional = len(given)
        self._shape = [(str(key), self._take(str(key), value)) for key, value in named]
        if not self.tensors:
            raise BadInput("the example inputs hold no tensor", remedy="give a tensor, or a tuple or dict that holds at least one")

    def fill(self, tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = [(key, build(tensors)) for key, build in self._shape]
        return tuple(value for _, value in filled[: self._positional]), dict(filled[self._positional :])

    def _take(self, path: str, value: Any) -> Callable[[Any], Any]:
        if isinstance(value, torch.Tensor):
            at = len(self.tensors)
            self.names.append(_unique(_plain(path), self.names))
            self.tensors.append(value.detach())
            return lambda tensors: tensors[at]
        if isinstance(value, Mapping):
            entries = {key: self._take(f"{path}.{key}", item) for key, item in value.items()}
            return lambda tensors: {key: build(tensors) for key, build in entries.items()}
        if isinstance(value, list | tuple):
            items = [self._take(f"{path}.{i}", item) for i, item in enumerate(value)]
            if hasattr(value, "_fields"):  # a named tuple
                return lambda tensors: type(value)(*(build(tensors) for build in items))
            return lambda tensors: type(value)(build(tensors) for build in items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: self._take(f"{path}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return lambda tensors: type(value)(**{name: build(tensors) for name, build in fields.items()})
        if value is None or isinstance(value, bool | int | float | str):
            return lambda _tensors: value
        raise BadInput(
            f"example input {path!r} is a {type(value).__name__}",
            remedy="inputs are tensors, plain numbers and text, and tuples, lists, dicts and dataclasses of these",
        )


def flatten_output(output: Any) -> list[_Leaf]:
    """(name, tensor or number) of each leaf, in order. A lone tensor is "output"; members that are None are left out. Raises
    CaptureError for what cannot be sent."""
    if isinstance(output, torch.Tensor | bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return [("output", output)]
    if isinstance(output, list | tuple) and not hasattr(output, "_fields"):
        return _walk("output", output)
    leaves = _walk("", output)
    seen: list[str] = []
    for name, _ in leaves:
        seen.append(_unique(name, seen))
    return [(name, value) for name, (_, value) in zip(seen, leaves, strict=True)]


def _walk(path: str, value: Any) -> list[_Leaf]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor | bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return [(_plain(path), value)]
    if isinstance(value, Mapping):
        members = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        members = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        members = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        raise CaptureError(
            f"output {path or 'output'!r} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be sent",
            remedy="return tensors and numbers in tuples, lists, dicts or dataclasses (a transformers model: set config.use_cache = False)",
        )
    return [leaf for key, item in members for leaf in _walk(f"{path}.{key}" if path else str(key), item)]


def _plain(path: str) -> str:
    return _ODD.sub("_", path)[:200] or "_"


def _unique(name: str, taken: list[str]) -> str:
    candidate, n = name, 1
    while candidate in taken:
        candidate, n = f"{name}_{n}", n + 1
    return candidate


def _parameter_names(module: torch.nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise BadInput(f"{type(module).__name__}.forward takes {len(names)} positional inputs, the example has {count}")
    return names[:count]
