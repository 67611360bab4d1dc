"""What generating over slow links costs: bytes per token and hop, many sessions against the round trip, guesses against the round trip, long prompts beside short answers.

    python scripts/bench/generation.py [bytes] [sessions] [split] [guesses] [draft] [stall] [prefixes]

Llamas with random weights, cut by hand into stages of equal layers on nodes of one thread each, whose links a relay delays (scripts/testbed). Every ratio is of two measurements in
one run. `sessions`: S sessions, where S is at least round trip / time per token of the slowest stage, with and without delay. `guesses`: one session on a text that repeats
itself (its own greedy text goes round in circles), against the same model sampling a text that does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import splitnet
from partitioner.decoders.model import DecoderModel, load_decoder
from partitioner.decoders.writing import cut_decoder
from splitnet.cluster import Cluster
from splitnet.generation_plan import Generation
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from testbed.bed import Testbed
from testbed.shaping import LinkShape
from testbed.spec import BedSpec, NodeSpec

CONTEXT, SESSIONS, VOCABULARY = 2048, 72, 4096
NAME = "bench"
_ROUND_TRIP_S = 0.04


def model_of(folder: Path, hidden: int, layers: int) -> DecoderModel:
    """Its layers do little to the embeddings, so that greedy text soon repeats itself."""
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, intermediate_size=4 * hidden,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.mul_(0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_decoder(str(folder))


def plan_of(model: DecoderModel, cluster: Cluster, stages: int, *, dtype: str = "bfloat16", codec: str = "raw") -> Plan:
    """Equal stretches of layers, one for each node."""
    names = [f"s{i}" for i in range(stages)]
    ends = [round(i * model.layers / stages) + 1 for i in range(stages + 1)]
    ends[0], ends[-1] = 0, len(model.vertices)
    ids, answer = TensorSpec("input_ids", "int64", ("tokens",)), TensorSpec("tokens", "int32", ("tokens",))
    hidden = TensorSpec("hidden_states", dtype, ("tokens", int(model.config["hidden_size"])))
    specs, kv = [], {}
    for i, name in enumerate(names):
        a, b = ends[i], ends[i + 1]
        spec = model.spec(a, b, form=dtype, dtype=dtype, context_length=CONTEXT)
        kv[name] = spec.kv_bytes_per_token
        specs.append(
            StageSpec(
                name,
                cluster.nodes[i].name,
                model.vertices[a:b],
                (hidden if i else ids,),
                (hidden if i < stages - 1 else answer,),
                model.param_bytes(a, b, dtype, dtype),
            )
        )
    tensors = ["input_ids", *["hidden_states"] * (stages - 1), "tokens"]
    between = [CLIENT, *names, CLIENT]
    transfers = tuple(
        Transfer(a, b, (tensor,), codec if tensor == "hidden_states" else "raw")
        for a, b, tensor in zip(between, between[1:], tensors, strict=False)
    )
    generation = Generation(CONTEXT, SESSIONS, model.vocabulary, kv, weights=dict.fromkeys(names, dtype), dtype=dtype)
    return Plan(
        model.name, model.sha256, "throughput", tuple(NodeRef(node.name, node.address) for node in cluster.nodes[:stages]), tuple(specs), transfers, (ids,),
        (OutputSpec("tokens", answer),), max_in_flight=SESSIONS, generation=generation,
    )  # fmt: skip


@contextlib.contextmanager
def served(model: DecoderModel, stages: int, **options: str) -> Iterator[tuple[Testbed, Plan]]:
    """On nodes without delay."""
    nodes = tuple(NodeSpec("abcdefgh"[i]) for i in range(stages))
    with tempfile.TemporaryDirectory() as folder, Testbed(BedSpec(nodes)) as bed:
        plan = plan_of(model, bed.cluster(), stages, **options)  # type: ignore[arg-type] # dtype and codec
        shards = cut_decoder(model, plan, folder)
        plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
        splitnet.deploy(plan, shards, name=NAME)
        yield bed, plan


def delay(bed: Testbed, round_trip_s: float) -> None:
    """Once round the ring of nodes takes so long."""
    bed.reshape(dataclasses.replace(bed.spec, default=LinkShape(latency_s=round_trip_s / len(bed.spec.nodes))))


@dataclasses.dataclass(frozen=True)
class Spoken:
    tokens: list[int]
    times: list[float]

    @property
    def per_token_s(self) -> float:
        """Without the first."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


async def speak(client: splitnet.AsyncClient, prompt: Sequence[int], count: int, **options: float) -> Spoken:
    tokens, times = [], [time.perf_counter()]
    async for token in client.generate(prompt, count, timeout_s=150, **options):  # type: ignore[arg-type]
        tokens.append(token)
        times.append(time.perf_counter())
    return Spoken(tokens, times)


