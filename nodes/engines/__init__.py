"""Engines run shards. A new one is a module here and a line in `ENGINES`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from nodes.engines.base import Engine
from splitnet.errors import BadShard, MissingExtra, NotFound
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.shard import Shard

__all__ = ["AUTO", "ENGINES", "REFERENCE", "Engine", "EngineEntry", "able", "engine_choices", "engine_names", "load_engine", "resolve"]

#: The engine that the shard names itself: answers are then those of the machine that captured the model, bit for bit.
REFERENCE = "reference"
#: Whichever is fastest for this shard on this box, by measurement (`nodes.engines.choosing`).
AUTO = "auto"
_SHORT = {"torch": "torch-graph"}


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """`member`: what a shard must hold for it. `needs`: what must be installed, and `extra`: how."""

    module: str
    cls: str
    member: str
    needs: str
    extra: str


ENGINES: Mapping[str, EngineEntry] = {
    "torch-graph": EngineEntry("nodes.engines.torch_graph", "TorchGraphEngine", "graph.json", "torch", "node"),
    "torch-fast": EngineEntry("nodes.engines.torch_fast", "TorchFastEngine", "graph.json", "torch", "node"),
    "onnx": EngineEntry("nodes.engines.onnx_runtime", "OnnxEngine", "graph.onnx", "onnxruntime", "onnx"),
    "decoder": EngineEntry("nodes.engines.decoder.engine", "DecoderEngine", "decoder.json", "transformers", "decoder"),
}


def engine_names() -> tuple[str, ...]:
    """The engines that this box can run. Imports none of them."""
    return tuple(name for name, entry in ENGINES.items() if importlib.util.find_spec(entry.needs) is not None)


def engine_choices() -> tuple[str, ...]:
    """What `--engine` takes."""
    return (REFERENCE, AUTO, *_SHORT, *ENGINES)


def able(shard: Shard) -> tuple[str, ...]:
    """The engines here that can run this shard, its own first."""
    named = [name for name in engine_names() if ENGINES[name].member in shard.manifest.members]
    return tuple(sorted(named, key=lambda name: name != shard.manifest.engine))


def resolve(shard: Shard, engine: str) -> str:
    """The name of the engine that runs this shard when `engine` was asked for. Raises NotFound for an engine that there is not, MissingExtra
    where this box lacks what it needs, BadShard where the shard has nothing for it."""
    name = shard.manifest.engine if engine == REFERENCE else _SHORT.get(engine, engine)
    if name not in ENGINES:
        raise NotFound(f"no engine {name!r}; there is {', '.join(ENGINES)}")
    entry = ENGINES[name]
    if importlib.util.find_spec(entry.needs) is None:
        others = [other for other in able(shard) if other != name]
        remedy = f"pip install 'splitnet[{entry.extra}]'" + (f", or start the node with --engine {others[0]}" if others else "")
        raise MissingExtra(f"engine {name!r} needs {entry.needs}, which is not installed here", remedy=remedy)
    if entry.member not in shard.manifest.members:
        said = f": {'; '.join(shard.manifest.notes)}" if shard.manifest.notes else ""
        raise BadShard(
            f"stage {shard.manifest.stage!r} has no {entry.member}, which engine {name!r} runs{said}",
            remedy=f"start the node with --engine {AUTO} or --engine {REFERENCE}, which take what the shard has",
        )
    return name


def load_engine(
    shard: Shard,
    *,
    threads: int,
    engine: str = REFERENCE,
    made_up: bool = False,
    max_value_bytes: int = MAX_VALUE_BYTES,
    cache_tokens: int = 0,
) -> Engine:
    """Loads a shard into an engine, in the thread that will run it; `made_up` as in `TimedEngine`, `cache_tokens` for a `StepEngine`. Raises what `resolve` and `Engine.load` raise."""
    entry = ENGINES[resolve(shard, engine)]
    loader = getattr(importlib.import_module(entry.module), entry.cls).load
    options = {"threads": threads, "max_value_bytes": max_value_bytes} | ({"made_up": True} if made_up else {})
    if cache_tokens:
        options["cache_tokens"] = cache_tokens
    loaded: Engine = loader(shard, **options)
    return loaded
