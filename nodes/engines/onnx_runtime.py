"""ONNX Runtime: a shard's ONNX graph on the CPU. Faster than torch for most networks, equal to it within rounding, and needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from nodes.engines.base import check_inputs
from nodes.memory import give_back
from splitnet.errors import BadShard, EngineFailure
from splitnet.onnx_format import Place, from_bytes, to_bytes
from splitnet.onnx_nouns import ONNX_MEMBER, WEIGHT, OnnxGraph, OnnxValue
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.shard import STORED_DTYPES, Shard, read_header
from splitnet.tensors import DTYPES, TensorSpec

__all__ = ["OnnxEngine"]

#: What ONNX Runtime raises: its classes have no common one. RuntimeError, TypeError and ValueError come from its Python side.
_ERRORS = (
    state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented, state.RuntimeException, state.EPFail,
    RuntimeError, TypeError, ValueError, MemoryError,
)  # fmt: skip
_SILENT = 4  # log only what is fatal: an error is raised anyway
_ARENA_VALUES = 2  # the values of a run together may take so many times what one may
_SAME_AS_REQUESTED = 1  # the arena grows by what is asked for, not by powers of two


class OnnxEngine:
    """See `nodes.engines.base.Engine`."""

    name: ClassVar[str] = "onnx"

    def __init__(self, session: ort.InferenceSession, inputs: tuple[TensorSpec, ...], outputs: tuple[str, ...], weight_bytes: int) -> None:
        self._session = session
        self._inputs = inputs
        self._outputs = list(outputs)
        self._memory_bytes = weight_bytes
        self._options = ort.RunOptions()
        self._options.log_severity_level = _SILENT

    @classmethod
    def load(cls, shard: Shard, *, threads: int, made_up: bool = False, max_value_bytes: int = MAX_VALUE_BYTES) -> Self:
        path = shard.member(ONNX_MEMBER)
        graph = from_bytes(path.read_bytes(), place=str(path))
        for what, listed, there in (("input", shard.manifest.inputs, graph.inputs), ("output", shard.manifest.outputs, graph.outputs)):
            if sorted((spec.name, spec.dtype) for spec in listed) != sorted((value.name, value.dtype) for value in there):
                raise BadShard(f"{shard.path}: the manifest's {what}s are not those of {ONNX_MEMBER}", remedy="cut the model again")
        places, files = _find_weights(shard, graph, made_up)
        _bound_the_arena(_ARENA_VALUES * max_value_bytes)
        options = _options(threads)
        if files:
            options.add_external_initializers_from_files_in_memory(
                list(files), list(files.values()), [data.nbytes for data in files.values()]
            )
        try:
            # What was read, written again: not a byte of the stranger's reaches ONNX Runtime's own reader.
            session = ort.InferenceSession(to_bytes(graph, places), options, providers=["CPUExecutionProvider"])
        except _ERRORS as error:
            raise BadShard(
                f"{path}: ONNX Runtime {ort.__version__} does not take it: {_first_line(error)}",
                remedy="update onnxruntime on this node, or start the node with --engine torch",
            ) from None
        give_back()  # loading leaves behind as much as the weights take, and more: copies that were packed otherwise
        given = {spec.name: spec for spec in shard.manifest.inputs}
        used = {value.name for value in session.get_inputs()}
        ordered = tuple(given[value.name] for value in graph.inputs if value.name in used)
        return cls(session, ordered, tuple(value.name for value in graph.outputs), sum(_bytes_of(w) for w in graph.weights))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_inputs(inputs, self._inputs)
        try:
            results = self._session.run(self._outputs, {spec.name: inputs[spec.name] for spec in self._inputs}, self._options)
        except _ERRORS as error:
            raise EngineFailure(f"ONNX Runtime failed: {_first_line(error)}"[:2000]) from error
        return dict(zip(self._outputs, results, strict=True))

    def memory_bytes(self) -> int:
        return self._memory_bytes


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    # A thread that waits for its next piece of work must not burn a core that another stage, or another process, could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")  # the one of `_bound_the_arena`
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights stay out of it
    return options


_arena_bytes = 0


def _bound_the_arena(size_bytes: int) -> None:
    """All sessions of this process share one arena: the compute thread runs one at a time. A graph that asks for more fails, and nothing else does.
    The first call decides: ONNX Runtime takes an allocator only once."""
    global _arena_bytes
    if _arena_bytes:
        return
    _arena_bytes = size_bytes
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    limits = {
        "max_mem": size_bytes,
        "arena_extend_strategy": _SAME_AS_REQUESTED,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(limits))


def _find_weights(shard: Shard, graph: OnnxGraph, made_up: bool) -> tuple[dict[str, Place], dict[str, np.ndarray]]:
    """Where each weight lies, and those files' bytes: the shard's as they lie on the disk, of which ONNX Runtime copies what it needs."""
    wanted = {weight.name.removeprefix(WEIGHT): weight for weight in graph.weights}
    if (needed := sum(_bytes_of(weight) for weight in graph.weights)) > shard.manifest.param_bytes:
        raise BadShard(f"{shard.path}: the weights take {needed} bytes, the manifest declares {shard.manifest.param_bytes}")
    places: dict[str, Place] = {}
    files: dict[str, np.ndarray] = {}
    for number, path in enumerate(shard.weights):
        for name, stored in read_header(path).items():
            weight = wanted.get(name)
            if weight is None:
                continue  # only the torch graph uses it
            if STORED_DTYPES.get(stored.dtype) != weight.dtype or stored.shape != weight.shape:
                raise BadShard(
                    f"{path}: weight {name!r} should be {weight.dtype} {weight.shape}, the file has {stored.dtype} {stored.shape}",
                    remedy="cut the model again",
                )
            places[weight.name] = (str(number), stored.begin, stored.end - stored.begin)
            files.setdefault(str(number), np.memmap(path, np.uint8, "r"))
    missing = [weight for weight in graph.weights if weight.name not in places]
    if missing and not made_up:
        name = missing[0].name.removeprefix(WEIGHT)
        raise BadShard(f"{shard.path}: the weight {name!r} is missing", remedy="cut the model again, or load the shard again")
    position, parts = 0, []
    for weight in missing:
        parts.append(np.frombuffer(_made_up(weight).tobytes(), np.uint8))
        places[weight.name] = ("made-up", position, parts[-1].nbytes)
        position += parts[-1].nbytes
    if parts:
        files["made-up"] = np.concatenate(parts)
    return places, files


def _made_up(weight: OnnxValue) -> np.ndarray:
    """As the torch engine makes them up: ordinary numbers that keep an activation's size; ones where an element is no float."""
    kind, shape = DTYPES[weight.dtype], tuple(int(size) for size in weight.shape)
    if not np.issubdtype(kind, np.floating):
        return np.ones(shape, kind)
    generator = np.random.default_rng(0)
    if len(shape) > 1:
        scale = (shape[0] / max(math.prod(shape), 1)) ** 0.5
        return (generator.standard_normal(shape, np.float32) * np.float32(scale)).astype(kind)
    return (generator.random(shape, np.float32) + np.float32(0.5)).astype(kind)


def _bytes_of(weight: OnnxValue) -> int:
    return math.prod(int(size) for size in weight.shape) * DTYPES[weight.dtype].itemsize


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
