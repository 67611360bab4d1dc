"""Times each operator of a model on this node: with its own engine, its own threads, in its compute thread.

Every round is one job of the compute thread, so that a request waits for it no longer than for another request. Whole runs and runs
with a clock between the operators take turns; of each the median is kept. Last come bursts of runs that follow each other with hardly a pause.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nodes.engines import AUTO, REFERENCE, able, load_engine
from nodes.engines.base import Engine, TimedEngine
from nodes.engines.choosing import compare_engines
from splitnet.errors import BadInput, BadShard, InsufficientMemory, NotFound, Overloaded
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import STORED_DTYPES, Shard, check_member, read_header
from splitnet.tensors import DTYPES, aligned_empty

if TYPE_CHECKING:
    from nodes.compute import ComputeThread
    from nodes.ledger import Ledger
    from nodes.store import BlobStore

__all__ = ["OperatorTimer"]

_WARM_UP = 2
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 50
# As between requests: a model that runs again at once finds its weights in the caches, and a small one takes a third of the time; and
# on a box that others use, who never pauses is made to wait for them.
_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1
_MOST_PIECES = 1024
_BURST_S = 0.15  # of runs without a pause: longer than the periods in which a control group gets its quota
_BURST_SHARE = 0.3  # of the budget

_Arrays = dict[str, np.ndarray]


class OperatorTimer:
    """One measurement at a time: a second one would only disturb the first."""

    def __init__(self, ledger: Ledger, store: BlobStore, compute: ComputeThread) -> None:
        self._ledger = ledger
        self._store = store
        self._compute = compute
        self._busy = False

    async def measure(self, request: pb.OperatorsRequest, budget_s: float) -> list[pb.OperatorsReply]:
        """Runs the pieces one after another, each on what the ones before it have produced, and lets go of each before the next.

        Takes about `budget_s`, but at least five rounds of each piece (`sustained`: one burst). Raises Overloaded while another such measurement runs, NotFound
        for what was not sent by Load (or an engine that has no clock), InsufficientMemory where a piece does not fit beside what the
        node serves, BadShard, EngineFailure. Nothing is left behind but the blobs, which Release removes."""
        names, inputs = list(request.shards), request.inputs
        if not 0 < len(names) <= _MOST_PIECES:
            raise BadInput(f"operators: expected 1 to {_MOST_PIECES} shards, got {len(names)}")
        if self._busy:
            raise Overloaded("another model is being measured here", remedy="wait until it is done", retry_after_s=1.0)
        self._busy = True
        try:
            with self._store.holding([*names, inputs]):
                return await self._measured(names, inputs, budget_s, request.sustained)
        finally:
            self._busy = False

    async def _measured(self, names: Sequence[str], inputs: str, budget_s: float, sustained: bool) -> list[pb.OperatorsReply]:
        shards = [await asyncio.to_thread(self._store.shard, name) for name in names]
        path = await asyncio.to_thread(self._store.path, inputs)
        await asyncio.to_thread(check_member, path, "inputs.safetensors", place=f"blob {inputs[:12]}")
        values: _Arrays = await self._compute.call(functools.partial(_read, path))
        return [await self._piece(shard, values, budget_s / len(shards), sustained) for shard in shards]

    async def _piece(self, shard: Shard, values: _Arrays, budget_s: float, sustained: bool) -> pb.OperatorsReply:
        self._check_memory(shard, sum(array.nbytes for array in values.values()))
        timing = _Timing(shard, self._ledger.config.threads, self._ledger.config.engine)
        end = time.perf_counter() + budget_s
        try:
            if missing := [spec.name for spec in shard.manifest.inputs if spec.name not in values]:
                raise BadInput(
                    f"operators: input {missing[0]!r} of shard {shard.sha256[:12]} is neither given nor made by a piece before it"
                )
            await self._compute.call(functools.partial(timing.load, values))
            for done in range(0 if sustained else _WARM_UP + _MOST_ROUNDS):
                if done >= _WARM_UP + _FEWEST_ROUNDS and time.perf_counter() > end - budget_s * _BURST_SHARE:
                    break
                for run in (timing.whole, timing.timed):
                    await asyncio.sleep(min(max(_PAUSE_S, timing.last_s), _LONGEST_PAUSE_S))
                    await self._compute.call(functools.partial(run, values, keep=done >= _WARM_UP))
            while not timing.bursts or time.perf_counter() < end:
                await self._burst(timing, values)
            values.update(timing.outputs)
            return timing.reply()
        finally:
            await self._compute.call(timing.forget)

    async def _burst(self, timing: _Timing, values: _Arrays) -> None:
        """Processor time, and not the clock's: what else runs on the box, and a quota, are no matter of the model's. A moment between runs, in
        which the event loop works, as it does between requests: without it a run finds in the caches what the one before has left."""
        seconds: list[float] = []
        took_s = 0.0
        while not seconds or took_s < _BURST_S:
            await asyncio.sleep(_PAUSE_S)
            await self._compute.call(functools.partial(timing.whole, values, keep=False))
            seconds.append(timing.last_cpu_s)
            took_s += timing.last_s
        timing.bursts.append(statistics.fmean(seconds))

    def _check_memory(self, shard: Shard, held_bytes: int) -> None:
        limit = self._ledger.config.memory_bytes
        used = sum(deployment.reserved_bytes for deployment in self._ledger.deployments.values())
        # The engine that serves may be another than the one that tells the operators' shares.
        copies = 1 if self._ledger.config.engine in (REFERENCE, shard.manifest.engine) else min(2, max(1, len(able(shard))))
        needed = copies * shard.manifest.param_bytes + shard.manifest.activation_bytes + held_bytes
        if limit and used + needed > limit:
            raise InsufficientMemory(
                f"measuring this model needs {needed} bytes here; of the limit of {limit} bytes {used} are taken",
                remedy="measure it in smaller pieces, unload a deployment, or raise the node's --memory",
            )


class _Timing:
    """One piece; every method is a job of the compute thread."""

    def __init__(self, shard: Shard, threads: int, engine: str) -> None:
        self._shard = shard
        self._threads = threads
        self._engine_name = engine
        self._engine: Engine | None = None  # the one that would serve
        self._clock: TimedEngine | None = None  # the one that says what share each operator has
        self._whole: list[float] = []
        self._each: dict[str, list[float]] = {}
        self.bursts: list[float] = []  # seconds per run of each
        self.outputs: _Arrays = {}
        self.last_s = self.last_cpu_s = 0.0  # of an undisturbed run

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        name = self._engine_name
        if name == AUTO:
            name = compare_engines(self._shard, able(self._shard), self._given(values), threads=self._threads, made_up=True)[0]
        self._engine = load_engine(self._shard, threads=self._threads, engine=name, made_up=True)
        self._clock = self._engine if isinstance(self._engine, TimedEngine) else self._timed_twin(self._engine.name)

    def _timed_twin(self, name: str) -> TimedEngine:
        """An engine that fuses operators cannot tell them apart: the reference says their shares of the whole."""
        for other in able(self._shard):
            engine = load_engine(self._shard, threads=self._threads, engine=other, made_up=True) if other != name else None
            if isinstance(engine, TimedEngine):
                return engine
        raise NotFound(
            f"engine {name!r} cannot time its operators, and no other engine here can",
            remedy="the planner scales another node's times: --scale",
        )

    def whole(self, values: Mapping[str, np.ndarray], keep: bool) -> None:
        assert self._engine is not None
        given = self._given(values)
        started, spent = time.perf_counter(), time.process_time()
        self.outputs = self._engine.run(given)
        self.last_s, self.last_cpu_s = time.perf_counter() - started, time.process_time() - spent
        if keep:
            self._whole.append(self.last_s)

    def timed(self, values: Mapping[str, np.ndarray], keep: bool) -> None:
        assert self._clock is not None
        times: dict[str, float] = {}
        self._clock.run_timed(self._given(values), times.__setitem__)
        if keep:
            for name, seconds in times.items():
                self._each.setdefault(name, []).append(seconds)

    def _given(self, values: Mapping[str, np.ndarray]) -> _Arrays:
        return {spec.name: values[spec.name] for spec in self._shard.manifest.inputs}

    def forget(self) -> None:
        self._engine = self._clock = None
        self.outputs = {}

    def reply(self) -> pb.OperatorsReply:
        assert self._engine is not None
        assert self._clock is not None
        whole_s = statistics.median(self._whole or [0.0])
        each = {name: statistics.median(seconds) for name, seconds in self._each.items()}
        engine = self._engine.name
        if self._clock is not self._engine:
            share = whole_s / max(sum(each.values()), 1e-12)
            each = {name: seconds * share for name, seconds in each.items()}
            engine = f"{engine} (shared out among the operators as by {self._clock.name})"
        held = sum(self._shard.manifest.members[n].size_bytes for n in self._shard.manifest.members if n.endswith(".safetensors"))
        return pb.OperatorsReply(
            operators=[pb.OperatorTime(name=name, seconds=seconds) for name, seconds in each.items()],
            whole_s=whole_s,
            rounds=len(self._whole),
            spread=statistics.median([abs(w - whole_s) for w in self._whole] or [0.0]) / max(whole_s, 1e-12),
            engine=engine,
            sustained_cpu_s=statistics.median(self.bursts),
            made_up_weights=held < self._shard.manifest.param_bytes,
        )


def _read(path: Path) -> _Arrays:
    """In the compute thread: what is allocated there is freed there. Its header was checked, so that the bytes are what it says."""
    inputs: _Arrays = {}
    for name, stored in read_header(path).items():
        if stored.dtype not in STORED_DTYPES:
            raise BadShard(
                f"the example input {name!r} has the element type {stored.dtype}, which cannot be sent", remedy="send another one"
            )
        dtype = DTYPES[STORED_DTYPES[stored.dtype]]
        data = aligned_empty(stored.end - stored.begin)
        data[:] = np.fromfile(path, np.uint8, stored.end - stored.begin, offset=stored.begin)
        inputs[name] = data.view(dtype).reshape(stored.shape)
    return inputs
