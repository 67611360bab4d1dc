"""A model in stages, run in this process as the nodes would run it: what crosses goes through its codec, chunk by chunk, as on the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch

from partitioner.graph import ModelGraph
from partitioner.layout import Layout, StageLayout
from splitnet.codecs import Buffer
from splitnet.wire import TensorAssembler, tensor_chunks

__all__ = ["SplitModel", "Travelled", "to_array", "travel"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMBERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Travelled:
    """A tensor behind a codec, and how many bytes its chunks took."""

    array: np.ndarray
    sent_bytes: int


def travel(array: np.ndarray, codec: str) -> Travelled:
    """The array as it comes out at the far end of a link. Raises what the codec raises."""
    assembler, sent = None, 0
    for chunk, payload in tensor_chunks("x", array, codec):
        assembler = assembler or TensorAssembler(chunk)
        sent += _size(payload)
        assembler.add(chunk, payload)
    assert assembler is not None  # there is one chunk at least
    return Travelled(assembler.array(), sent)


@dataclass
class SplitModel:
    """`layout` divides `model`. Runs with as many threads as torch is set to, without gradients."""

    model: ModelGraph
    layout: Layout
    _programs: dict[int, Callable[[list[Any]], Sequence[Any]]] = field(default_factory=dict)

    def run_stage(self, stage: StageLayout, values: Mapping[str, Any]) -> dict[str, Any]:
        """The stage's outputs, of its inputs by name: tensors, and numbers where the graph has numbers."""
        if stage.index not in self._programs:
            self._programs[stage.index] = self.model.stage_runner(stage)
        with torch.no_grad():  # not inference_mode: see nodes/engines/torch_graph.py
            results = self._programs[stage.index]([values[spec.name] for spec in stage.inputs])
        return dict(zip((spec.name for spec in stage.outputs), results, strict=True))

    def run(self, inputs: Mapping[str, np.ndarray], codecs: Mapping[tuple[int, int], str]) -> dict[str, np.ndarray]:
        """The model's outputs by name. `codecs`: of the transfers between stages, by index; raw where there is none."""
        kinds = self.model.kinds
        made: dict[str, Any] = {name: from_array(array, kinds[name]) for name, array in inputs.items()}
        arrived: dict[int, dict[str, Any]] = {stage.index: {} for stage in self.layout.stages}
        for flow in self.layout.flows:
            if flow.source is None and flow.target is not None:
                arrived[flow.target].update({name: made[name] for name in flow.tensors})
        for stage in self.layout.stages:
            made |= self.run_stage(stage, arrived[stage.index])
            for flow in self.layout.flows:
                if flow.source == stage.index and flow.target is not None:
                    codec = codecs.get((flow.source, flow.target), "raw")
                    for name in flow.tensors:
                        arrived[flow.target][name] = from_array(travel(to_array(made[name]), codec).array, kinds[name])
        return self.answers(made)

    def answers(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The model's outputs by name, of values that hold them."""
        return {output.spec.name: to_array(values[output.value]) for output in self.model.structure.outputs}

    @property
    def stages(self) -> Sequence[StageLayout]:
        return self.layout.stages


def to_array(value: Any) -> np.ndarray:
    """The same memory with the same strides; a number becomes a 0-dimensional array."""
    if not isinstance(value, torch.Tensor):
        return np.array(value)
    value = value.detach().resolve_conj().resolve_neg()
    array: np.ndarray = value.view(torch.int16).numpy().view(_BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()
    return array


def from_array(array: np.ndarray, kind: str = "tensor") -> Any:
    """The same memory as a tensor with the same strides; a number where the graph has one."""
    if kind != "tensor":
        return _NUMBERS[kind](array.item())
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == _BFLOAT16 else torch.from_numpy(array)


def _size(payload: Buffer) -> int:
    return memoryview(payload).nbytes
