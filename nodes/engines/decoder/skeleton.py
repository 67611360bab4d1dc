"""A stage of a model as transformers' own modules: made on the meta device, which takes no memory, and filled with the stage's tensors only."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nodes.engines.decoder.attention import ATTENTION, register
from nodes.engines.decoder.experts import Experts, read_experts
from nodes.engines.decoder.linear import Dense, Int8, Matrix, read_matrix
from nodes.engines.decoder.loading import StoredTensors
from splitnet.decoder_architectures import architecture
from splitnet.decoder_format import DecoderSpec
from splitnet.errors import BadShard

__all__ = ["DTYPES", "Absent", "Embedding", "Skeleton", "fill", "make", "put"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Rotary variants whose frequencies depend on the length of what is computed at once: a piece of a sequence would get others than the whole.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Absent(nn.Module):
    """In the place of a layer of another stage: passes hidden states on."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class Embedding:
    """Rows by token. `scale`: of each row, where they are stored in 8 bits; `factor`: of all, as the architecture has it."""

    def __init__(self, rows: torch.Tensor, scale: torch.Tensor | None, factor: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.rows, self.scale, self.factor, self.dtype = rows, scale, factor, dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.rows[ids].to(self.dtype)
        if self.scale is not None:
            found *= self.scale[ids, None].to(self.dtype)
        return found if self.factor is None else found * self.factor

    def nbytes(self) -> int:
        return self.rows.nbytes + (self.scale.nbytes if self.scale is not None else 0)


class Skeleton:
    """`model`: the ...ForCausalLM. `base`: the part of it that holds the layers. `embedding`: of the first stage."""

    def __init__(self, spec: DecoderSpec, model: Any) -> None:
        self.spec = spec
        self.model = model
        self.base = model.get_submodule(architecture(spec.model_type).base.rstrip("."))
        self.dtype = DTYPES[spec.dtype]
        self.embedding: Embedding | None = None


def make(spec: DecoderSpec) -> Skeleton:
    """Without tensors. Raises BadShard where transformers refuses the config, or where it has a rotary variant that pieces of a sequence cannot be computed with."""
    transformers = importlib.import_module("transformers")
    strict = importlib.import_module("huggingface_hub.errors").StrictDataclassError  # of a field that is not what transformers expects
    kind = architecture(spec.model_type)
    settings = {key: value for key, value in spec.config.items() if key != "model_type"}
    try:
        # the ids of special tokens decide nothing here; defaults of transformers may lie outside of a small vocabulary
        config = getattr(transformers, kind.config_class)(
            **settings, pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False
        )
        config._attn_implementation = ATTENTION
        register()
        with torch.device("meta"):
            model = getattr(transformers, kind.model_class)(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ArithmeticError, strict) as error:
        raise BadShard(
            f"transformers does not take the config of this {spec.model_type} model: {error!s:.300}", remedy="cut the model again"
        ) from error
    _check_rotary(config, spec)
    skeleton = Skeleton(spec, model.eval().requires_grad_(False))
    for i in range(len(skeleton.base.layers)):
        if not spec.first <= i < spec.last:
            skeleton.base.layers[i] = Absent()
    if not spec.head:
        setattr(skeleton.base, kind.norm.rstrip("."), Absent())
        model.lm_head = Absent()
    if not spec.embedding and hasattr(skeleton.base, "embedding_multiplier"):
        skeleton.base.embedding_multiplier = 1.0  # Granite: done by the first stage
    return skeleton


def fill(skeleton: Skeleton, tensors: StoredTensors) -> int:
    """Reads every tensor of the stage, and returns their bytes. Raises BadShard for one that is missing, does not fit, or is not known."""
    spec, model, dtype = skeleton.spec, skeleton.model, skeleton.dtype
    kind = architecture(spec.model_type)
    total = 0
    table = kind.base + kind.embedding
    if spec.embedding:
        skeleton.embedding = _read_embedding(skeleton, tensors, table)
        total += skeleton.embedding.nbytes()
    put(model, table.removesuffix(".weight"), Absent())  # looked up by `Embedding`; a stage that has it as head only has it there
    for name, module in list(_leaves(model)):
        if isinstance(module, nn.Linear):
            shared = name == "lm_head" and spec.head_is_embedding
            matrix = _read_linear(module, name, tensors, spec, dtype, table if shared else None, skeleton.embedding)
            put(model, name, matrix)
            total += (0 if shared else matrix.nbytes()) + (matrix.bias.nbytes if matrix.bias is not None else 0)
        elif Experts.replaces(module):
            experts = read_experts(module, name, tensors, dtype, spec.group_size)
            put(model, name, experts)
            total += experts.nbytes()
        else:
            for own, meta in list(module.named_parameters(recurse=False)):
                tensor = tensors.read(f"{name}.{own}", tuple(meta.shape), (dtype, torch.float32, torch.bfloat16, torch.float16))
                setattr(module, own, nn.Parameter(tensor, requires_grad=False))
                total += tensor.nbytes
    _fill_computed(model)
    if rest := tensors.rest():
        raise BadShard(f"the shard holds tensor {rest[0]!r:.200}, which this stage does not have", remedy="cut the model again")
    return total


def _check_rotary(config: Any, spec: DecoderSpec) -> None:
    given = getattr(config, "rope_parameters", None) or {}
    for parameters in given.values() if given and all(isinstance(value, dict) for value in given.values()) else (given,):
        variant = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if variant in _LENGTH_DEPENDENT and (variant == "dynamic" or not original or spec.context_length > original):
            raise BadShard(
                f"rotary positions of type {variant!r} depend on the length of the whole sequence beyond {original or config.max_position_embeddings} tokens",
                remedy=f"plan with a context of at most {original} tokens" if original and variant != "dynamic" else "take another model",
            )


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own; within a module that is replaced as a whole, nothing."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _read_embedding(skeleton: Skeleton, tensors: StoredTensors, name: str) -> Embedding:
    spec = skeleton.spec
    shape = (spec.vocabulary, spec.hidden_size)
    original = skeleton.model.get_submodule(name.removesuffix(".weight"))
    factor = getattr(original, "scalar_embed_scale", None)  # Gemma
    scaled = None if factor is None else torch.tensor(factor).to(skeleton.dtype)
    if f"{name}.int8" in tensors:
        scale = tensors.read(f"{name}.scale", shape[:1], (torch.float32,))
        return Embedding(tensors.read(f"{name}.int8", shape, (torch.int8,)), scale, scaled, skeleton.dtype)
    stored = DTYPES.get(spec.weights["embedding"], skeleton.dtype)  # in 8 bits only where the kernels can take it
    return Embedding(tensors.read(name, shape, (stored,)), None, scaled, skeleton.dtype)


def _read_linear(
    module: nn.Linear,
    name: str,
    tensors: StoredTensors,
    spec: DecoderSpec,
    dtype: torch.dtype,
    shared: str | None,
    embedding: Embedding | None,
) -> Matrix:
    bias = tensors.read(f"{name}.bias", (module.out_features,), (dtype, torch.float32, torch.bfloat16)) if module.bias is not None else None
    if shared is not None and embedding is not None:
        return _as_matrix(embedding, bias)
    return read_matrix(tensors, [f"{name}.weight"], [(module.out_features, module.in_features)], dtype, spec.group_size, bias)


def _as_matrix(embedding: Embedding, bias: torch.Tensor | None) -> Matrix:
    """The same memory, as the head."""
    if embedding.scale is not None:
        return Int8(embedding.rows, embedding.scale, bias)
    return Dense(embedding.rows, bias)


def _fill_computed(model: Any) -> None:
    """Buffers that no checkpoint holds: rotary frequencies are computed from the config."""
    for name, module in list(model.named_modules()):
        buffers = [own for own, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if buffers:
            try:
                made = type(module)(model.config)
            except TypeError as error:
                raise BadShard(f"module {name!r} has buffers {buffers} that cannot be computed from the config: {error}") from error
            put(model, name, made)
    if meta := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise BadShard(f"tensor {meta[0]!r:.200} is missing in the shard's weights", remedy="cut the model again and deploy the new shard")
