"""partitioner: measures a model and machines, and cuts the model where it pays.

    model = partitioner.capture(module, example_inputs)               # or partitioner.load_model("hf:DIR")
    profile = partitioner.profile(model)
    plan = partitioner.plan(profile, cluster, objective="latency")    # splitnet.Plan
    shards = partitioner.cut(model, plan, "out/")

Names are imported when they are first used: planning needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partitioner.benching import bench
    from partitioner.capturing import capture
    from partitioner.crossing import crossing_bytes
    from partitioner.cutting import cut
    from partitioner.graph import ModelGraph
    from partitioner.layout import Layout, lay_out
    from partitioner.planning import plan
    from partitioner.profiling import Profile, profile
    from partitioner.solvers import solve
    from partitioner.sources import load_model
    from partitioner.structure import Structure, Vertex

__all__ = [
    "Layout",
    "ModelGraph",
    "Profile",
    "Structure",
    "Vertex",
    "bench",
    "capture",
    "crossing_bytes",
    "cut",
    "lay_out",
    "load_model",
    "plan",
    "profile",
    "solve",
]

# No module is called like a public function: importing it would put the module in the function's place.
_HOMES = {
    "Layout": "layout",
    "ModelGraph": "graph",
    "Profile": "profiling",
    "Structure": "structure",
    "Vertex": "structure",
    "bench": "benching",
    "capture": "capturing",
    "crossing_bytes": "crossing",
    "cut": "cutting",
    "lay_out": "layout",
    "load_model": "sources",
    "plan": "planning",
    "profile": "profiling",
    "solve": "solvers",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'partitioner' has no attribute {name!r}") from None
    value = globals()[name] = getattr(import_module(f"partitioner.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
