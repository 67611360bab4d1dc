"""A language model of a few integers: an engine of the real interface, so exact that any mistake in positions, forks or the order of passes gives other tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from nodes.admission import Admission
from nodes.deployment import Deployment, Stage, routes
from nodes.engines.decoder.sampling import next_token
from nodes.engines.decoder.steps import Sampling, Step
from nodes.testing import LocalCluster
from splitnet.errors import BadInput, EngineFailure, Overloaded
from splitnet.generation_plan import Generation
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

__all__ = ["NAME", "SmallEngine", "SmallModel", "serve"]

NAME = "small"
_WIDTH = 4
_PRIME = 8388593  # fits float32 exactly


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """`order` 0: the next token hangs on all before it; 1: on the last one only, so that the text soon repeats itself. A pass of n tokens takes `pass_s` and `token_s` for each of
    them on every stage."""

    stages: int = 3
    vocabulary: int = 61
    order: int = 0
    eos: int | None = None
    pass_s: float = 0.0
    token_s: float = 0.0

    def engines(self, cache_tokens: int = 1 << 20) -> list[SmallEngine]:
        return [SmallEngine(self, index, cache_tokens) for index in range(self.stages)]

    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling | None = None) -> list[int]:
        """What the whole model says, one token after another, without any of what is tested."""
        engines, tokens, position = self.engines(), list(prompt), 0
        for _ in range(count):
            hidden: Any = None
            for engine in engines:
                hidden = engine.compute([Step(1, position, np.array(tokens[position:], np.int32), 1, sampling)], hidden)
            position = len(tokens)
            tokens.append(int(hidden[0]))
            if tokens[-1] == self.eos:
                break
        return tokens[len(prompt) :]


class SmallEngine:
    """Each stage keeps a running figure for every position of every session: the caches."""

    name: ClassVar[str] = "small"

    def __init__(self, model: SmallModel, index: int, cache_tokens: int) -> None:
        self.model = model
        self.last = index == model.stages - 1
        self.cache_tokens = cache_tokens
        self.passes: list[int] = []  # tokens of each
        self.trouble: EngineFailure | None = None  # raised once
        self._salt = 7919 * (index + 1)
        self._figures: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._sampling: dict[int, Sampling] = {}

    @classmethod
    def load(cls, shard: object, *, threads: int, max_value_bytes: int, cache_tokens: int) -> Self:
        raise NotImplementedError("made by hand")

    def step(self, steps: Sequence[Step], hidden: np.ndarray | None) -> np.ndarray:
        rows = sum(len(step.tokens) for step in steps)
        self.passes.append(rows)
        if self.model.pass_s or self.model.token_s:
            time.sleep(self.model.pass_s + self.model.token_s * rows)
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        return self.compute(steps, hidden)

    def compute(self, steps: Sequence[Step], hidden: np.ndarray | None) -> np.ndarray:
        self._check(steps)
        out: list[int] = []
        row = 0
        for step in steps:
            figures = self._figures.setdefault(step.session, [])
            tokens = self._tokens.setdefault(step.session, [])
            del figures[step.position :], tokens[step.position :]
            self._sampling[step.session] = step.sampling or self._sampling.get(step.session, Sampling())
            for offset, token in enumerate(step.tokens.tolist()):
                came = token + 1 if hidden is None else int(hidden[row, 0])
                before = figures[-1] if figures and not self.model.order else self._salt
                figures.append((before * 31 + came * 2654435 + self._salt) % _PRIME)
                tokens.append(token)
                row += 1
                if not self.last:
                    out.append(figures[-1])
                elif offset >= len(step.tokens) - step.wanted:
                    out.append(self._next(figures[-1], step.session))
        if self.last:
            return np.array(out, np.int32)
        found = np.zeros((len(out), _WIDTH), np.float32)
        found[:, 0] = out
        return found

    def _next(self, figure: int, session: int) -> int:
        scores = np.random.Generator(np.random.Philox(key=[figure, 1])).normal(size=self.model.vocabulary).astype(np.float32)
        tokens = self._tokens[session]
        return next_token(scores, self._sampling[session], np.array(tokens, np.int32), len(tokens))

    def _check(self, steps: Sequence[Step]) -> None:
        if len({step.session for step in steps}) != len(steps):
            raise BadInput("two steps of one session")
        more = 0
        for step in steps:
            held = len(self._figures.get(step.session, ()))
            if step.position > held:
                raise BadInput(f"position {step.position} of session {step.session}, which holds {held}")
            more += step.position + len(step.tokens) - held
        if more > self.free_tokens():
            raise Overloaded(f"{more} slots are needed, {self.free_tokens()} are free")

    def fork(self, source: int, target: int, tokens: int) -> None:
        if tokens > len(self._figures.get(source, ())):
            raise BadInput(f"session {source} holds fewer than {tokens}")
        self._figures[target] = self._figures[source][:tokens]
        self._tokens[target] = self._tokens[source][:tokens]

    def close(self, session: int) -> None:
        for kept in (self._figures, self._tokens, self._sampling):
            kept.pop(session, None)

    def memory_bytes(self) -> int:
        return 0

    def cache_bytes(self) -> int:
        return 0

    @property
    def used_tokens(self) -> int:
        return sum(map(len, self._figures.values()))

    def free_tokens(self) -> int:
        return self.cache_tokens - self.used_tokens


def small_plan(model: SmallModel, nodes: Sequence[NodeRef], context: int, sessions: int, max_in_flight: int, draft: str = "") -> Plan:
    ids = TensorSpec("input_ids", "int64", ("tokens",))
    hidden = TensorSpec("hidden_states", "float32", ("tokens", _WIDTH))
    answer = TensorSpec("tokens", "int32", ("tokens",))
    names = [f"stage{i}" for i in range(model.stages)]
    stages = tuple(
        StageSpec(name, nodes[i % len(nodes)].name, (), (ids if i == 0 else hidden,), (answer if i == model.stages - 1 else hidden,))
        for i, name in enumerate(names)
    )
    ends = [CLIENT, *names, CLIENT]
    tensors = ["input_ids", *["hidden_states"] * (model.stages - 1), "tokens"]
    transfers = tuple(Transfer(a, b, (tensor,)) for a, b, tensor in zip(ends, ends[1:], tensors, strict=False))
    generation = Generation(
        context, sessions, model.vocabulary, dict.fromkeys(names, 8), eos_token_ids=() if model.eos is None else (model.eos,), draft=draft
    )
    return Plan(
        NAME, "0" * 64, "throughput", tuple(nodes), stages, transfers, (ids,), (OutputSpec("tokens", answer),),
        max_in_flight=max_in_flight, generation=generation,
    )  # fmt: skip


def serve(
    cluster: LocalCluster,
    model: SmallModel,
    *,
    context: int = 512,
    sessions: int = 8,
    max_in_flight: int = 64,
    name: str = NAME,
    draft: str = "",
) -> list[SmallEngine]:
    """Serves the model on the nodes of a cluster in this process, one stage each in turn, without shards; its engines."""
    nodes = [NodeRef(each, address) for each, address in cluster.addresses.items()]
    plan = small_plan(model, nodes, context, sessions, max_in_flight, draft)
    engines = model.engines(plan.generation.cache_tokens if plan.generation else 0)

    async def add(node: NodeRef) -> None:
        stages = {
            spec.name: Stage(spec, engine, "", {t.name: t for t in spec.inputs}, routes(plan, spec.name), 0)  # type: ignore[arg-type]
            for spec, engine in zip(plan.stages, engines, strict=True)
            if spec.node == node.name
        }
        if stages:
            cluster.server(node.name).serve_directly(Deployment(name, plan, plan.sha256, node, stages, Admission(max_in_flight)))

    for node in nodes:
        cluster._loop.run(add(node))
    return engines
