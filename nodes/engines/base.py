"""What an engine is: it loads a shard once, and runs it any number of times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from splitnet.errors import BadInput
from splitnet.tensors import DTYPES

if TYPE_CHECKING:
    from splitnet.shard import Shard
    from splitnet.tensors import TensorSpec

__all__ = ["Engine", "TimedEngine", "check_inputs"]


class Engine(Protocol):
    """Called from one thread, the compute thread of its stage: the thread that loads it also runs it.

    Arrays may have any strides, on both sides: a layout carries meaning, because the far side runs the same kernels on it and so
    gets the same bits. An engine neither changes its inputs nor keeps them; its outputs may share memory with its inputs and with
    its weights, so whoever wants to write into one copies it first. bfloat16 is `ml_dtypes.bfloat16`.
    """

    name: ClassVar[str]  #: as it stands in a shard's manifest

    @classmethod
    def load(cls, shard: Shard, *, threads: int, max_value_bytes: int) -> Self:
        """Reads graph and weights, with that many intra-op threads from now on in this thread. `max_value_bytes`: what one value may
        take that the graph makes of sizes alone. Raises BadShard where the shard does not hold together or holds an operator that is
        not allowed."""
        ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The shard's outputs by name. `inputs` holds every input of the shard, with the dtypes that its manifest names.
        Raises BadInput for a missing input and for one of another dtype, EngineFailure naming the operator where the computation fails; the engine
        stays usable after either."""
        ...

    def memory_bytes(self) -> int:
        """Bytes of weights that this engine holds."""
        ...


@runtime_checkable
class TimedEngine(Engine, Protocol):
    """An engine that can say how long each operator takes. Its `load` also takes `made_up=True`: weights that the shard's file does not
    hold are random ones of their spec, as many bytes as the manifest declares at most."""

    def run_timed(self, inputs: Mapping[str, np.ndarray], on_operator: Callable[[str, float], None]) -> dict[str, np.ndarray]:
        """As `run`; `on_operator` gets the first value that an operator produces, and its seconds (processor time where one thread computes)."""
        ...


def check_inputs(inputs: Mapping[str, np.ndarray], wanted: Sequence[TensorSpec]) -> None:
    """Raises BadInput unless each of them is there, with its dtype."""
    for spec in wanted:
        array = inputs.get(spec.name)
        if array is None:
            raise BadInput(f"input {spec.name!r} is missing; the stage needs {', '.join(s.name for s in wanted)}")
        if array.dtype != DTYPES[spec.dtype]:
            raise BadInput(
                f"input {spec.name!r}: expected {spec.dtype}, got {array.dtype}", remedy=f"convert it: array.astype({spec.dtype!r})"
            )
