"""Engines run shards. A new one is a module here and a line in `_ENGINES`."""

from __future__ import annotations

import importlib
import importlib.util

from nodes.engines.base import Engine
from splitnet.errors import MissingExtra, NotFound
from splitnet.output_sizes import MAX_VALUE_BYTES
from splitnet.shard import Shard

__all__ = ["Engine", "engine_names", "load_engine"]

#: name -> (module, class, what must be installed); the first that can run a shard's format is the one that "auto" takes
_ENGINES: dict[str, tuple[str, str, str]] = {
    "torch-graph": ("nodes.engines.torch_graph", "TorchGraphEngine", "torch"),
}


def engine_names() -> tuple[str, ...]:
    """The engines that this box can run. Imports none of them."""
    return tuple(name for name, (_, _, needs) in _ENGINES.items() if importlib.util.find_spec(needs) is not None)


def load_engine(
    shard: Shard, *, threads: int, engine: str = "auto", made_up: bool = False, max_value_bytes: int = MAX_VALUE_BYTES
) -> Engine:
    """Loads a shard into an engine, in the thread that will run it; `made_up` as in `TimedEngine`. Raises NotFound for an engine that there is not, MissingExtra
    where this box lacks what it needs, and what `Engine.load` raises."""
    name = shard.manifest.engine if engine == "auto" else engine
    if name not in _ENGINES:
        raise NotFound(f"no engine {name!r}; there is {', '.join(_ENGINES)}")
    module, cls, needs = _ENGINES[name]
    if importlib.util.find_spec(needs) is None:
        raise MissingExtra(f"engine {name!r} needs {needs}, which is not installed here", remedy="pip install 'splitnet[node]'")
    loader = getattr(importlib.import_module(module), cls).load
    options = {"threads": threads, "max_value_bytes": max_value_bytes} | ({"made_up": True} if made_up else {})
    loaded: Engine = loader(shard, **options)
    return loaded
