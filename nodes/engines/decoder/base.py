"""What a decoder engine is: the interface between a stage's compute thread and whatever computes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from nodes.engines.decoder.steps import Step

if TYPE_CHECKING:
    from splitnet.shard import Shard

__all__ = ["StepEngine"]


@runtime_checkable
class StepEngine(Protocol):
    """Called from one thread, the compute thread of its stage. Holds the KV caches of its layers for any number of sessions, within `cache_tokens`
    slots in all; a slot holds one token of one session in all layers of the stage.

    A step that raises BadInput or Overloaded has changed nothing. One that raises EngineFailure leaves its sessions at the positions at which the steps began: the same
    steps may come again.
    """

    name: ClassVar[str]  #: as it stands in a shard's manifest

    @classmethod
    def load(cls, shard: Shard, *, threads: int, max_value_bytes: int, cache_tokens: int) -> Self:
        """Reads config and weights, with that many intra-op threads from now on in this thread, and takes the memory of all slots. Raises BadShard where
        the shard does not hold together: an architecture that is not supported, a tensor that is missing or does not fit; BadInput for a
        `cache_tokens` below 1."""
        ...

    def step(self, steps: Sequence[Step], hidden: np.ndarray | None) -> np.ndarray:
        """One forward pass over all steps. `hidden`: the previous stage's, [T, hidden size], the steps' rows one after another, T the number of tokens in all; None at
        the first stage, which embeds `tokens`. Returns hidden states [T, hidden size] in the model's element type; at the last stage int32 [sum of
        wanted], the next tokens in the order of the steps. A session that is not known begins with position 0.

        Raises BadInput for a token id out of range, a position beyond what the cache holds or beyond the model's context, two steps of one session in one batch, and
        hidden states of another shape; Overloaded when no slots are left."""
        ...

    def fork(self, source: int, target: int, tokens: int) -> None:
        """`target` (its old content is dropped) starts with the first `tokens` positions of `source`, without computing them again. Raises BadInput where
        `source` is not known or holds fewer; Overloaded when no slots are left."""
        ...

    def close(self, session: int) -> None:
        """Frees its slots. A session that is not known is fine."""
        ...

    def memory_bytes(self) -> int:
        """Bytes of weights that this engine holds."""
        ...

    def cache_bytes(self) -> int:
        """Bytes that the slots take, used or not."""
        ...

    def free_tokens(self) -> int:
        """Slots that no session uses."""
        ...
