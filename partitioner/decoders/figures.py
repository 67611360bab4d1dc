"""The profile of a decoder model: how long each vertex takes on each node, in each format, for a chunk of a prompt and for a step of decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partitioner.solvers.problem import Floats
from partitioner.structure import Structure
from splitnet.cluster import ClusterNode
from splitnet.documents import load_document, save_document
from splitnet.errors import BadModel
from splitnet.plan import Plan, StageSpec

__all__ = ["DECODER_PROFILE_VERSION", "DecoderProfile", "Times", "Workload"]

DECODER_PROFILE_VERSION = 1
_KIND = "decoder"


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model is measured and planned for: sessions of `context_length` tokens, `sessions` at once, prompts of `prompt_tokens`, answers of
    `answer_tokens`. Chunks of `chunk_tokens` are measured. Raises BadModel for what does not fit together."""

    context_length: int
    sessions: int
    prompt_tokens: int
    answer_tokens: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise BadModel(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.prompt_tokens + self.answer_tokens > self.context_length:
            raise BadModel(
                f"a prompt of {self.prompt_tokens} tokens and an answer of {self.answer_tokens} are more than the context of {self.context_length}",
                remedy="plan with a larger --context, or shorter --prompt-tokens and --answer-tokens",
            )

    @property
    def cached_tokens(self) -> int:
        """In the cache before a step, on average over a session of this workload: what a step is measured with."""
        return max(1, min(self.prompt_tokens + self.answer_tokens // 2, self.context_length - 1))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each vertex on one node, with matrices in one format: `prefill` for a chunk, `decode[k]` for a step of `batches[k]` sessions; and what
    each pass takes of a stage besides its vertices. `how` they were obtained."""

    prefill: tuple[float, ...]
    decode: tuple[tuple[float, ...], ...]
    step_s: float = 0.0
    how: str = ""

    def scaled(self, ratio: float, how: str) -> Times:
        return Times(
            tuple(s * ratio for s in self.prefill), tuple(tuple(s * ratio for s in row) for row in self.decode), self.step_s * ratio, how
        )


@dataclass(frozen=True)
class DecoderProfile:
    """`columns`: by node, then by "dtype/format" ("bfloat16/int4": computed in bfloat16, matrices in 4 bits). Raises BadModel where figures do not fit together."""

    structure: Structure
    chunk_tokens: int
    cached_tokens: int
    batches: tuple[int, ...]
    columns: Mapping[str, Mapping[str, Times]]
    reference_s: Mapping[str, float]  # by node: the reference kernel there, by which its figures are scaled to others
    version: int = DECODER_PROFILE_VERSION

    def __post_init__(self) -> None:
        count = len(self.structure.vertices) - 1
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] != 1:
            raise BadModel(f"the profile's batches must rise from 1, got {self.batches}")
        for node, column in self.columns.items():
            for form, times in column.items():
                where = f"the profile's figures of {form} on node {node!r}"
                if len(times.decode) != len(self.batches) or any(len(row) != count for row in (times.prefill, *times.decode)):
                    raise BadModel(f"{where}: expected {count} for a chunk and for each of the batches {self.batches}")
                if not all(math.isfinite(s) and s >= 0 for row in (times.prefill, *times.decode, (times.step_s,)) for s in row):
                    raise BadModel(f"{where}: a figure is negative or not finite")

    def on(self, node: ClusterNode) -> Mapping[str, Times]:
        """The node's own figures; where there are none, another's by the ratio of the reference kernel's times."""
        if node.name in self.columns:
            return self.columns[node.name]
        known = [name for name, seconds in self.reference_s.items() if seconds > 0 and name in self.columns]
        if not known or not node.reference_s:
            raise BadModel(
                f"the profile has no figures of node {node.name!r}, and none that could be scaled to it",
                remedy="profile the model with this cluster",
            )
        nearest = min(known, key=lambda name: abs(math.log(self.reference_s[name] / node.reference_s)))
        ratio = node.reference_s / self.reference_s[nearest]
        how = f"scaled by the reference kernel: {ratio:.3g}x of {nearest or 'this machine'!r}"
        return {form: times.scaled(ratio, how) for form, times in self.columns[nearest].items()}

    def stage_s(self, node: ClusterNode, plan: Plan, stage: StageSpec) -> float:
        """A step of one session through a plan's stage; 0 where its format was not measured there."""
        generation = plan.generation
        if generation is None:
            raise BadModel(f"the plan of {plan.model!r} generates nothing", remedy="take the profile that the plan was made from")
        times = self.on(node).get(f"{generation.dtype}/{generation.weights.get(stage.name, generation.dtype)}")
        if times is None:
            return 0.0
        place = {vertex.name: i for i, vertex in enumerate(self.structure.vertices[1:])}
        return times.step_s + math.fsum(times.decode[0][place[operator]] for operator in stage.operators)

    def slowed(self, nodes: Sequence[ClusterNode], factors: Mapping[str, float]) -> DecoderProfile:
        """With the figures of each of the nodes, times the node's factor where there is one."""
        columns = dict(self.columns)
        for node in nodes:
            factor, column = factors.get(node.name), self.on(node)
            if factor is not None:
                column = {form: times.scaled(factor, f"{times.how}; {factor:.2g}x as seen") for form, times in column.items()}
            columns[node.name] = column
        return dataclasses.replace(self, columns=columns)

    def chunk(self, times: Times, tokens: int) -> Floats:
        """Of a chunk of a prompt of so many tokens: on a straight line through a step of one token and the chunk that was measured."""
        one, whole = np.asarray(times.decode[0]), np.asarray(times.prefill)
        if self.chunk_tokens == 1:
            return np.asarray(whole * tokens)
        return np.asarray(np.maximum(one + (whole - one) * (tokens - 1) / (self.chunk_tokens - 1), 0.0))

    def decode(self, times: Times, batch: int) -> Floats:
        """Of a step of so many sessions: between measured batches on a straight line, and on with its slope."""
        rows = np.asarray(times.decode)
        if len(self.batches) == 1:
            return np.asarray(rows[0] * batch)  # pessimistic: nothing is known of what is shared
        k = min(int(np.searchsorted(self.batches, batch)), len(self.batches) - 1)
        k = max(k, 1)
        low, high = self.batches[k - 1], self.batches[k]
        return np.asarray(np.maximum(rows[k - 1] + (rows[k] - rows[k - 1]) * (batch - low) / (high - low), 0.0))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        document = {"kind": _KIND} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        document["structure"] = json.loads(self.structure.to_json())
        document["columns"] = {node: {form: dataclasses.asdict(t) for form, t in column.items()} for node, column in self.columns.items()}
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> DecoderProfile:
        """Raises BadModel where the document is not a decoder model's profile of this version."""
        try:
            document = json.loads(text)
            if document.get("kind") != _KIND:
                raise BadModel("this is no profile of a decoder model", remedy="make one with `splitnet profile MODEL --generate`")
            if document.get("version") != DECODER_PROFILE_VERSION:
                raise BadModel(
                    f"the profile has version {document.get('version')!r}, this splitnet reads version {DECODER_PROFILE_VERSION}",
                    remedy="profile the model again",
                )
            return cls(
                Structure.from_json(json.dumps(document["structure"])), int(document["chunk_tokens"]), int(document["cached_tokens"]),
                tuple(int(b) for b in document["batches"]),
                {
                    str(node): {
                        str(form): Times(
                            tuple(float(s) for s in times["prefill"]), tuple(tuple(float(s) for s in row) for row in times["decode"]),
                            float(times["step_s"]), str(times["how"]),
                        )
                        for form, times in column.items()
                    }
                    for node, column in document["columns"].items()
                },
                {str(node): float(seconds) for node, seconds in document["reference_s"].items()},
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadModel(f"not a profile: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        save_document(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> DecoderProfile:
        return load_document(path, cls.from_json, BadModel, what="the profile ", remedy="make one with `splitnet profile MODEL --generate`")