def text(length: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    return found


async def throughput(address: str, sessions: int, count: int) -> float:
    """Tokens per second of all sessions together, while all of them speak."""
    async with splitnet.AsyncClient(address, NAME) as client:
        all_ = await asyncio.gather(*(speak(client, text(8, i), count, temperature=1.0, seed=i) for i in range(sessions)))
    start, end = max(each.times[1] for each in all_), min(each.times[-1] for each in all_)
    return sum(start < moment <= end for each in all_ for moment in each.times[1:]) / (end - start)


# ------------------------------------------------------------------------------------------------------------ measurements


async def raw_bytes(plan: Plan) -> int:
    """That links to b have carried, before the codec."""
    return sum(link.raw_bytes for node in await splitnet.status_async(plan) for link in node.links if link.target == "b")


async def measured_bytes(bed: Testbed, plan: Plan) -> tuple[dict[str, float], float]:
    """Bytes on each link beyond those of an idle moment, and raw bytes of hidden states, while one session decodes."""
    async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
        await speak(client, text(4, 0), 4)
        idle, started = bed.report()["carried_bytes"], time.perf_counter()
        await asyncio.sleep(2.0)
        raw = await raw_bytes(plan)
        before, rested = bed.report()["carried_bytes"], time.perf_counter()
        await speak(client, text(4, 1), 150, temperature=1.0, seed=1)
        after, ended = bed.report()["carried_bytes"], time.perf_counter()
        rest = (ended - rested) / (rested - started)
        return {link: after[link] - before[link] - rest * (before[link] - idle[link]) for link in after}, await raw_bytes(plan) - raw


def bytes_per_token(folder: Path) -> None:
    model = model_of(folder, 1024, 3)
    for dtype, codec, allowed in (("bfloat16", "raw", 2200), ("float32", "int8", 1200)):
        with served(model, 3, dtype=dtype, codec=codec) as (bed, plan):
            carried, raw = asyncio.run(measured_bytes(bed, plan))
            rows = raw / (1024 * (2 if dtype == "bfloat16" else 4))
            for link in ("a->b", "b->c", "c->a"):
                print(
                    f"hidden 1024 {dtype} codec {codec} {link}: {carried[link] / rows:.1f} bytes per token "
                    f"(of hidden states at most {allowed}; {rows:.0f} rows for 150 tokens and a prompt of 4)",
                    flush=True,
                )


def many_sessions(folder: Path) -> None:
    model = model_of(folder, 1024, 12)
    with served(model, 2) as (bed, plan):
        address = plan.ingress.address
        asyncio.run(throughput(address, 8, 20))
        delay(bed, _ROUND_TRIP_S)
        alone_s = 1 / asyncio.run(throughput(address, 1, 20))
        for sessions in (4, 12, 32):
            delay(bed, 0.0)
            asyncio.run(throughput(address, sessions, 8))  # the pipeline learns
            free = asyncio.run(throughput(address, sessions, 40))
            delay(bed, _ROUND_TRIP_S)
            asyncio.run(throughput(address, sessions, 8))
            far = asyncio.run(throughput(address, sessions, 40))
            least = alone_s * free
            print(
                f"{sessions} sessions: {free:.0f} tok/s without delay, {far:.0f} with 40 ms: {far / free:.2f}"
                f"   (a token alone takes {alone_s * 1e3:.1f} ms with delay: {least:.0f} sessions are needed; bound {min(1.0, sessions / least):.2f})",
                flush=True,
            )


def draft(folder: Path) -> None:
    """The small model is the large one without all but one of its layers, which do little: their greedy texts agree most of the time. The text is drawn, so that it hardly repeats itself."""
    model, (large, small) = model_of(folder / "large", 512, 8), (folder / "large", folder / "small")
    config = json.loads((large / "config.json").read_text()) | {"num_hidden_layers": 1}
    kept = {
        name: tensor for name, tensor in load_file(large / "model.safetensors").items() if ".layers." not in name or ".layers.0." in name
    }
    small.mkdir()
    save_file(kept, small / "model.safetensors")
    (small / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "layer_types"}))
    with served(model, 2) as (bed, plan), tempfile.TemporaryDirectory() as shards:
        guessing = plan_of(load_decoder(str(small)), bed.cluster(), 1)
        splitnet.deploy(guessing, cut_decoder(load_decoder(str(small)), guessing, shards), name="small")
        with tempfile.TemporaryDirectory() as again:
            splitnet.deploy(plan.with_draft("small"), cut_decoder(model, plan, again), name="drafted")

        async def run(name: str) -> Spoken:
            async with splitnet.AsyncClient(plan.ingress.address, name) as client:
                await speak(client, text(40, 2), 20, temperature=1.0, seed=1)
                return await speak(client, text(40, 3), 80, temperature=1.0, seed=3)

        for round_trip_s in (0.0, 0.1):
            delay(bed, round_trip_s)
            plain, drafted = asyncio.run(run(NAME)), asyncio.run(run("drafted"))
            print(
                f"one session, round trip {round_trip_s * 1e3:.0f} ms: {1 / plain.per_token_s:.1f} tok/s plain, {1 / drafted.per_token_s:.1f} with a small model: "
                f"{plain.per_token_s / drafted.per_token_s:.2f}x; the same tokens: {plain.tokens == drafted.tokens}",
                flush=True,
            )


