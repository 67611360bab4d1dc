"""A decoder model as the planner sees it: a chain of embedding, layers, and head (with the final norm), each with its tensors and what they take in each format."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from partitioner.decoders.checkpoint import Checkpoint, open_checkpoint
from partitioner.structure import Structure, Vertex
from splitnet.decoder_architectures import EMBEDDING, HEAD, LAYERS, NORM, architecture, place_of
from splitnet.decoder_format import DecoderSpec, hidden_size_of, tied_in, vocabulary_of
from splitnet.decoder_weights import stored_bytes, stored_format
from splitnet.errors import BadModel
from splitnet.plan import OutputSpec
from splitnet.tensors import DTYPES, TensorSpec

__all__ = ["FORMATS", "GROUP_SIZE", "DecoderModel", "load_decoder"]

FORMATS = ("float32", "bfloat16", "int8", "int4")  #: of a stage's matrices, from fine to coarse
GROUP_SIZE = 64
_HEAD_MATRIX = "lm_head.weight"


@dataclass(frozen=True, eq=False)
class DecoderModel:
    """Vertices are in the model's order: EMBEDDING, "layers.0" ..., HEAD. `tensors`: canonical names by vertex; those of a head that is the embedding's matrix are
    without it. A span [a, b) is of vertices."""

    checkpoint: Checkpoint
    sha256: str
    tensors: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def vertices(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def layers(self) -> int:
        return len(self.tensors) - 2

    @property
    def hidden_size(self) -> int:
        return hidden_size_of(self.config)

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.config)

    @property
    def tied(self) -> bool:
        return tied_in(self.config)

    @property
    def longest_context(self) -> int:
        return int(self.config["max_position_embeddings"])

    @functools.cached_property
    def embedding_matrix(self) -> str:
        known = architecture(self.checkpoint.model_type)
        return known.base + known.embedding

    def groups(self, form: str, dtype: str) -> dict[str, str]:
        """The format of each group of matrices where the layers have `form`. Embedding and head are never coarser than 8 bits: they are
        looked up and compared row by row, and an error there is not averaged out by what follows."""
        ends = "int8" if form in ("int8", "int4") else dtype
        return {EMBEDDING: ends, LAYERS: form, HEAD: ends}

    def spec(self, a: int, b: int, *, form: str, dtype: str, context_length: int) -> DecoderSpec:
        """What the shard of a span holds. Raises BadShard for a context that is longer than the model's."""
        embedding, head = a == 0, b == len(self.tensors)
        first, last = max(a - 1, 0), min(b - 1, self.layers)
        there = {EMBEDDING: embedding, LAYERS: first < last, HEAD: head}
        weights = {group: one for group, one in self.groups(form, dtype).items() if there[group]}
        return DecoderSpec(
            config=self.config, first=first, last=last, embedding=embedding, head=head, dtype=dtype, weights=weights, context_length=context_length,
            group_size=GROUP_SIZE,
        )  # fmt: skip

    def stored(self, a: int, b: int, form: str, dtype: str) -> Iterator[tuple[str, str, str]]:
        """(name in the shard, name in the checkpoint, format) of every tensor of a span's shard."""
        groups = self.groups(form, dtype)
        for vertex in self.vertices[a:b]:
            group = vertex if vertex in (EMBEDDING, HEAD) else LAYERS
            for name in self.tensors[vertex]:
                yield name, name, self._format(name, groups[group], dtype)
            if vertex == HEAD and self.tied and a > 0:
                matrix = self.embedding_matrix
                yield _HEAD_MATRIX, matrix, self._format(matrix, groups[HEAD], dtype)

    def _format(self, name: str, wanted: str, dtype: str) -> str:
        return stored_format(name, self.checkpoint.shape(name), wanted, GROUP_SIZE, dtype)

    def param_bytes(self, a: int, b: int, form: str, dtype: str) -> int:
        """Of a span's shard."""
        before, both = self._bytes_before(form, dtype)
        return before[b] - before[a] - (both if a == 0 and b == len(self.tensors) else 0)

    @functools.cache  # noqa: B019 # a model lives as long as the command that plans it
    def _bytes_before(self, form: str, dtype: str) -> tuple[tuple[int, ...], int]:
        """(of the vertices before each position, of the matrix that a stage with both ends stores once)."""

        def size(source: str, one: str) -> int:
            return stored_bytes(self.checkpoint.shape(source), one, GROUP_SIZE)

        count = len(self.tensors)
        each = [sum(size(source, one) for _, source, one in self.stored(v, v + 1, form, dtype)) for v in range(count)]
        matrix = self.embedding_matrix
        both = size(matrix, self._format(matrix, self.groups(form, dtype)[HEAD], dtype)) if self.tied else 0
        return tuple(itertools.accumulate(each, initial=0)), both

    def kv_bytes(self, a: int, b: int, dtype: str) -> int:
        """What one token of one session takes in the caches of a span."""
        layers = max(0, min(b - 1, self.layers) - max(a - 1, 0))
        return layers * self._kv_bytes_per_layer(dtype)

    @functools.cache  # noqa: B019
    def _kv_bytes_per_layer(self, dtype: str) -> int:
        return self.spec(1, 2, form=dtype, dtype=dtype, context_length=1).kv_bytes_per_token

    def working_bytes(self, a: int, b: int, *, chunk: int, batch: int, dtype: str) -> int:
        """An estimate of what a pass needs besides weights and caches: hidden states and what attention and the feed-forward network make of them; at the head the
        scores of each session over the vocabulary."""
        config = self.config
        tokens = max(chunk, batch)
        wide = 6 * self.hidden_size + 3 * int(config.get("intermediate_size") or 4 * self.hidden_size)
        scores = 2 * 4 * batch * self.vocabulary if b == len(self.tensors) else 0
        return tokens * wide * DTYPES[dtype].itemsize * 2 + scores

    def structure(self, tokens: int, dtype: str) -> Structure:
        """The same noun as a captured model's, for passes of so many tokens; weights as they are stored."""
        hidden = tokens * self.hidden_size * DTYPES[dtype].itemsize
        ids = TensorSpec("input_ids", "int64", ("tokens",))
        vertices = [Vertex("input_ids", "input", (ids,), value_bytes=(8 * tokens,))]
        sizes = {n: p.stored.end - p.stored.begin for n, p in self.checkpoint.places.items()}
        for vertex in self.vertices:
            answers = vertex == HEAD
            spec = TensorSpec("tokens", "int32", ("tokens",)) if answers else TensorSpec(vertex, dtype, ("tokens", self.hidden_size))
            params = self.tensors[vertex] + ((self.embedding_matrix,) if answers and self.tied else ())
            vertices.append(
                Vertex(
                    vertex, f"decoder.{vertex.partition('.')[0]}", (spec,), (vertices[-1].values[0].name,), params, sum(sizes[p] for p in params),
                    (4 * tokens if answers else hidden,), self.working_bytes(1, 2, chunk=tokens, batch=1, dtype=dtype), scope=vertex,
                )
            )  # fmt: skip
        used = {p for v in vertices for p in v.params}
        return Structure(
            self.name, self.sha256, 1, tuple(vertices), (ids,), (OutputSpec("tokens", vertices[-1].values[0]),),
            {n: s for n, s in sizes.items() if n in used}, symbols={"tokens": tokens},
        )  # fmt: skip


