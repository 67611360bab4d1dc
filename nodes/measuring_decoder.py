"""Times passes through a piece of a decoder model on this node: with its engine and threads, in its compute thread, on weights that are made up here."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.engines.decoder.steps import Step
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec
from splitnet.errors import BadInput, InsufficientMemory, Overloaded
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import STORED_DTYPES, Shard, write_shard
from splitnet.tensors import DTYPES
from splitnet.wire import spec_from_message

if TYPE_CHECKING:
    from nodes.compute import ComputeThread
    from nodes.engines.decoder.base import StepEngine
    from nodes.ledger import Ledger

__all__ = ["DecoderTimer"]

_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 200
_PAUSE_S = 0.001
_MOST_TENSORS, _MOST_TOKENS, _MOST_SESSIONS = 1 << 16, 1 << 20, 1 << 10
_MOST_BYTES = 1 << 36  # where the node has no limit of its own
_RANDOM_BYTES = 1 << 20  # of randomness, over and over: what is computed is the same work
_SAFETENSORS = {name: stored for stored, name in STORED_DTYPES.items()}


class DecoderTimer:
    """One measurement at a time: a second one would only disturb the first."""

    def __init__(self, ledger: Ledger, compute: ComputeThread) -> None:
        self._ledger = ledger
        self._compute = compute
        self._busy = False

    async def measure(self, request: pb.DecoderRequest, budget_s: float) -> pb.DecoderReply:
        """Takes about `budget_s`, but at least three rounds of each figure, and what the weights take to be made and read. Raises BadInput for what cannot be
        measured, BadShard for a description that does not hold together, InsufficientMemory, Overloaded while another one runs. Nothing is left behind."""
        asked = _Asked(request)
        self._check_memory(asked)
        if self._busy:
            raise Overloaded("another decoder model is being measured here", remedy="wait until it is done", retry_after_s=1.0)
        self._busy = True
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="splitnet-decoder-"))
        timing = _Timing(asked)
        try:
            shard = await asyncio.to_thread(_made_up, asked, folder)
            await self._compute.call(functools.partial(timing.load, shard, self._ledger.config.threads))
            await self._compute.call(timing.fill)
            while timing.filled < asked.cached_tokens:
                await asyncio.sleep(_PAUSE_S)
                await self._compute.call(timing.fill)
            for batch in asked.batches:
                await self._compute.call(functools.partial(timing.open, batch))
                end = time.perf_counter() + budget_s / len(asked.batches)
                for done in range(1 + _MOST_ROUNDS):
                    if done > _FEWEST_ROUNDS and time.perf_counter() > end:
                        break
                    await asyncio.sleep(_PAUSE_S)
                    await self._compute.call(functools.partial(timing.step, batch, keep=done > 0))
            return timing.reply()
        finally:
            self._busy = False
            await self._compute.call(timing.forget)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _check_memory(self, asked: _Asked) -> None:
        limit = self._ledger.config.memory_bytes
        used = sum(deployment.reserved_bytes for deployment in self._ledger.deployments.values())
        if used + asked.needed_bytes > (limit or _MOST_BYTES):
            raise InsufficientMemory(
                f"measuring this piece needs {asked.needed_bytes} bytes here; of the limit of {limit or _MOST_BYTES} bytes {used} are taken",
                remedy="measure fewer layers at once, unload a deployment, or raise the node's --memory",
            )


class _Asked:
    """The request, checked."""

    def __init__(self, request: pb.DecoderRequest) -> None:
        self.spec = DecoderSpec.from_bytes(request.spec, place="decoder.spec")
        if len(request.tensors) > _MOST_TENSORS:
            raise BadInput(f"decoder.tensors: at most {_MOST_TENSORS} are taken, got {len(request.tensors)}")
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for message in request.tensors:
            spec = spec_from_message(message)
            shape = tuple(size for size in spec.shape if isinstance(size, int))
            if len(shape) != len(spec.shape) or spec.dtype not in _SAFETENSORS:
                raise BadInput(
                    f"decoder.tensors: {spec.name!r:.200}: expected plain sizes and an element type that shards have, got {spec}"
                )
            self.tensors[spec.name] = spec.dtype, shape
        self.chunk_tokens, self.cached_tokens = request.chunk_tokens, request.cached_tokens
        self.batches = tuple(request.batches)
        for what, figure, most in (
            ("chunk_tokens", self.chunk_tokens, _MOST_TOKENS),
            ("cached_tokens", self.cached_tokens, self.spec.context_length - 1),
            *(("batches", batch, _MOST_SESSIONS) for batch in self.batches or (0,)),
        ):
            if not 1 <= figure <= most:
                raise BadInput(f"decoder.{what}: expected 1 to {most}, got {figure}")
        self.weight_bytes = sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())

    @property
    def cache_tokens(self) -> int:
        return (self.cached_tokens + 1) * max(self.batches)

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.cache_tokens * self.spec.kv_bytes_per_token


def _made_up(asked: _Asked, folder: Path) -> Shard:
    """A shard with random weights. Small numbers: what is computed stays finite."""
    random = np.random.default_rng(0)
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in asked.tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 64)
    path = folder / "weights.safetensors"
    noise = {dtype: _noise(random, dtype) for dtype in {dtype for dtype, _ in asked.tensors.values()}}
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for dtype, shape in asked.tensors.values():
            left = math.prod(shape) * DTYPES[dtype].itemsize
            while left > 0:
                file.write(noise[dtype][: min(left, len(noise[dtype]))])
                left -= len(noise[dtype])
    spec = asked.spec
    members: dict[str, bytes | Path] = {DECODER_MEMBER: spec.to_bytes(), path.name: path}
    return write_shard(
        folder, model="measured", model_sha256="0" * 64, stage="measured", engine="decoder", inputs=spec.inputs(), outputs=spec.outputs(),
        members=members, param_bytes=asked.weight_bytes, activation_bytes=0,
    )  # fmt: skip


def _noise(random: np.random.Generator, dtype: str) -> bytes:
    kind = DTYPES[dtype]
    if kind.kind in "iu":
        return random.integers(0, 256, _RANDOM_BYTES, dtype=np.uint8).tobytes()
    return (random.standard_normal(_RANDOM_BYTES // kind.itemsize) * 0.02).astype(kind).tobytes()


class _Timing:
    """Every method is a job of the compute thread."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._engine: StepEngine | None = None
        self._random = np.random.default_rng(1)
        self._chunks: list[tuple[int, float]] = []
        self._steps: dict[int, list[float]] = {batch: [] for batch in asked.batches}
        self.filled = 0

    def load(self, shard: Shard, threads: int) -> None:
        from nodes.engines.decoder.engine import DecoderEngine  # imports torch and transformers

        self._engine = DecoderEngine.load(shard, threads=threads, cache_tokens=self._asked.cache_tokens)

    def fill(self) -> None:
        """A chunk of a prompt, to the last place in the cache that is asked for. The first, with everything cold, is computed twice."""
        count = min(self._asked.chunk_tokens, self._asked.cached_tokens - self.filled)
        step = self._step(0, self.filled, count)
        if not self._chunks:
            self._run([step])
        self._chunks.append((count, self._run([step])))
        self.filled += count

    def open(self, batch: int) -> None:
        assert self._engine is not None
        for session in range(1, batch):
            self._engine.fork(0, session, self._asked.cached_tokens)

    def step(self, batch: int, keep: bool) -> None:
        took_s = self._run([self._step(session, self._asked.cached_tokens, 1) for session in range(batch)])
        if keep:
            self._steps[batch].append(took_s)

    def _step(self, session: int, position: int, count: int) -> Step:
        ids = self._random.integers(0, self._asked.spec.vocabulary, count).astype(np.int32)
        return Step(session, position, ids, wanted=1 if self._asked.spec.head else 0)

    def _run(self, steps: Sequence[Step]) -> float:
        assert self._engine is not None
        spec = self._asked.spec
        rows = sum(len(step.tokens) for step in steps)
        hidden = None if spec.embedding else self._random.standard_normal((rows, spec.hidden_size), np.float32).astype(DTYPES[spec.dtype])
        started = time.perf_counter()
        self._engine.step(steps, hidden)
        return time.perf_counter() - started

    def forget(self) -> None:
        self._engine = None

    def reply(self) -> pb.DecoderReply:
        assert self._engine is not None
        whole = [seconds for count, seconds in self._chunks if count == self._asked.chunk_tokens]
        prefill_s = statistics.fmean(whole) if whole else self._chunks[0][1] * self._asked.chunk_tokens / self._chunks[0][0]
        medians = [statistics.median(self._steps[batch]) for batch in self._asked.batches]
        spreads = [
            statistics.median(abs(s - median) for s in self._steps[batch]) / max(median, 1e-12)
            for batch, median in zip(self._asked.batches, medians, strict=True)
        ]
        return pb.DecoderReply(
            prefill_s=prefill_s, decode_s=medians, rounds=min(map(len, self._steps.values())), spread=max(spreads),
            weight_bytes=self._engine.memory_bytes(),
        )  # fmt: skip