def split(folder: Path) -> None:
    """Nodes of one thread each, whose stages one session has work in turn: against one node of one thread. 0.44 billion parameters."""
    model = big_model(folder)
    shapes = {"loopback": LinkShape(), "100 Mbit/s, 5 ms": LinkShape(12.5e6, 0.005), "20 Mbit/s, 40 ms": LinkShape(2.5e6, 0.04)}

    async def run(address: str, rounds: int, count: int) -> tuple[float, float]:
        async with splitnet.AsyncClient(address, NAME) as client:
            await speak(client, text(64, 99), 4)
            said = [await speak(client, text(512, seed), count, temperature=1.0, seed=seed) for seed in range(rounds)]
        return statistics.median(each.times[1] - each.times[0] for each in said), statistics.median(each.per_token_s for each in said)

    with served(model, 1) as (_, plan):
        first_s, token_s = asyncio.run(run(plan.ingress.address, 3, 40))
    print(f"whole, one thread: prefill of 512 {first_s:.2f} s, {1 / token_s:.2f} tok/s", flush=True)
    with served(model, 2) as (bed, plan):
        for name, shape in shapes.items():
            bed.reshape(dataclasses.replace(bed.spec, default=shape))
            first, token = asyncio.run(run(plan.ingress.address, 3, 40 if name == "loopback" else 3))
            print(
                f"two nodes, {name}: prefill {first:.2f} s, {first_s / first:.2f}x"
                + (f"; decode {token_s / token:.3f} of the whole" if name == "loopback" else ""),
                flush=True,
            )


def big_model(folder: Path) -> DecoderModel:
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8, intermediate_size=4096, vocab_size=32000,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return load_decoder(str(folder))


def guesses(folder: Path) -> None:
    model = model_of(folder, 512, 4)
    with served(model, 2) as (bed, plan):

        async def run() -> tuple[Spoken, Spoken]:
            async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
                plain = await speak(client, text(40, 3), 60, temperature=1.0, seed=3)
                said = await speak(client, text(4, 3), 300)
                return plain, await speak(client, [*text(4, 3), *said.tokens], 200)

        for round_trip_s in (0.0, 0.1):
            delay(bed, round_trip_s)
            plain, repeating = asyncio.run(run())
            ratio = plain.per_token_s / repeating.per_token_s
            print(
                f"one session, round trip {round_trip_s * 1e3:.0f} ms: {1 / plain.per_token_s:.1f} tok/s plain, {1 / repeating.per_token_s:.1f} on text that repeats: {ratio:.2f}x",
                flush=True,
            )


def stall(folder: Path) -> None:
    model = model_of(folder, 512, 8)
    with served(model, 2) as (_, plan):

        async def run() -> None:
            async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
                await speak(client, text(8, 0), 20)
                speaking = [asyncio.create_task(speak(client, text(8, i), 250, temperature=1.0, seed=i)) for i in range(4)]
                await asyncio.sleep(1.0)
                started = time.perf_counter()
                long = await speak(client, text(1500, 9), 2)
                ended = time.perf_counter()
                others = await asyncio.gather(*speaking)
            gaps = [
                (b - a, started < a < ended)
                for each in others
                for a, b in zip(each.times[1:], each.times[2:], strict=False)
                if a < ended or b < ended
            ]
            beside = [gap for gap, while_ in gaps if while_]
            alone = statistics.median(gap for gap, while_ in gaps if not while_)
            print(
                f"a prompt of 1500 takes {long.times[1] - long.times[0]:.2f} s; four sessions meanwhile: {alone * 1e3:.1f} ms between tokens before it, "
                f"{statistics.median(beside) * 1e3:.1f} ms beside it, at most {max(beside) * 1e3:.1f} ms",
                flush=True,
            )

        asyncio.run(run())


def prefixes(folder: Path) -> None:
    model = model_of(folder, 512, 8)
    with served(model, 2) as (_, plan):

        async def run() -> None:
            system = text(1000, 5)
            async with splitnet.AsyncClient(plan.ingress.address, NAME) as client:
                await speak(client, text(8, 0), 20)
                first = await speak(client, [*system, 1], 2)
                again = await speak(client, [*system, 2], 2)
            print(
                f"first token of a prompt of 1001: {(first.times[1] - first.times[0]) * 1e3:.0f} ms, where 1000 are known {(again.times[1] - again.times[0]) * 1e3:.0f} ms",
                flush=True,
            )

        asyncio.run(run())


MEASUREMENTS = {
    "bytes": bytes_per_token,
    "sessions": many_sessions,
    "split": split,
    "guesses": guesses,
    "draft": draft,
    "stall": stall,
    "prefixes": prefixes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[*MEASUREMENTS, []], help="all, unless some are named")
    torch.set_num_threads(1)
    for name in parser.parse_args().what or MEASUREMENTS:
        with tempfile.TemporaryDirectory() as folder:
            MEASUREMENTS[name](Path(folder))


if __name__ == "__main__":
    main()
