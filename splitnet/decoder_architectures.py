"""The decoder architectures that splitnet runs, and where each keeps its tensors. An explicit list: a node instantiates nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from splitnet.errors import BadModel

__all__ = [
    "ARCHITECTURES",
    "CONFIG_KEYS",
    "EMBEDDING",
    "HEAD",
    "LAYERS",
    "NORM",
    "Architecture",
    "TensorPlace",
    "architecture",
    "canonical_name",
    "place_of",
]

EMBEDDING, LAYERS, NORM, HEAD = "embedding", "layers", "norm", "head"


@dataclass(frozen=True, slots=True)
class Architecture:
    """`base`: the prefix of all but the head. `config_class`, `model_class`: transformers' names. `renamed`: patterns of names in checkpoints on disk, and what
    they become (the names of transformers' modules, experts one by one)."""

    config_class: str
    model_class: str
    base: str = "model."
    embedding: str = "embed_tokens.weight"
    norm: str = "norm."
    renamed: tuple[tuple[str, str], ...] = ()


_MIXTRAL = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)

#: By `model_type`. Each is tested against transformers' own generation.
ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt_neox": Architecture(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", "gpt_neox.", "embed_in.weight", "final_layer_norm.", ((r"^embed_out\.", "lm_head."),)
    ),
    "granite": Architecture("GraniteConfig", "GraniteForCausalLM"),
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Architecture("MistralConfig", "MistralForCausalLM"),
    "mixtral": Architecture("MixtralConfig", "MixtralForCausalLM", renamed=_MIXTRAL),
    "olmo2": Architecture("Olmo2Config", "Olmo2ForCausalLM"),
    "phi3": Architecture("Phi3Config", "Phi3ForCausalLM"),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "smollm3": Architecture("SmolLM3Config", "SmolLM3ForCausalLM"),
    "starcoder2": Architecture("Starcoder2Config", "Starcoder2ForCausalLM"),
}

#: What of a config.json decides the arithmetic. Nothing else reaches transformers: other keys may name code, kernels or files.
CONFIG_KEYS = frozenset({
    "attention_bias", "attention_multiplier", "attn_logit_softcapping", "decoder_sparse_step", "embedding_multiplier", "final_logit_softcapping",
    "head_dim", "hidden_act", "hidden_activation", "hidden_size", "intermediate_size", "layer_norm_eps", "layer_types", "logits_scaling",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "mlp_only_layers", "model_type", "moe_intermediate_size", "no_rope_layer_interval",
    "no_rope_layers", "norm_epsilon", "norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "original_max_position_embeddings", "partial_rotary_factor", "query_pre_attn_scalar",
    "residual_multiplier", "rms_norm_eps", "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct",
    "sliding_window", "sliding_window_pattern", "tie_word_embeddings", "use_bias", "use_bidirectional_attention", "use_parallel_residual",
    "use_sliding_window", "vocab_size",
})  # fmt: skip

#: In old checkpoints: what is computed from the config.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq\Z|\.attention\.(masked_)?bias\Z")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Which part of a model a tensor belongs to: EMBEDDING, LAYERS (then `layer` says which), NORM (the final one; it goes with the head) or HEAD."""

    part: str
    layer: int | None = None


def architecture(model_type: object) -> Architecture:
    """Raises BadModel, with the list, for one that is not supported."""
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise BadModel(
            f"architecture {model_type!r:.80} is not supported for generation; splitnet runs {', '.join(ARCHITECTURES)}",
            remedy="take a model of one of these, or deploy it without --generate, captured by torch.export",
        )
    return found


def canonical_name(model_type: str, name: str) -> str | None:
    """The name under which a shard holds the tensor that a checkpoint calls `name`; None for one that is not needed. Raises BadModel."""
    kind = architecture(model_type)
    for pattern, replacement in kind.renamed:
        name = re.sub(pattern, replacement, name)
    return None if _COMPUTED.search(name) else name


def place_of(model_type: str, name: str) -> TensorPlace:
    """Where a tensor of this canonical name belongs. Raises BadModel for a name that the architecture does not have."""
    kind = architecture(model_type)
    if name.startswith("lm_head."):
        return TensorPlace(HEAD)
    rest = name.removeprefix(kind.base)
    if rest != name:
        if rest == kind.embedding:
            return TensorPlace(EMBEDDING)
        if rest.startswith(kind.norm):
            return TensorPlace(NORM)
        if (layer := re.match(r"layers\.(\d{1,4})\.", rest)) is not None:
            return TensorPlace(LAYERS, int(layer[1]))
    raise BadModel(f"a model of architecture {model_type!r} has no tensor {name!r:.200}", remedy="is config.json that of these weights?")
