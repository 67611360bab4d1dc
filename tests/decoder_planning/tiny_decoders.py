"""Tiny decoder models on disk, as `save_pretrained` writes them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers

from partitioner.decoders.figures import Workload
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.decoder_architectures import ARCHITECTURES

WORKLOAD = Workload(context_length=64, sessions=4, prompt_tokens=32, answer_tokens=8, chunk_tokens=16)

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 128, "head_dim": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save_tiny(folder: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    kind = ARCHITECTURES[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, kind.config_class)(**(SIZES | sizes))
    transformers.logging.disable_progress_bar()
    getattr(transformers, kind.model_class)(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def cluster_of(memory: dict[str, int], bytes_per_s: float = 1e8, latency_s: float = 1e-3) -> Cluster:
    nodes = tuple(
        ClusterNode(name, f"127.0.0.1:{i + 1}", memory_bytes=size, reference_s=1.0) for i, (name, size) in enumerate(memory.items())
    )
    return Cluster(nodes, tuple(Link(a, b, bytes_per_s, latency_s) for a, b in itertools.permutations(memory, 2)))
