"""`--engine auto`: every engine that can run a stage runs it a few times here, and the fastest stays."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nodes.engines import able, load_engine, resolve
from nodes.engines.base import Engine
from splitnet.errors import BadInput, EngineFailure, SplitnetError
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.shard import Shard
from splitnet.tensors import DTYPES, TensorSpec

__all__ = ["Chosen", "choose_engine", "compare_engines", "made_up_inputs", "shapes_of"]

_LINEAR = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?: ([+-]) (\d+))?\Z")  # sizes as the planner writes them: "2*batch + 1"

_ROUNDS = 5
_BUDGET_S = 2.0  # for the timed rounds of one engine; one round at least
_MARGIN = 0.95  # another engine must need at most this share of the time: who is no faster does not cost the same bits


@dataclass(frozen=True)
class Chosen:
    """The engine that stays, and why, in words. `seconds`: the fastest run of each engine that was tried."""

    engine: Engine
    why: str
    seconds: Mapping[str, float]


def choose_engine(shard: Shard, symbols: Mapping[str, int], *, threads: int, max_value_bytes: int = MAX_VALUE_BYTES) -> Chosen:
    """To be called in the compute thread. `symbols`: the sizes for which the plan was made. The shard's own engine, where it can run here, is the one to beat. One
    engine at a time holds the weights, and the chosen one is loaded once more. Raises what loading raises where only one can run the shard."""
    names = able(shard) or (resolve(shard, shard.manifest.engine),)
    if len(names) == 1:
        only = load_engine(shard, threads=threads, engine=names[0], max_value_bytes=max_value_bytes)
        said = f" ({'; '.join(shard.manifest.notes)})" if shard.manifest.notes else ""
        return Chosen(only, f"{names[0]}: the only one that can run this stage here{said}", {})
    inputs = made_up_inputs(shard.manifest.inputs, shapes_of(shard.manifest.inputs, symbols))
    name, why, seconds = compare_engines(shard, names, inputs, threads=threads, max_value_bytes=max_value_bytes)
    return Chosen(load_engine(shard, threads=threads, engine=name, max_value_bytes=max_value_bytes), why, seconds)


def compare_engines(
    shard: Shard,
    names: Sequence[str],
    inputs: Mapping[str, np.ndarray],
    *,
    threads: int,
    made_up: bool = False,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> tuple[str, str, dict[str, float]]:
    """Which of them is fastest on these inputs, why in words, and the seconds of each that could run. Raises EngineFailure where none could."""
    seconds: dict[str, float] = {}
    refused: list[str] = []
    for name in names:
        try:
            engine = load_engine(shard, threads=threads, engine=name, made_up=made_up, max_value_bytes=max_value_bytes)
            seconds[name] = _fastest(engine, inputs)
            del engine
        except SplitnetError as error:
            refused.append(f"{name} could not run it: {error.message}")
    if not seconds:
        raise EngineFailure(
            f"no engine runs stage {shard.manifest.stage!r} on made-up inputs: {'; '.join(refused)}",
            remedy=f"start the node with --engine {names[0]}",
        )
    own = next(name for name in names if name in seconds)
    best = min(seconds, key=lambda name: seconds[name])
    chosen = best if seconds[best] <= _MARGIN * seconds[own] else own
    figures = ", ".join(f"{name} {took * 1e3:.3g} ms" for name, took in sorted(seconds.items(), key=lambda item: item[1]))
    return chosen, "; ".join([f"{chosen}: measured {figures}", *refused, *shard.manifest.notes]), seconds


def shapes_of(specs: Sequence[TensorSpec], symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Symbolic shapes in numbers. A symbol that is not known is 1. Raises BadInput for a size that is no linear expression."""
    return {spec.name: tuple(size if isinstance(size, int) else _evaluated(size, symbols) for size in spec.shape) for spec in specs}


def _evaluated(text: str, symbols: Mapping[str, int]) -> int:
    found = _LINEAR.match(text)
    if found is None:
        raise BadInput(f"the size {text!r} cannot be made up")
    factor, name, sign, offset = found.groups()
    size = int(factor or 1) * symbols.get(name, 1)
    return max(size + int(offset) * (1 if sign == "+" else -1), 0) if offset else size


def made_up_inputs(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Ordinary numbers; zeros where they may be indices; a mask that hides nothing."""
    generator = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for spec in specs:
        kind, shape = DTYPES[spec.dtype], shapes[spec.name]
        if spec.dtype == "bool":
            made[spec.name] = np.ones(shape, kind)
        elif np.issubdtype(kind, np.integer):
            made[spec.name] = np.zeros(shape, kind)
        else:
            made[spec.name] = np.asarray(generator.standard_normal(shape)).astype(kind)
    return made


def _fastest(engine: Engine, inputs: Mapping[str, np.ndarray]) -> float:
    """The first run is not counted: memory is taken, kernels are chosen. The fastest one is least disturbed by others on the box."""
    engine.run(inputs)
    best, end = float("inf"), time.perf_counter() + _BUDGET_S
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        engine.run(inputs)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:
            break
    return best
