"""A real Llama, as small as it can be, divided over real nodes as a user would have it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import splitnet
from nodes.testing import LocalCluster
from partitioner.decoders.model import load_decoder
from partitioner.decoders.writing import cut_decoder
from splitnet.generation_plan import Generation
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

__all__ = ["Served", "deploy_tiny_llama"]

_HIDDEN, _LAYERS, _VOCABULARY = 32, 3, 64


@dataclass(frozen=True)
class Served:
    model: LlamaForCausalLM
    plan: Plan
    name: str
    folder: Path

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def address(self) -> str:
        return self.plan.ingress.address

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """By transformers, the whole model."""
        with torch.inference_mode():
            ids = torch.tensor([prompt])  # with a mask, or the token that pads would be taken for padding
            whole = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found


def deploy_tiny_llama(cluster: LocalCluster, folder: Path, *, name: str = "llama", context: int = 128, sessions: int = 8) -> Served:
    """One layer on each node."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=_HIDDEN, num_hidden_layers=_LAYERS, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=_VOCABULARY,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(folder / "model")
    model = load_decoder(str(folder / "model"))
    ids, answer = TensorSpec("input_ids", "int64", ("tokens",)), TensorSpec("tokens", "int32", ("tokens",))
    hidden = TensorSpec("hidden_states", "float32", ("tokens", _HIDDEN))
    names, ends = ["s0", "s1", "s2"], [0, 2, 3, 5]
    specs, kv = [], {}
    for i, stage in enumerate(names):
        a, b = ends[i], ends[i + 1]
        kv[stage] = model.spec(a, b, form="float32", dtype="float32", context_length=context).kv_bytes_per_token
        faces = ((hidden if i else ids,), (hidden if i < 2 else answer,))
        specs.append(StageSpec(stage, cluster.names[i], model.vertices[a:b], *faces, model.param_bytes(a, b, "float32", "float32")))
    tensors = ["input_ids", "hidden_states", "hidden_states", "tokens"]
    transfers = tuple(
        Transfer(*ends_, (tensor,)) for ends_, tensor in zip(zip(["", *names], [*names, CLIENT], strict=True), tensors, strict=True)
    )
    nodes = tuple(NodeRef(*each) for each in cluster.addresses.items())
    generation = Generation(context, sessions, _VOCABULARY, kv, weights=dict.fromkeys(names, "float32"), dtype="float32")
    plan = Plan(
        model.name, model.sha256, "tpot", nodes, tuple(specs), transfers, (ids,), (OutputSpec("tokens", answer),), max_in_flight=64, generation=generation,
    )  # fmt: skip
    shards = cut_decoder(model, plan, folder / "shards")
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    splitnet.deploy(plan, shards, name=name)
    return Served(whole, plan, name, folder)
