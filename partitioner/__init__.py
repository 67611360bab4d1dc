"""partitioner: measures a model and machines, and cuts the model where it pays.

    model = partitioner.capture(module, example_inputs)               # or partitioner.load_model("hf:DIR")
    profile = partitioner.profile(model)
    plan = partitioner.plan(profile, cluster, objective="latency")    # splitnet.Plan
    shards = partitioner.cut(model, plan, "out/")

    workload = partitioner.Workload(context_length=2048, sessions=8, prompt_tokens=512, answer_tokens=128, chunk_tokens=128)
    model = partitioner.load_decoder("DIR")                           # a language model that is to generate text (docs/decoding.md)
    profile = partitioner.measure_decoder(model, workload, cluster=cluster)
    plan = partitioner.plan_decoder(model, profile, cluster, workload, objective="tpot")
    shards = partitioner.cut_decoder(model, plan, "out/")

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
    from partitioner.decoders.figures import DecoderProfile, Workload
    from partitioner.decoders.measuring import measure_decoder
    from partitioner.decoders.model import DecoderModel, load_decoder
    from partitioner.decoders.planning import plan_decoder
    from partitioner.decoders.weights import Weights
    from partitioner.decoders.writing import cut_decoder
    from partitioner.graph import ModelGraph
    from partitioner.layout import Layout, lay_out
    from partitioner.planning import plan
    from partitioner.profiling import Profile, profile
    from partitioner.solvers import solve
    from partitioner.sources import load_model
    from partitioner.structure import Structure, Vertex

__all__ = [
    "DecoderModel",
    "DecoderProfile",
    "Layout",
    "ModelGraph",
    "Profile",
    "Structure",
    "Vertex",
    "Weights",
    "Workload",
    "bench",
    "capture",
    "crossing_bytes",
    "cut",
    "cut_decoder",
    "lay_out",
    "load_decoder",
    "load_model",
    "measure_decoder",
    "plan",
    "plan_decoder",
    "profile",
    "solve",
]

# No module is called like a public function: importing it would put the module in the function's place.
_HOMES = {
    "DecoderModel": "decoders.model",
    "DecoderProfile": "decoders.figures",
    "Layout": "layout",
    "ModelGraph": "graph",
    "Profile": "profiling",
    "Structure": "structure",
    "Vertex": "structure",
    "Weights": "decoders.weights",
    "Workload": "decoders.figures",
    "bench": "benching",
    "capture": "capturing",
    "crossing_bytes": "crossing",
    "cut": "cutting",
    "cut_decoder": "decoders.writing",
    "lay_out": "layout",
    "load_decoder": "decoders.model",
    "load_model": "sources",
    "measure_decoder": "decoders.measuring",
    "plan": "planning",
    "plan_decoder": "decoders.planning",
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
