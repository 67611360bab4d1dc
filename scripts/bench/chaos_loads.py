"""What runs while nodes are lost: a model of tensors and one that generates text, their plans, and clients that compare every answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import partitioner
import splitnet
from partitioner.decoders.measuring import measure_decoder
from partitioner.decoders.model import load_decoder
from partitioner.decoders.planning import plan_decoder
from partitioner.decoders.writing import cut_decoder
from splitnet.cluster import Cluster
from splitnet.errors import SplitnetError
from splitnet.plan import NodeRef, Plan

__all__ = ["Load", "Served", "serve_tensors", "serve_text"]

TIMEOUT_S = 600.0
_TOKENS, _CONTEXT = 64, 96


@dataclass
class Load:
    """What the clients of one deployment saw. `times`: of each answer when it was asked for and when it was there; of text: of each token when the one before it (or the
    request) was, and when it was."""

    answered: int = 0
    tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    different: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)

    def recovery_s(self, lost_s: float) -> float | None:
        """Requests: from the loss to the first answer to one that was asked after it (answers whose way was past the lost node would flatter). Text: the longest that anybody
        waited for a token from the loss on."""
        if self.tokens:
            pauses = [came_s - max(asked_s, lost_s) for asked_s, came_s in self.times if came_s > lost_s]
            return max(pauses) if pauses else None
        after = [came_s for asked_s, came_s in self.times if asked_s >= lost_s]
        return min(after) - lost_s if after else None


@dataclass(frozen=True)
class Served:
    name: str
    plan: Plan
    shards: dict[str, splitnet.shard.Shard]
    client: Callable[[str, Load, int], Coroutine[Any, Any, None]]


def with_nodes(plan: Plan, cluster: Cluster, *, standbys: bool) -> Plan:
    """Three stages on the first three nodes; each stage's standbys are the last node, which serves none, and another."""
    nodes = tuple(NodeRef(node.name, node.address) for node in cluster.nodes)
    names = [node.name for node in nodes]
    stages = tuple(
        dataclasses.replace(stage, node=names[i], replicas=tuple(n for n in (names[-1], *names) if n != names[i])[:2] if standbys else ())
        for i, stage in enumerate(plan.stages)
    )
    return dataclasses.replace(plan, nodes=nodes, stages=stages)


def serve_tensors(cluster: Cluster, folder: Path, *, standbys: bool = True) -> Served:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(12):
        layers += [torch.nn.Linear(256, 256), torch.nn.Tanh()]
    module = torch.nn.Sequential(*layers).eval()
    captured = partitioner.capture(module, (torch.randn(2, 256),), name="chaos")
    plan = partitioner.plan(partitioner.profile(captured), cluster, objective="throughput", stages=3)
    shards = partitioner.cut(captured, plan, folder / "tensors")
    plan = with_nodes(plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), cluster, standbys=standbys)
    inputs = [{captured.structure.inputs[0].name: np.random.default_rng(i).standard_normal((8, 256)).astype(np.float32)} for i in range(16)]
    with torch.inference_mode():
        expected = [module(torch.from_numpy(next(iter(given.values())))).numpy() for given in inputs]

    async def client(address: str, load: Load, number: int) -> None:
        async with splitnet.AsyncClient(address, "tensors", timeout_s=TIMEOUT_S) as asking:
            turn = number
            while True:
                turn += 1
                i, asked_s = turn % len(inputs), time.time()
                try:
                    (answer,) = (await asking.infer(inputs[i], retry=True)).values()
                except SplitnetError as error:
                    load.failed[f"{type(error).__name__}: {error.message[:160]}"] += 1
                    await asyncio.sleep(0.05)
                    continue
                load.times.append((asked_s, time.time()))
                load.answered += 1
                load.different += not np.array_equal(answer, expected[i])

    return Served("tensors", plan, shards, client)


def serve_text(cluster: Cluster, folder: Path, *, standbys: bool = True) -> Served:
    """A Llama of three random layers. Half of the prompts are answered greedily, as transformers answers them with the whole model; the others are drawn, with a seed, as one node draws
    them that nobody disturbs."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=256,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(folder / "llama")
    model = load_decoder(str(folder / "llama"))
    work = partitioner.Workload(context_length=_CONTEXT, sessions=16, prompt_tokens=16, answer_tokens=_TOKENS, chunk_tokens=16)
    profile = measure_decoder(model, work, cluster=cluster, columns=("float32/float32",), budget_s=0.2)
    at, nodes = ["layers.1", "layers.3"], [node.name for node in cluster.nodes[:3]]
    plan = plan_decoder(
        model, profile, cluster, work, objective="tpot", weights=partitioner.Weights("float32"), at=at, nodes=nodes, lossless=True
    )
    shards = cut_decoder(model, plan, folder / "text")
    plan = with_nodes(plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), cluster, standbys=standbys)
    prompts = [np.random.default_rng(i).integers(0, 256, 4 + i).tolist() for i in range(16)]
    expected: dict[int, list[int]] = {}
    for i, prompt in list(enumerate(prompts))[::2]:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            out = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, do_sample=False, pad_token_id=0)
        expected[i] = out[0, len(prompt) :].tolist()

    async def client(address: str, load: Load, number: int) -> None:
        async with splitnet.AsyncClient(address, "text", timeout_s=TIMEOUT_S) as asking:
            turn = number
            while True:
                turn += 1
                i, before_s = turn % len(prompts), time.time()
                came: list[int] = []
                try:
                    stream = asking.generate(
                        prompts[i], _TOKENS, temperature=0.9 * (i % 2), repetition_penalty=1.1 if i % 2 else 1.0, seed=i, retry=True
                    )
                    while some := await stream.some():
                        load.times.append((before_s, before_s := time.time()))
                        load.tokens += len(some)
                        came += some
                except SplitnetError as error:
                    load.failed[f"{type(error).__name__}: {error.message[:160]}"] += 1
                    await asyncio.sleep(0.05)
                    continue
                load.answered += 1
                load.different += came != expected.setdefault(i, came)

    return Served("text", plan, shards, client)
