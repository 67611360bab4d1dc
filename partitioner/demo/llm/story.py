"""The demo of a language model, told from its training to its text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import splitnet
from partitioner.bandwidth import probe
from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.measuring import columns_for, measure_decoder
from partitioner.decoders.model import DecoderModel, load_decoder
from partitioner.decoders.planning import plan_decoder
from partitioner.decoders.weights import Weights
from partitioner.decoders.writing import cut_decoder
from partitioner.demo.boxes import running_nodes
from partitioner.demo.llm.training import Progress, Recipe, trained_model
from splitnet.cluster import Cluster
from splitnet.errors import NoPlan
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.plan import Plan

__all__ = ["PROMPTS", "LlmReport", "Say", "Text", "Writing", "run"]

Say = Callable[[str], None]
PROMPTS = ("The function returns", "If the file does not exist,", "A class is")
_NODES = ("a", "b", "c")
_WEIGHTS = "float32"  # so that every token is the whole model's
_TIGHTNESS = (1.05, 1.1, 1.2, 1.35, 1.5)  # of a third of the model: the memory of each node


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt, continued. `ttft_s`: from the request to the first token, at the client; `tokens_per_s`: of those after it."""

    prompt: str
    text: str
    tokens: int
    ttft_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class LlmReport:
    """`weights_bytes` and `cache_bytes`: by node, of the split model; `whole_*`: of the whole one, alone on a node. `bytes_per_token`: what was sent for each token
    that was computed, by hop, payload. The two equalities are of greedy texts, token for token."""

    parameters: int
    stages: int
    texts: tuple[Text, ...]
    whole: tuple[Text, ...]
    bytes_per_token: dict[str, float]
    weights_bytes: dict[str, int]
    cache_bytes: dict[str, int]
    whole_weights_bytes: int
    whole_cache_bytes: int
    equal_to_one_node: bool
    equal_to_transformers: bool

    @property
    def ok(self) -> bool:
        return self.equal_to_one_node and self.equal_to_transformers

    def to_json(self) -> dict[str, object]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Writing:
    """How texts are written. `temperature` 0: the most likely token, always."""

    prompts: Sequence[str] = PROMPTS
    tokens: int = 96
    temperature: float = 0.5
    seed: int = 1


def run(recipe: Recipe, writing: Writing, folder: Path, say: Say, write: Say, *, cache: Path | None = None) -> LlmReport:
    """`say` takes lines, `write` pieces of text as they come. Raises the system's own errors."""
    started = time.monotonic()
    say("Training a small Llama on the documentation that this Python brings along, unless it is trained already")
    directory = trained_model(recipe, cache, _Bar(say))
    say(f"  {directory}  {time.monotonic() - started:.0f} s")
    model, tokenizer = load_decoder(str(directory)), TextTokenizer(directory)
    say("Starting three node servers on this machine, one thread each")
    with running_nodes(_NODES) as addresses:
        cluster = probe(list(addresses.values()))
        work = _workload(recipe, tokenizer, writing)
        say("Measuring its layers on the nodes")
        measured = measure_decoder(model, work, cluster=cluster, columns=columns_for(_WEIGHTS), budget_s=1.0)
        small = _small(model, measured, cluster, work)
        say(f"Nobody is to hold more than {_mb(small.nodes[0].memory_bytes)} MB of it, so that it takes all three")
        split = _serve(model, measured, small, work, folder, "story", len(_NODES))
        say(split.explain())
        before = _sent(cluster)
        say("")
        texts = tuple(_write(split, "story", tokenizer, writing, prompt, write) for prompt in writing.prompts)
        computed = sum(text.tokens for text in texts) + sum(len(tokenizer.encode(text.prompt)) for text in texts)
        sent = {hop: (total - before.get(hop, 0)) / computed for hop, total in _sent(cluster).items() if total > before.get(hop, 0)}
        ids = tokenizer.encode(writing.prompts[0])
        greedy = _greedy(split, "story", ids, writing.tokens)
        splitnet.undeploy(split, "story")
        whole = _serve(model, measured, replace(cluster, nodes=cluster.nodes[:1], links=()), work, folder, "whole", 1)
        texts_of_whole = tuple(_write(whole, "whole", tokenizer, writing, prompt, lambda _: None) for prompt in writing.prompts)
        greedy_of_whole = _greedy(whole, "whole", ids, writing.tokens)
        splitnet.undeploy(whole, "whole")
    report = LlmReport(
        sum(_elements(model)), len(split.stages), texts, texts_of_whole, sent, _weights(split), _caches(split), sum(_weights(whole).values()),
        sum(_caches(whole).values()), greedy == greedy_of_whole, _as_in_transformers(directory, ids, greedy),
    )  # fmt: skip
    _tell(report, say)
    return report


def _workload(recipe: Recipe, tokenizer: TextTokenizer, writing: Writing) -> Workload:
    longest = max(len(tokenizer.encode(prompt)) for prompt in writing.prompts)
    return Workload(recipe.context, 2, longest, min(writing.tokens, recipe.context - longest), max(1, longest))


