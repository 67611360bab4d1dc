"""Tiny models with random weights, as shards of one stage or several; and what transformers generates with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from nodes.engines.decoder import Step
from nodes.engines.decoder.engine import DecoderEngine
from splitnet.decoder_architectures import architecture, canonical_name, place_of
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec, plain_config
from splitnet.decoder_weights import quantize, stored_format
from splitnet.shard import Shard, write_shard

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
#: One or more per architecture; what makes it special is switched on.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"model_type": "phi3", "sliding_window": 7, "partial_rotary_factor": 0.5},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
    "gpt_neox-serial": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 6, "use_bias": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 0, 1]},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "mlp_only_layers": [1]},
}  # fmt: skip


def build(settings: Mapping[str, Any]) -> Any:
    """A model of transformers with random weights, biases among them."""
    kind = architecture(settings["model_type"])
    small = {key: value for key, value in SMALL.items() if settings["model_type"] != "gpt_neox" or key != "num_key_value_heads"}
    config = getattr(transformers, kind.config_class)(**small | {key: value for key, value in settings.items() if key != "model_type"})
    torch.manual_seed(sum(map(ord, settings["model_type"])))
    model = getattr(transformers, kind.model_class)(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * (0.1 if name.endswith("weight") else 0.3))
        if settings["model_type"].startswith(("gemma", "olmo2")):
            model.get_input_embeddings().weight.mul_(0.1)  # every layer's share is normed: the model would only say what it was told
    return model


def save(model: Any, directory: Path) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint that transformers writes, by canonical name."""
    model.save_pretrained(directory)
    tensors: dict[str, np.ndarray] = {}
    from safetensors.numpy import load_file

    for file in sorted(directory.glob("*.safetensors")):
        for name, array in load_file(file).items():
            canonical = canonical_name(model.config.model_type, name)
            if canonical is not None:
                tensors[canonical] = array
    return tensors


def cut(
    model: Any,
    tensors: Mapping[str, np.ndarray],
    bounds: Sequence[int],
    directory: Path,
    *,
    dtype: str = "float32",
    form: str = "",
    context: int = 128,
) -> list[Shard]:
    """Stages between the bounds, `[2]` for two: layers [0, 2) and [2, 4)."""
    config = plain_config(model.config.to_dict())
    kind, layers, form = architecture(config["model_type"]), config["num_hidden_layers"], form or dtype
    edges = [0, *bounds, layers]
    shards = []
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        embedding, head = i == 0, last == layers and i == len(edges) - 2
        embedded = form if form == "int8" else dtype
        weights = {
            group: f
            for group, there, f in (("embedding", embedding, embedded), ("layers", first < last, form), ("head", head, form))
            if there
        }
        spec = DecoderSpec(config, first, last, embedding, head, dtype, weights, context, 32)
        stored: dict[str, np.ndarray] = {}
        table = kind.base + kind.embedding
        mine = dict(tensors)
        if spec.tied and head and not spec.head_is_embedding:
            mine["lm_head.weight"] = mine[table]
        for name, array in mine.items():
            place = place_of(config["model_type"], name)
            if spec.head_is_embedding and place.part == "head":
                continue
            there = {"embedding": embedding, "layers": place.layer is not None and first <= place.layer < last, "norm": head, "head": head}[
                place.part
            ]
            if there:
                wanted = weights.get(place.part, dtype)
                kept = wanted if place.part == "embedding" else stored_format(name, array.shape, wanted, 32, dtype)
                stored |= quantize(name, array, kept, 32)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(stored, directory / f"weights-{i}.safetensors")
        shards.append(
            write_shard(
                directory / f"stage{i}",
                model="tiny",
                model_sha256="0" * 64,
                stage=f"s{i}",
                engine="decoder",
                inputs=spec.inputs(),
                outputs=spec.outputs(),
                members={DECODER_MEMBER: spec.to_bytes(), "weights.safetensors": directory / f"weights-{i}.safetensors"},
                param_bytes=sum(array.nbytes for array in stored.values()),
                activation_bytes=0,
            )
        )
    return shards


def engines(shards: Sequence[Shard], cache_tokens: int = 512) -> list[DecoderEngine]:
    return [DecoderEngine.load(shard, threads=1, max_value_bytes=1 << 30, cache_tokens=cache_tokens) for shard in shards]


def run(stages: Sequence[DecoderEngine], steps: Sequence[Step]) -> np.ndarray:
    """One forward pass down the chain."""
    hidden: np.ndarray | None = None
    for stage in stages:
        hidden = stage.step(steps, hidden)
    assert hidden is not None
    return hidden


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def greedy(stages: Sequence[DecoderEngine], prompt: Sequence[int], count: int, session: int = 1, chunk: int = 1000) -> list[int]:
    """The prompt in pieces, then token by token."""
    position = 0
    while len(prompt) - position > chunk:
        assert len(run(stages, [Step(session, position, ids(*prompt[position : position + chunk]))])) == 0
        position += chunk
    tokens = [int(run(stages, [Step(session, position, ids(*prompt[position:]), 1)])[0])]
    while len(tokens) < count:
        tokens.append(int(run(stages, [Step(session, len(prompt) + len(tokens) - 1, ids(tokens[-1]), 1)])[0]))
    return tokens


def generated(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers generates."""
    found = model.generate(torch.tensor([list(prompt)]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [int(token) for token in found[0][len(prompt) :]]
