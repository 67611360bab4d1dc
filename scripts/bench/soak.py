"""Many clients that stream and leave as they like, for as long as you want: whose tokens they get, and what is left of them.

    python scripts/bench/soak.py --minutes 10

A Llama with random weights over three node processes. `--clients` stream at once, each one answer after another: prompts of a pool, greedy or drawn with a seed. Each token is held
against what the same prompt gave when nobody else was there (and, for greedy ones, against transformers' whole model). A third leave in the middle: at a random token, or by their
deadline. Every ten seconds the nodes' resident memory is read; "warm" is the largest of the warm-up, "end" the last, after everybody has left. In the end no session may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import plan_of
from transformers import LlamaConfig, LlamaForCausalLM

import splitnet
from partitioner.decoders.model import load_decoder
from partitioner.decoders.writing import cut_decoder
from partitioner.demo.boxes import running_nodes
from splitnet.cluster import Cluster, ClusterNode
from splitnet.errors import DeadlineExceeded, Overloaded, SplitnetError
from splitnet.plan import Plan

NAME, NODES, VOCABULARY = "soak", ("a", "b", "c"), 4096
POOL, LONGEST_PROMPT, LONGEST_ANSWER = 24, 60, 32
LOOK_S = 10.0
PATIENT_S = 900.0  # a machine that is busy with something else


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    temperature: float
    seed: int


@dataclass
class Tally:
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    failed: collections.Counter[str] = field(default_factory=collections.Counter)


def model_of(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=VOCABULARY,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def questions() -> list[Question]:
    rng = random.Random(1)
    system = [rng.randrange(VOCABULARY) for _ in range(40)]  # half of the prompts begin alike
    found = []
    for k in range(POOL):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, LONGEST_PROMPT - 40))]
        prompt = (*(system if k % 2 else ()), *own)
        found.append(Question(prompt, 0.0 if k % 3 else 0.8, k))
    return found


async def answers(plan: Plan, pool: list[Question]) -> list[list[int]]:
    """What each gives when nobody else is there."""
    async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
        found = []
        for one in pool:
            stream = client.generate(list(one.prompt), LONGEST_ANSWER, temperature=one.temperature, seed=one.seed, timeout_s=PATIENT_S)
            found.append([token async for token in stream])
        return found


def as_in_transformers(model: LlamaForCausalLM, one: Question, count: int) -> list[int]:
    ids = torch.tensor([list(one.prompt)])
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
    found: list[int] = made[0, len(one.prompt) :].tolist()
    return found


async def ask(plan: Plan, number: int, until_s: float, pool: list[Question], expected: list[list[int]], tally: Tally) -> None:
    """One client, with a connection of its own, again and again."""
    rng = random.Random(1000 + number)
    while time.monotonic() < until_s:
        async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
            for _ in range(20):
                if time.monotonic() >= until_s:
                    return
                k = rng.randrange(POOL)
                await one_answer(client, rng, pool[k], expected[k], tally)


async def one_answer(client: splitnet.AsyncClient, rng: random.Random, one: Question, expected: list[int], tally: Tally) -> None:
    count = rng.randrange(1, LONGEST_ANSWER + 1)
    leaves = rng.randrange(count) if rng.random() < 0.25 else None
    deadline_s = rng.uniform(0.05, 0.5) if rng.random() < 0.1 else PATIENT_S
    got: list[int] = []
    try:
        async with client.generate(
            list(one.prompt), count, temperature=one.temperature, seed=one.seed, timeout_s=deadline_s, retry=True
        ) as stream:
            async for token in stream:
                got.append(token)
                if leaves is not None and len(got) > leaves:
                    break
    except (DeadlineExceeded, Overloaded) as error:
        tally.counts["deadline" if isinstance(error, DeadlineExceeded) else "refused"] += 1
    except SplitnetError as error:
        tally.failed[f"{type(error).__name__}: {error.message[:100]}"] += 1
    else:
        tally.counts["left" if leaves is not None else "whole"] += 1
        if leaves is None and len(got) != count:
            tally.wrong.append(f"{len(got)} of {count} tokens")
    tally.counts["tokens"] += len(got)
    if got != expected[: len(got)]:
        tally.wrong.append(f"{got} instead of {expected[: len(got)]}")


async def watch(plan: Plan, began_s: float, seen: list[tuple[float, dict[str, int]]], tally: Tally) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        statuses = await splitnet.status_async(plan)
        if any(status.error for status in statuses):
            continue  # the next look
        memory = {status.name: status.process_memory_bytes for status in statuses}
        seen.append((time.monotonic() - began_s, memory))
        said = " ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(memory.items()))
        print(
            f"{seen[-1][0]:6.0f} s  MB {said}  {dict(tally.counts)} failed {sum(tally.failed.values())} wrong {len(tally.wrong)}",
            flush=True,
        )


async def soak(plan: Plan, pool: list[Question], expected: list[list[int]], clients: int, seconds: float, warm_s: float) -> bool:
    tally, seen, began_s = Tally(), list[tuple[float, dict[str, int]]](), time.monotonic()
    looking = asyncio.create_task(watch(plan, began_s, seen, tally))
    asking = [asyncio.create_task(ask(plan, k, began_s + seconds, pool, expected, tally)) for k in range(clients)]
    await asyncio.gather(*asking)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    await asyncio.sleep(2.0)
    statuses = await splitnet.status_async(plan)
    generating = next(d.generating for s in statuses for d in s.deployments if d.generating is not None)
    print(
        f"{clients} clients, {time.monotonic() - began_s:.0f} s: {dict(tally.counts)}; {len(tally.wrong)} wrong; failed: {dict(tally.failed)}"
    )
    print(
        f"left behind: {generating.sessions} sessions, {generating.cache_tokens - generating.free_tokens} slots promised, {generating.kept} kept for prompts that begin alike"
    )
    flat = True
    for status in sorted(statuses, key=lambda one: one.name):
        warm = [memory[status.name] for at_s, memory in seen if at_s <= warm_s]
        late = [memory[status.name] for _, memory in seen[-6:]]
        if not warm:
            continue
        growth = statistics.median(late) / max(warm) - 1
        flat &= growth <= 0.02
        print(
            f"node {status.name}: {max(warm) / 1e6:.1f} MB warm, {statistics.median(late) / 1e6:.1f} MB over the last minute ({growth:+.2%}), {status.process_memory_bytes / 1e6:.1f} MB when all had left"
        )
    for text in tally.wrong[:5]:
        print("wrong:", text)
    return not tally.wrong and not generating.sessions and flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm", type=float, default=1.0, help="minutes of it that warm up")
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, running_nodes(NODES, options=("--patience", "300")) as addresses:
        whole = model_of(Path(folder) / "model")
        model = load_decoder(str(Path(folder) / "model"))
        plan = plan_of(
            model, Cluster(tuple(ClusterNode(name, address) for name, address in addresses.items())), len(NODES), dtype="float32"
        )
        shards = cut_decoder(model, plan, Path(folder) / "shards")
        plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
        splitnet.deploy(plan, shards, name=NAME)
        pool = questions()
        expected = asyncio.run(answers(plan, pool))
        same = [as_in_transformers(whole, one, len(e)) == e for one, e in zip(pool, expected, strict=True) if not one.temperature]
        print(f"{sum(same)} of {len(same)} greedy answers are those of transformers' whole model", flush=True)
        fine = asyncio.run(soak(plan, pool, expected, given.clients, 60 * given.minutes, 60 * given.warm))
    sys.exit(0 if fine and all(same) else 1)


if __name__ == "__main__":
    main()
