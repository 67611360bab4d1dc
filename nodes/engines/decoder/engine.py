"""The decoder engine: a stage of a language model, and the KV caches of its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, Self

import numpy as np
import torch

from nodes.engines.decoder.attention import Pass, Segment
from nodes.engines.decoder.cache import CacheShape, KVCache, Session
from nodes.engines.decoder.generic import Generic
from nodes.engines.decoder.lean import Lean, is_lean, take_layers
from nodes.engines.decoder.loading import StoredTensors
from nodes.engines.decoder.sampling import next_token
from nodes.engines.decoder.skeleton import DTYPES, Embedding, Skeleton, fill, make
from nodes.engines.decoder.steps import Step
from nodes.engines.torch_graph import to_array, to_tensor
from nodes.memory import give_back
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec
from splitnet.errors import BadInput, EngineFailure
from splitnet.shard import Shard
from splitnet.tensors import DTYPES as ARRAY_DTYPES

__all__ = ["DecoderEngine", "Forward"]


class Forward(Protocol):
    """How a stage computes, once rows are there."""

    def forward(self, hidden: torch.Tensor, current: Pass, wanted: torch.Tensor | None) -> torch.Tensor: ...


class DecoderEngine:
    """See `nodes.engines.decoder.base.StepEngine`."""

    name: ClassVar[str] = "decoder"

    def __init__(self, spec: DecoderSpec, forward: Forward, embedding: Embedding | None, cache: KVCache, weight_bytes: int) -> None:
        self.spec = spec
        self._forward = forward
        self._embedding = embedding
        self._cache = cache
        self._memory_bytes = weight_bytes
        self._array_dtype = ARRAY_DTYPES[spec.dtype]

    @classmethod
    def load(cls, shard: Shard, *, threads: int, max_value_bytes: int = 0, cache_tokens: int = 0, lean: bool = True) -> Self:
        """`lean=False`: by transformers' modules also where there is a faster way; the tests hold the two against each other."""
        torch.set_num_threads(threads)
        member = shard.member(DECODER_MEMBER)
        spec = DecoderSpec.from_bytes(member.read_bytes(), place=str(member))
        skeleton = make(spec)
        shape = CacheShape(spec.last - spec.first, *_heads(skeleton.model.config), DTYPES[spec.dtype])
        cache = KVCache(shape, cache_tokens, spec.context_length)
        forward, weight_bytes = _filled(skeleton, StoredTensors(shard.weights), lean and is_lean(spec.model_type))
        give_back()
        return cls(spec, forward, skeleton.embedding, cache, weight_bytes)

    def step(self, steps: Sequence[Step], hidden: np.ndarray | None) -> np.ndarray:
        sessions = self._admit(steps, hidden)
        segments, rows = [], 0
        for step, session in zip(steps, sessions, strict=True):
            count = len(step.tokens)
            self._cache.resize(session, step.position)  # what it holds from there on is about to be overwritten
            session.history[step.position : step.position + count] = step.tokens
            session.sampling = step.sampling or session.sampling
            segments.append(Segment(session, rows, rows + count, step.position))
            rows += count
        with torch.inference_mode():
            try:
                found = self._compute(steps, segments, hidden)
            except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError) as error:
                raise EngineFailure(f"the {self.spec.model_type} model failed on {rows} rows: {error!s:.300}") from error
        for segment in segments:
            self._cache.resize(segment.session, segment.position + segment.stop - segment.start)
        return found

    def fork(self, source: int, target: int, tokens: int) -> None:
        self._cache.fork(source, target, tokens)

    def close(self, session: int) -> None:
        self._cache.close(session)

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def cache_bytes(self) -> int:
        return self._cache.tokens * self._cache.shape.token_bytes

    def free_tokens(self) -> int:
        return self._cache.free

    def _admit(self, steps: Sequence[Step], hidden: np.ndarray | None) -> list[Session]:
        """The session of each step, new ones opened, once all steps are found good."""
        if not steps:
            raise BadInput("a forward pass needs at least one step")
        if len({step.session for step in steps}) != len(steps):
            raise BadInput("two steps of one session in one forward pass", remedy="join them to one step")
        growth = []
        for step in steps:
            held = self._cache.find(step.session)
            self._check(step, held.length if held is not None else 0)
            growth.append((held, step.position + len(step.tokens)))
        self._check_hidden(sum(len(step.tokens) for step in steps), hidden)
        self._cache.reserve(growth)
        return [held or self._cache.open(step.session) for step, (held, _) in zip(steps, growth, strict=True)]

    def _check(self, step: Step, length: int) -> None:
        at = f"session {step.session}"
        if step.tokens.ndim != 1 or not len(step.tokens) or not np.issubdtype(step.tokens.dtype, np.integer):
            raise BadInput(f"{at}: expected at least one token id, got {step.tokens.dtype} {step.tokens.shape}")
        if not 0 <= step.wanted <= len(step.tokens):
            raise BadInput(f"{at}: the next token is wanted at {step.wanted} of {len(step.tokens)} positions")
        low, high = int(step.tokens.min()), int(step.tokens.max())
        if low < 0 or high >= self.spec.vocabulary:
            raise BadInput(f"{at}: token id {low if low < 0 else high} is out of range: the vocabulary has {self.spec.vocabulary}")
        if not 0 <= step.position <= length:
            raise BadInput(
                f"{at}: position {step.position} is beyond what is in the cache: {length} tokens",
                remedy="compute the prompt again from position 0",
            )
        if step.position + len(step.tokens) > self._cache.capacity:
            what = "the model's context" if self._cache.capacity == self.spec.context_length else "the cache of this stage"
            raise BadInput(
                f"{at}: {step.position + len(step.tokens)} tokens are more than {what} holds: {self._cache.capacity}",
                remedy="send a shorter prompt, ask for fewer tokens, or plan with a larger --context",
            )

    def _check_hidden(self, rows: int, hidden: np.ndarray | None) -> None:
        if self._embedding is not None:
            if hidden is not None:
                raise BadInput("the first stage embeds token ids itself: it takes no hidden states")
            return
        expected = (rows, self.spec.hidden_size)
        if hidden is None or hidden.shape != expected or hidden.dtype != self._array_dtype:
            given = "none" if hidden is None else f"{hidden.dtype} {hidden.shape}"
            raise BadInput(f"hidden_states: expected {self._array_dtype} {expected}, got {given}")

    def _compute(self, steps: Sequence[Step], segments: Sequence[Segment], hidden: np.ndarray | None) -> np.ndarray:
        if self._embedding is not None:
            ids = np.concatenate([step.tokens for step in steps]).astype(np.int64)
            rows = self._embedding(torch.from_numpy(ids))
        else:
            assert hidden is not None  # checked
            rows = to_tensor(np.ascontiguousarray(hidden))
        current = Pass(segments, self.spec.first)
        if not self.spec.head:
            return to_array(self._forward.forward(rows, current, None))
        wanted = [row for step, segment in zip(steps, segments, strict=True) for row in range(segment.stop - step.wanted, segment.stop)]
        scores = self._forward.forward(rows, current, torch.tensor(wanted, dtype=torch.int64))
        return self._drawn(steps, segments, scores.float().numpy() if wanted else np.empty((0, 0), np.float32))

    def _drawn(self, steps: Sequence[Step], segments: Sequence[Segment], scores: np.ndarray) -> np.ndarray:
        tokens, row = np.empty(len(scores), np.int32), 0
        for step, segment in zip(steps, segments, strict=True):
            session = segment.session
            for i in range(len(step.tokens) - step.wanted, len(step.tokens)):
                position = step.position + i + 1
                tokens[row] = next_token(scores[row], session.sampling, session.history[:position], position)
                row += 1
        return tokens


def _filled(skeleton: Skeleton, tensors: StoredTensors, lean: bool) -> tuple[Forward, int]:
    with torch.inference_mode():
        if not lean:
            weight_bytes = fill(skeleton, tensors)
            return Generic(skeleton), weight_bytes
        layers, layer_bytes = take_layers(skeleton, tensors)
        weight_bytes = fill(skeleton, tensors)
        return Lean(skeleton, layers), layer_bytes + weight_bytes


def _heads(config: object) -> tuple[int, int]:
    """Heads of keys and values, and the size of one."""
    heads = int(config.num_attention_heads)  # type: ignore[attr-defined] # every config has it
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads  # type: ignore[attr-defined]
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)
