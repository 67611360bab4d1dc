"""What the chain solver is told of a decoder model on a cluster: seconds of passes, of what crosses cuts, and which stage fits where."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from partitioner.constants import Goal, codec_figures, machines, overheads
from partitioner.cost import CodecFigures, Machine, Overhead
from partitioner.decoders.chain import Chain, Costs
from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.model import DecoderModel
from partitioner.solvers.constraints import Constraints, Operator, allowed_operators, matching
from partitioner.solvers.problem import Floats
from splitnet.cluster import Cluster, ClusterNode
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput
from splitnet.generation_plan import LONGEST_CHUNK, chunk_of
from splitnet.stage_memory import stage_memory_bytes
from splitnet.tensors import DTYPES

__all__ = ["Pass", "Setting"]

_NEVER_S = 1e6  # of what was not measured, which `fits` rules out
_CASTS = ("bf16", "fp16")
_TOKEN_BYTES = 4  # of an answer, and 8 of a prompt


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: a chunk of a prompt, or a step of decoding `batch` sessions."""

    tokens: int
    answers: int  # token ids that go back
    decode: bool


@dataclass(frozen=True, eq=False)
class Setting:
    """A model on a cluster, computed in `dtype`, with the formats to choose from. `cuts`: positions at which cuts by hand are, and their nodes."""

    model: DecoderModel
    profile: DecoderProfile
    cluster: Cluster
    nodes: tuple[ClusterNode, ...]
    wishes: Constraints
    workload: Workload
    dtype: str
    formats: tuple[str, ...]
    stages: range
    lossless: bool = False
    at: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @functools.cached_property
    def codecs(self) -> tuple[str, ...]:
        """That hidden states may travel in: raw, what loses nothing, what rounds as bfloat16 does; others where a wish names them."""
        known = [name for name in self.figures("latency") if name in codec_names()]
        fine = [name for name in known if get_codec(name).lossless or (get_codec(name).default and not self.lossless)]
        named = {name for codecs in self.wishes.link_codecs.values() for name in codecs}
        return tuple(dict.fromkeys(["raw", *fine, *sorted(named & set(known))]))

    def figures(self, goal: Goal) -> Mapping[str, CodecFigures]:
        """Codecs on hidden states of this element type. Ratios were measured on float32: what rounds to so many bits makes half of it of bfloat16, and casting to bfloat16
        nothing at all."""
        found = codec_figures(self.nodes, goal, self.machines)
        if self.dtype == "float32":
            return found
        return {
            name: figures if get_codec(name).lossless else replace(figures, ratio=max(1.0, figures.best_ratio / 2))
            for name, figures in found.items()
            if name in codec_names() and name not in _CASTS
        }

    @functools.cached_property
    def machines(self) -> tuple[Machine, ...]:
        return machines(self.cluster)

    def prefill(self, stages: int) -> Pass:
        """A chunk of a prompt, as nodes divide it for so many stages; of one of them the first token is wanted."""
        return Pass(chunk_of(self.workload.prompt_tokens, stages), 1, decode=False)

    def chunks(self, stages: int) -> int:
        return math.ceil(self.workload.prompt_tokens / self.prefill(stages).tokens)

    def decode(self, batch: int) -> Pass:
        return Pass(batch, batch, decode=True)

    @functools.cached_property
    def _slow(self) -> Floats:
        return np.array([1.0 / (1.0 - self.wishes.taken.get(name, (0.0, 0.0))[1]) for name in self.names])

    def costs(self, one: Pass, goal: Goal) -> Costs:
        """Seconds of a pass, with the figures for this goal (see `partitioner.constants`)."""
        n, length = len(self.nodes), len(self.model.vertices)
        vertices = np.full((n, len(self.formats), length), _NEVER_S)
        for i, node in enumerate(self.nodes):
            column = self.profile.on(node)
            for f, form in enumerate(self.formats):
                times = column.get(f"{self.dtype}/{form}")
                if times is not None:
                    seconds = self.profile.decode(times, one.tokens) if one.decode else self.profile.chunk(times, one.tokens)
                    vertices[i, f] = seconds * self._slow[i]
        spent = overheads(self.nodes, goal, self.machines, 12.0 * one.answers)
        rows = [spent.get(name, Overhead()) for name in self.names]
        stage, message, request = (
            np.array([getattr(row, what) for row in rows]) * self._slow for what in ("stage_s", "message_s", "request_s")
        )
        stage = stage + np.array([self._step_s(node) for node in self.nodes]) * self._slow
        crossing = one.tokens * self.model.hidden_size * DTYPES[self.dtype].itemsize
        back = float(_TOKEN_BYTES * one.answers)
        figures = self.figures(goal)
        send = np.array([[self._codec_s(figures, c, i, crossing, encode=True) for i in range(n)] for c in self.codecs]) + message
        take = np.array([[self._codec_s(figures, c, i, crossing, encode=False) for i in range(n)] for c in self.codecs]) + message
        wire = np.array([self._wire(crossing / figures[c].best_ratio, c, goal) for c in self.codecs])
        return Costs(vertices, stage, request, send, take, wire, message, message, self._wire(back, "", goal))

    def _step_s(self, node: ClusterNode) -> float:
        """What the engine spends on a pass besides its vertices."""
        column = self.profile.on(node)
        return min((column[f"{self.dtype}/{form}"].step_s for form in self.formats if f"{self.dtype}/{form}" in column), default=0.0)

    def _codec_s(self, figures: Mapping[str, CodecFigures], codec: str, node: int, size: float, encode: bool) -> float:
        one, name = figures[codec], self.names[node]
        return (one.encode_s(size, name) if encode else one.decode_s(size, name)) * float(self._slow[node])

    def _wire(self, size_bytes: float, codec: str, goal: Goal) -> Floats:
        """(N, N). `codec` "": whatever is permitted. For the pace of a link its latency does not count."""
        found = np.full((len(self.nodes), len(self.nodes)), np.inf)
        place = {name: i for i, name in enumerate(self.names)}
        for link in self.cluster.links:
            if link.source in place and link.target in place:
                permitted = self.wishes.link_codecs.get((link.source, link.target))
                if codec and codec not in (permitted if permitted is not None else self._unasked):
                    continue
                seconds = size_bytes / link.bandwidth_bytes_per_s + (link.latency_s if goal == "latency" else 0.0)
                found[place[link.source], place[link.target]] = seconds
        return found

    @functools.cached_property
    def _unasked(self) -> tuple[str, ...]:
        """Codecs for links of which no wish speaks."""
        return tuple(c for c in self.codecs if get_codec(c).lossless or (get_codec(c).default and not self.lossless))

    @property
    def counts(self) -> frozenset[int]:
        """How many stages there may be."""
        return frozenset(self.stages) if self.at is None else frozenset([len(self.at) + 1])

    def chain(self, latency: Costs, pace: Costs, stages: int | None = None) -> Chain:
        """`stages`: with so many only."""
        n = len(self.nodes)
        place = {name: i for i, name in enumerate(self.names)}
        firsts = frozenset([place[self.wishes.input_at]]) if self.wishes.input_at else frozenset(range(n))
        lasts = frozenset([place[self.wishes.output_at]]) if self.wishes.output_at else frozenset(range(n))
        return Chain(latency, pace, self.fits, firsts, lasts, self.counts if stages is None else frozenset([stages]))

    @functools.cached_property
    def fits(self) -> np.ndarray:
        """(N, F, L+1, L+1): measured there, within its memory, and as the wishes have it."""
        able = self.possible[:, None] & (self.memory[None] <= self.limits[:, None, None, None])
        measured = [[f"{self.dtype}/{form}" in self.profile.on(node) for form in self.formats] for node in self.nodes]
        found: np.ndarray = able & np.array(measured)[:, :, None, None]
        return found

    @functools.cached_property
    def limits(self) -> Floats:
        return np.array([max(0.0, (n.memory_bytes or math.inf) - self.wishes.taken.get(n.name, (0.0, 0.0))[0]) for n in self.nodes])

    @functools.cached_property
    def possible(self) -> np.ndarray:
        """(N, L+1, L+1): what is a stage, and allowed; memory aside."""
        length, n = len(self.model.vertices), len(self.nodes)
        found = np.broadcast_to(np.triu(np.ones((length + 1, length + 1), dtype=bool), 1), (n, length + 1, length + 1)).copy()
        allowed = allowed_operators(self.wishes, self.names, self.operators) if self._restricted else None
        if allowed is not None:
            barred = np.concatenate([np.zeros((n, 1)), np.cumsum(~allowed, axis=1)], axis=1)
            found &= barred[:, :, None] == barred[:, None, :]
        if self.at is not None:
            cuts = (0, *(matching(pattern, self.operators)[0] for pattern in self.at), length)
            if any(a >= b for a, b in itertools.pairwise(cuts)):
                raise BadInput("cuts must stand in the model's order, each once, and not before its first operator")
            spans = np.zeros_like(found)
            for k, (a, b) in enumerate(itertools.pairwise(cuts)):
                spans[k, a, b] = True
            found &= spans
        return found

    @property
    def _restricted(self) -> bool:
        return bool(self.wishes.pin or self.wishes.forbid_operators)

    @functools.cached_property
    def operators(self) -> tuple[Operator, ...]:
        names = self.model.vertices
        return tuple(Operator(name, name, i == 0, i == len(names) - 1, (i - 1,) if i else ()) for i, name in enumerate(names))

    @functools.cached_property
    def memory(self) -> Floats:
        """(F, L+1, L+1): bytes of a stage: weights, caches for all sessions, what a pass needs, and what arrives."""
        length = len(self.model.vertices)
        found = np.full((len(self.formats), length + 1, length + 1), np.inf)
        for f, form in enumerate(self.formats):
            for j in range(length):
                for i in range(j + 1, length + 1):
                    found[f, j, i] = self.stage_bytes(j, i, form)
        return found

    def stage_bytes(self, a: int, b: int, form: str) -> int:
        return stage_memory_bytes(
            self.model.param_bytes(a, b, form, self.dtype) + self.cache_bytes(a, b), self.activation_bytes(a, b), self.received_bytes(a)
        )

    @property
    def widest(self) -> int:
        """Tokens of the largest pass that memory is kept for."""
        return min(LONGEST_CHUNK, self.workload.context_length)

    def cache_bytes(self, a: int, b: int) -> int:
        return self.model.kv_bytes(a, b, self.dtype) * self.workload.context_length * self.workload.sessions

    def activation_bytes(self, a: int, b: int) -> int:
        return self.model.working_bytes(a, b, chunk=self.widest, batch=self.workload.sessions, dtype=self.dtype)

    def received_bytes(self, a: int) -> int:
        """What a chunk of a prompt brings to a stage that begins there."""
        return self.widest * (self.model.hidden_size * DTYPES[self.dtype].itemsize if a else 8)

    def busy(self, seconds: Mapping[str, float], bottleneck_s: float) -> tuple[float, str]:
        """The bottleneck when nodes share the cores of a machine, and which that is ("" : not one)."""
        worst = max(((m.seconds(seconds), str(m)) for m in self.machines), default=(0.0, ""))
        return worst if worst[0] > bottleneck_s else (bottleneck_s, "")