def _small(model: DecoderModel, measured: DecoderProfile, cluster: Cluster, work: Workload) -> Cluster:
    """The cluster as if its nodes were so small that each must take about its third of the model."""
    prediction = _plan(model, measured, cluster, work, len(_NODES)).prediction
    assert prediction is not None
    third = sum(prediction.memory_bytes.values()) / len(_NODES)
    for factor in _TIGHTNESS:
        nodes = tuple(replace(node, memory_bytes=round(third * factor)) for node in cluster.nodes)
        try:
            _plan(model, measured, replace(cluster, nodes=nodes), work, len(_NODES))
        except NoPlan:  # layers cannot be divided as finely
            continue
        return replace(cluster, nodes=nodes)
    return cluster


def _plan(model: DecoderModel, measured: DecoderProfile, cluster: Cluster, work: Workload, stages: int) -> Plan:
    return plan_decoder(model, measured, cluster, work, objective="tpot", weights=Weights(_WEIGHTS), stages=stages, lossless=True)


def _serve(model: DecoderModel, measured: DecoderProfile, cluster: Cluster, work: Workload, folder: Path, name: str, stages: int) -> Plan:
    plan = _plan(model, measured, cluster, work, stages)
    shards = cut_decoder(model, plan, folder / name)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    splitnet.deploy(plan, shards, name=name)
    return plan


def _write(plan: Plan, name: str, tokenizer: TextTokenizer, writing: Writing, prompt: str, write: Say) -> Text:
    ids = tokenizer.encode(prompt)
    stream, parts, times = tokenizer.stream(ids), [], []
    write(prompt)
    with splitnet.Client(plan.ingress.address, deployment=name) as client:
        client.connect()
        started = time.perf_counter()
        for token in client.generate(ids, writing.tokens, temperature=writing.temperature, top_p=0.95, seed=writing.seed):
            times.append(time.perf_counter() - started)
            parts.append(stream.add(token))
            write(parts[-1])
    parts.append(stream.end())
    write(parts[-1] + "\n\n")
    pace = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return Text(prompt, "".join(parts), len(times), times[0], pace)


def _greedy(plan: Plan, name: str, ids: Sequence[int], tokens: int) -> list[int]:
    with splitnet.Client(plan.ingress.address, deployment=name) as client:
        return list(client.generate(ids, tokens))


def _as_in_transformers(directory: Path, ids: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether transformers' own `generate` of the whole model writes the same."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([list(ids)])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(tokens), do_sample=False, pad_token_id=0)
    return bool(made[0, len(ids) :].tolist() == list(tokens))


def _sent(cluster: Cluster) -> dict[str, int]:
    return {f"{node.name}->{link.target}": link.sent_bytes for node in splitnet.status(cluster) for link in node.links}


def _weights(plan: Plan) -> dict[str, int]:
    return {stage.node: stage.param_bytes for stage in plan.stages}


def _caches(plan: Plan) -> dict[str, int]:
    assert plan.generation is not None
    return {stage.node: plan.generation.cache_bytes(stage.name) for stage in plan.stages}


def _elements(model: DecoderModel) -> list[int]:
    """Values of each tensor."""
    sizes = []
    for name in {name for names in model.tensors.values() for name in names}:
        count = 1
        for size in model.checkpoint.shape(name):
            count *= size
        sizes.append(count)
    return sizes


def _tell(report: LlmReport, say: Say) -> None:
    say(f"{'':24}{'split over ' + str(report.stages):>16}{'whole on one':>16}")
    for what, field, scale in (("first token, ms", "ttft_s", 1e3), ("tokens per second", "tokens_per_s", 1.0)):
        split, whole = (statistics.median(getattr(text, field) * scale for text in texts) for texts in (report.texts, report.whole))
        say(f"{what:24}{split:16.1f}{whole:16.1f}")
    for node, weights in report.weights_bytes.items():
        say(f"{'memory of node ' + node:24}{_mb(weights) + ' + ' + _mb(report.cache_bytes[node]):>16}")
    say(
        f"{'memory, whole model':24}{'':16}{_mb(report.whole_weights_bytes) + ' + ' + _mb(report.whole_cache_bytes):>16}   (MB, weights + cache)"
    )
    for hop, size in report.bytes_per_token.items():
        say(f"{'bytes per token ' + hop:24}{size:16.0f}")
    say(f"greedy text equal, token for token: one node {_yes(report.equal_to_one_node)}, transformers {_yes(report.equal_to_transformers)}")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


class _Bar:
    """Training, told every tenth part."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._started = time.monotonic()

    def __call__(self, done: Progress) -> None:
        if done.step == done.steps or done.step % max(1, done.steps // 10) == 0:
            self._say(f"  step {done.step:4} of {done.steps}, {done.loss:.2f} nats per token, {time.monotonic() - self._started:.0f} s")