def load_decoder(source: str, on_bytes: Callable[[int, int], None] | None = None) -> DecoderModel:
    """Of a directory or a repository of the hub; reads every weight once, to hash it, and holds none. Raises BadModel as `open_checkpoint`, and for a tensor that the
    architecture needs and that is missing, or has another shape."""
    checkpoint = open_checkpoint(source)
    expected = _expected(checkpoint.config)
    missing = sorted(set(expected) - set(checkpoint.places))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadModel(
            f"hf:{source}: tensor {missing[0]!r} is missing{more}; {checkpoint.model_type!r} with this config.json needs it",
            remedy="fetch the model again, or take the config.json that belongs to these weights",
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise BadModel(
                f"hf:{source}: tensor {name!r} has the shape {list(checkpoint.shape(name))}, the config says {list(shape)}",
                remedy="take the config.json that belongs to these weights",
            )
    layers = int(checkpoint.config["num_hidden_layers"])
    found: dict[str, list[str]] = {v: [] for v in (EMBEDDING, *(f"layers.{i}" for i in range(layers)), HEAD)}
    for name in expected:
        place = place_of(checkpoint.model_type, name)
        vertex = f"layers.{place.layer}" if place.part == LAYERS else HEAD if place.part == NORM else place.part
        found[vertex].append(name)
    return DecoderModel(checkpoint, checkpoint.hashed(on_bytes), {vertex: tuple(names) for vertex, names in found.items()})


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the tensors that transformers' model of this config has, experts one by one. Nothing is allocated."""
    import torch
    import transformers

    kind = architecture(config["model_type"])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            # the ids of special tokens decide nothing here; defaults of transformers may lie outside of a small vocabulary
            settings = {key: value for key, value in config.items() if key != "model_type"}
            read = getattr(transformers, kind.config_class)(**settings, pad_token_id=None, bos_token_id=None, eos_token_id=None)
            made = getattr(transformers, kind.model_class)(read)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
            raise BadModel(f"config.json makes no model: {type(error).__name__}: {str(error)[:300]}") from error
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in made.named_parameters():
        shape = tuple(tensor.shape)
        if (experts := re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)) is not None:
            count, rows, columns = shape
            for e in range(count):
                if experts[2] == "down_proj":
                    found[f"{experts[1]}.{e}.down_proj.weight"] = (rows, columns)
                else:
                    for part in ("gate_proj", "up_proj"):
                        found[f"{experts[1]}.{e}.{part}.weight"] = (rows // 2, columns)
        else:
            found[name] = shape
    if tied_in(config):
        found.pop(_HEAD_MATRIX, None)
    return found
