"""A pass on one stage: the handles of the ingress become those of the engine, which several generations of a deployment may share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from nodes.engines.decoder.base import StepEngine
from nodes.generation.orders import Orders
from splitnet.errors import BadShard
from splitnet.generation import PROMPT

__all__ = ["StageSessions"]

_engine_handles = itertools.count(1)  # unique in this process


class StageSessions:
    """The sessions of one deployment on one stage's engine. To be used in the compute thread."""

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def run(self, engine: object, orders: Orders, inputs: Mapping[str, np.ndarray], output: str) -> dict[str, np.ndarray]:
        """Raises what the engine raises; then no cache has been changed, but for what was closed or forked."""
        engine = step_engine(engine)
        self.close(engine, orders.closes)
        for fork in orders.forks:
            engine.fork(self._handle(fork.source), self._handle(fork.target), fork.tokens)
        steps = [dataclasses.replace(step, session=self._handle(step.session)) for step in orders.steps]
        hidden = next((array for name, array in inputs.items() if name != PROMPT), None)
        return {output: engine.step(steps, hidden)}

    def close(self, engine: object, sessions: tuple[int, ...]) -> None:
        for session in sessions:
            handle = self._handles.pop(session, None)
            if handle is not None:
                step_engine(engine).close(handle)

    def close_all(self, engine: object) -> None:
        """The ingress has forgotten them."""
        self.close(engine, tuple(self._handles))

    def _handle(self, session: int) -> int:
        handle = self._handles.get(session)
        if handle is None:
            handle = self._handles[session] = next(_engine_handles)
        return handle


def step_engine(engine: object) -> StepEngine:
    """Raises BadShard where the engine keeps no caches."""
    if not isinstance(engine, StepEngine):
        raise BadShard(
            f"engine {getattr(engine, 'name', type(engine).__name__)!r} does not generate",
            remedy="cut the model for --generate and deploy it again",
        )
    return engine
