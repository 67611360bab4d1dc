"""A forward pass of our own for the family of Llama: few, fused operations, nothing made that one row does not need.

Equal to transformers' modules within rounding, and tested against them. What is saved over them: the time that small operations take to be called (about half of a token's time on
a small model), matrices that share their input are one, and a single row takes the matrix-vector kernels (`linear.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nodes.engines.decoder.attention import Pass, Segment, attend
from nodes.engines.decoder.linear import Matrix, read_matrix
from nodes.engines.decoder.loading import StoredTensors
from nodes.engines.decoder.skeleton import Absent, Skeleton, put

__all__ = ["Lean", "is_lean", "take_layers"]

#: Architectures whose layers are these: norm, attention, add, norm, gated MLP, add.
_FAMILY = frozenset({"granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"})
_sdpa = torch.nn.functional.scaled_dot_product_attention
_silu = torch.nn.functional.silu


@dataclass(eq=False, slots=True)
class _Layer:
    """`module`: transformers' layer, whose norms (and experts) are used. `rotary`: whether positions enter (SmolLM3 leaves them out here and there)."""

    module: Any
    joined: Matrix  #: queries, keys and values
    out: Matrix
    gate_up: Matrix | None  #: None: the MLP is the module's own, a mixture of experts
    down: Matrix | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    rotary: bool
    residual: float
    eps: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    input_norm: torch.Tensor | None = None
    output_norm: torch.Tensor | None = None


def is_lean(model_type: str) -> bool:
    """Whether `Lean` computes this architecture."""
    return model_type in _FAMILY


def take_layers(skeleton: Skeleton, tensors: StoredTensors) -> tuple[list[_Layer], int]:
    """Reads the matrices of the stage's layers, joined; leaves nothing in their places. Returns them with their bytes. To be called before `fill`, which
    reads the rest; raises BadShard as that does."""
    spec, layers, total = skeleton.spec, [], 0
    for i in range(spec.first, spec.last):
        module = skeleton.base.layers[i]
        name = f"model.layers.{i}"
        attention = module.self_attn
        joined = _joined(
            attention,
            f"{name}.self_attn",
            ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else ("qkv_proj",),
            skeleton,
            tensors,
        )
        out = _joined(attention, f"{name}.self_attn", ("o_proj",), skeleton, tensors)
        dense = hasattr(module.mlp, "down_proj")
        gate_up = down = None
        if dense:
            parts = ("gate_proj", "up_proj") if hasattr(module.mlp, "gate_proj") else ("gate_up_proj",)
            gate_up = _joined(module.mlp, f"{name}.mlp", parts, skeleton, tensors)
            down = _joined(module.mlp, f"{name}.mlp", ("down_proj",), skeleton, tensors)
        total += sum(
            matrix.nbytes() + (matrix.bias.nbytes if matrix.bias is not None else 0)
            for matrix in (joined, out, gate_up, down)
            if matrix is not None
        )
        config = skeleton.model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sliding = (
            getattr(attention, "sliding_window", None) if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", None)
        )
        layers.append(
            _Layer(
                module,
                joined,
                out,
                gate_up,
                down,
                heads,
                kv_heads,
                attention.head_dim,
                float(attention.scaling),
                int(sliding or 0),
                bool(getattr(attention, "use_rope", True)),
                float(getattr(module, "residual_multiplier", 1.0)),
                float(config.rms_norm_eps),
            )
        )
    return layers, total


class Lean:
    """`forward` as in `Forward`. `layers`: what `take_layers` gave, once `fill` has read the rest."""

    def __init__(self, skeleton: Skeleton, layers: list[_Layer]) -> None:
        self._model = skeleton.model
        self._base = skeleton.base
        self._layers = layers
        for layer in layers:
            module = layer.module
            layer.input_norm, layer.output_norm = module.input_layernorm.weight, module.post_attention_layernorm.weight
            if (norm := getattr(module.self_attn, "q_norm", None)) is not None:
                layer.query_norm, layer.key_norm = norm.weight, module.self_attn.k_norm.weight
        config = skeleton.model.config
        self._eps = float(config.rms_norm_eps)
        self._activation = None if config.hidden_act == "silu" else self._activation_of(layers)
        self._multiplier = float(getattr(skeleton.base, "embedding_multiplier", 1.0))
        self._logits_scaling = float(getattr(config, "logits_scaling", 1.0)) if config.model_type == "granite" else 1.0
        self._like = torch.empty(0, dtype=skeleton.dtype)

    def forward(self, hidden: torch.Tensor, current: Pass, wanted: torch.Tensor | None) -> torch.Tensor:
        """[rows, hidden size] -> the same, or scores [wanted, vocabulary]."""
        cosine, sine = self._angles(current.positions())
        x = hidden if self._multiplier == 1.0 else hidden * self._multiplier
        if len(x) == 1:
            return self._scores(self._one(x, current.segments[0], cosine, sine), wanted)
        for i, layer in enumerate(self._layers):
            x = self._add(x, self._attention(i, layer, _norm(x, layer.input_norm, layer.eps), current, cosine, sine), layer)
            x = self._add(x, self._mlp(layer, _norm(x, layer.output_norm, layer.eps)), layer)
        return self._scores(x, wanted)

    def _scores(self, x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        if wanted is None:
            return x
        if not len(wanted):
            return x[:0]
        chosen = x if len(wanted) == len(x) else x[wanted]
        scores: torch.Tensor = self._model.lm_head(_norm(chosen, self._base.norm.weight, self._eps))
        return scores if self._logits_scaling == 1.0 else scores / self._logits_scaling

    def _one(self, x: torch.Tensor, segment: Segment, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """The layers for one row, which is most of what a node does: the views of the cache are made at once, positions are turned in place, a key and its value are
        stored together, and attention needs no mask."""
        whole, end = segment.session.whole, segment.position + 1
        places = whole[:, :, :, segment.position].unbind()
        seen: dict[int, tuple[torch.Tensor, ...]] = {}
        for i, layer in enumerate(self._layers):
            heads, size, turned = layer.heads, layer.head_dim, layer.heads + layer.kv_heads
            joined = layer.joined(_norm_row(x, layer.input_norm, layer.eps)).view(-1, size)
            if layer.query_norm is not None:
                joined[:heads] = _norm(joined[:heads], layer.query_norm, layer.eps)
                joined[heads:turned] = _norm(joined[heads:turned], layer.key_norm, layer.eps)
            if layer.rotary:
                both = joined[:turned, : cosine.shape[-1]]
                rolled = both.roll(cosine.shape[-1] // 2, -1)
                both.mul_(cosine[0]).addcmul_(rolled, sine[0])
            places[i].copy_(joined[heads:].view(2, layer.kv_heads, size))
            low = max(end - layer.window, 0) if layer.window else 0
            if low not in seen:
                seen[low] = whole[:, :, None, :, low:end].flatten(0, 1).unbind()
            keys, values = seen[low][2 * i], seen[low][2 * i + 1]
            found = _sdpa(joined[:heads].view(1, layer.kv_heads, -1, size), keys, values, scale=layer.scale)
            x = self._add(x, layer.out(found.reshape(1, -1)), layer)
            x = self._add(x, self._mlp(layer, _norm_row(x, layer.output_norm, layer.eps)), layer)
        return x

    @staticmethod
    def _add(x: torch.Tensor, more: torch.Tensor, layer: _Layer) -> torch.Tensor:
        return x + more if layer.residual == 1.0 else torch.add(x, more, alpha=layer.residual)

    def _attention(
        self, index: int, layer: _Layer, x: torch.Tensor, current: Pass, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        rows, size = len(x), layer.head_dim
        turned = layer.heads + layer.kv_heads
        joined = layer.joined(x).view(rows, -1, size)
        both = joined[:, :turned]
        if layer.query_norm is not None:
            both = torch.cat(
                (
                    _norm(both[:, : layer.heads], layer.query_norm, layer.eps),
                    _norm(both[:, layer.heads :], layer.key_norm, layer.eps),
                ),
                dim=1,
            )
        if layer.rotary:
            both = _turn(both, cosine, sine)
        both = both.transpose(0, 1)
        found = attend(
            current, index, both[: layer.heads], both[layer.heads :], joined[:, turned:].transpose(0, 1), layer.scale, layer.window
        )
        answer: torch.Tensor = layer.out(found.view(rows, -1))
        return answer

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        if layer.gate_up is None or layer.down is None:
            found: torch.Tensor = layer.module.mlp(x[None])[0]
            return found
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        answer: torch.Tensor = layer.down((_silu(gate) if self._activation is None else self._activation(gate)).mul_(up))
        return answer

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, 1, rotary size] each, cosine and signed sine, by transformers' own rotary module."""
        cosine, sine = self._base.rotary_emb(self._like, positions[None])
        half = sine.shape[-1] // 2
        sine[..., :half].neg_()
        return cosine[0][:, None], sine[0][:, None]

    @staticmethod
    def _activation_of(layers: list[_Layer]) -> Any:
        """Of the layers' MLPs; those of experts are called by their own module."""
        mlp = layers[0].module.mlp if layers else None
        return getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Over the last axis, in float32, rounded as transformers rounds: before the weight."""
    assert weight is not None  # set once the stage's tensors are read
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype).mul_(weight)


def _norm_row(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same for one row [1, size], by a number instead of a matrix of one: three operations instead of eight."""
    assert weight is not None  # as above
    length = float(torch.linalg.vector_norm(x, dtype=torch.float32))
    return (x * (1 / math.sqrt(length * length / x.shape[1] + eps))).mul_(weight)


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x [rows, heads, size] by tables [rows, 1, rotary size], of which the sine has its first half negated."""
    rotary = cosine.shape[-1]
    if rotary == x.shape[-1]:
        return torch.addcmul(x * cosine, x.roll(rotary // 2, -1), sine)
    part = x[..., :rotary]
    return torch.cat((torch.addcmul(part * cosine, part.roll(rotary // 2, -1), sine), x[..., rotary:]), dim=-1)


def _joined(parent: nn.Module, name: str, parts: tuple[str, ...], skeleton: Skeleton, tensors: StoredTensors) -> Matrix:
    modules = [parent.get_submodule(part) for part in parts]
    dtype, shapes = skeleton.dtype, []
    biases = []
    for part, module in zip(parts, modules, strict=True):
        assert isinstance(module, nn.Linear)  # transformers' modules of the family
        shapes.append((module.out_features, module.in_features))
        if module.bias is not None:
            biases.append(tensors.read(f"{name}.{part}.bias", (module.out_features,), (dtype, torch.float32, torch.bfloat16)))
        put(parent, part, Absent())
    bias = torch.cat(biases) if biases else None
    return read_matrix(tensors, [f"{name}.{part}.weight" for part in parts], shapes, dtype, skeleton.spec.group_size, bias)
