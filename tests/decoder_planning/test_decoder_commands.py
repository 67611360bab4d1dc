"""profile, plan, deploy, generate and bench of a decoder model on real nodes, through the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_decoders import save_tiny

from nodes.testing import LocalCluster
from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.figures_cache import TimesCache
from partitioner.decoders.model import DecoderModel, load_decoder
from partitioner.decoders.perplexity import measure_perplexity
from splitnet.cli import main
from splitnet.cluster import ClusterNode
from splitnet.decoder_weights import dequantize, quantize
from splitnet.plan import Plan

LIMITS = ["--context", "48", "--sessions", "2", "--prompt-tokens", "8", "--answer-tokens", "6", "--chunk-tokens", "8", "--budget", "0.1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a model, and cluster.toml of two nodes."""
    folder = tmp_path_factory.mktemp("commands")
    save_tiny(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch, LocalCluster(2) as cluster:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        cluster.cluster().save(folder / "cluster.toml")
        yield folder


@pytest.fixture(scope="module")
def profiled(place: Path) -> Path:
    path = place / "tiny.profile.json"
    arguments = ["profile", f"hf:{place / 'tiny'}", "--generate", "--cluster", str(place / "cluster.toml"), "--weights", "float32"]
    assert main([*arguments, *LIMITS, "-o", str(path)]) == 0
    return path


def test_what_was_measured_is_kept(place: Path, profiled: Path, llama: DecoderModel) -> None:
    kept = sorted((place / "cache" / "splitnet" / "profiles").iterdir())
    assert kept
    column = "float32/float32"
    times = DecoderProfile.load(profiled).columns["a"][column]
    cache, work = TimesCache(place / "kept"), Workload(48, 2, 8, 6, 8)
    node = ClusterNode("x", "h:1", processor="a chip", reference_s=0.5)
    cache.keep(llama, node, column, work, (1, 2), times)
    found = cache.find(llama, replace(node, name="y", reference_s=0.51), column, work, (1, 2))
    assert found is not None
    assert (found.prefill, found.decode, found.step_s) == (times.prefill, times.decode, times.step_s)
    assert "kept from" in found.how
    for other in (replace(node, processor="another"), replace(node, threads=2), replace(node, reference_s=1.0)):
        assert cache.find(llama, other, column, work, (1, 2)) is None
    assert cache.find(llama, node, "float32/int8", work, (1, 2)) is None
    assert TimesCache(place / "kept", refresh=True).find(llama, node, column, work, (1, 2)) is None
    for path in (place / "kept").iterdir():
        path.write_text("{")
    assert cache.find(llama, node, column, work, (1, 2)) is None


def plan(place: Path, profiled: Path, *more: str) -> list[str]:
    cluster = str(place / "cluster.toml")
    return [
        "plan",
        f"hf:{place / 'tiny'}",
        "--generate",
        "--cluster",
        cluster,
        "--profile",
        str(profiled),
        "-o",
        str(place / "plan.json"),
        *LIMITS,
        *more,
    ]


def test_from_a_directory_to_tokens(place: Path, profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(place, profiled, "--at", "layers.2", "--objective", "tpot", "--weights", "float32")) == 0
    out = capsys.readouterr().out
    assert "KV cache" in out
    assert "(TTFT)" in out
    written = Plan.load(place / "plan.json")
    assert [stage.operators for stage in written.stages] == [("embedding", "layers.0", "layers.1"), ("layers.2", "layers.3", "head")]
    assert main(["deploy", str(place / "plan.json")]) == 0
    try:
        capsys.readouterr()
        assert main(["run", str(place / "plan.json"), "x.npy"]) == 2
        assert "splitnet generate" in capsys.readouterr().err
        assert main(["generate", str(place / "plan.json"), "--ids", "5, 6,7", "--max-tokens", "10", "--ignore-eos", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["tokens"] == whole_answer(place, [5, 6, 7], 10)
        assert answer["prompt_tokens"] == 3
        assert main(["status", "--cluster", str(place / "cluster.toml")]) == 0
        assert "10 tokens in 1 answers" in capsys.readouterr().out
        assert main(["status", "--cluster", str(place / "cluster.toml"), "--json"]) == 0
        told = [d["generating"] for node in json.loads(capsys.readouterr().out) for d in node["deployments"]]
        assert (told[0]["new_tokens"], told[0]["answers"], told[1]) == (10, 1, None)  # the ingress knows
        assert told[0]["kv_bytes_per_token"] == sum(written.generation.kv_bytes_per_token.values()) if written.generation else False
        assert min(told[0][name] for name in ("ttft_s", "tpot_s", "tokens_per_s")) > 0
        assert main(["bench", str(place / "plan.json"), "--requests", "2", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["deployed_for_this"] is False
        assert min(report[name] for name in ("ttft_s", "tpot_s", "tokens_per_s")) > 0
        assert main(["bench", str(place / "plan.json"), "--requests", "2"]) == 0
        assert "measured/predicted" in capsys.readouterr().out
        assert main(["generate", str(place / "plan.json"), "--prompt", "a"]) == 2
        assert "tokenizer.json" in capsys.readouterr().err
    finally:
        assert main(["unload", "tiny", "--cluster", str(place / "cluster.toml")]) == 0


def test_stages_are_held_ready_with_room_for_their_caches(place: Path, profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(place, profiled, "--at", "layers.2", "--weights", "float32", "--replicas", "1")) == 0
    assert "held ready" in capsys.readouterr().out
    written = Plan.load(place / "plan.json")
    assert [(stage.node, stage.replicas) for stage in written.stages] == [("a", ("b",)), ("b", ("a",))]
    assert written.generation is not None
    assert written.prediction is not None
    caches = sum(map(written.generation.cache_bytes, ("stage0", "stage1")))
    assert min(written.prediction.memory_bytes.values()) >= caches + sum(stage.param_bytes for stage in written.stages)
    assert main(["deploy", str(place / "plan.json")]) == 0
    try:
        capsys.readouterr()
        assert main(["status", "--cluster", str(place / "cluster.toml"), "--json"]) == 0
        held = [s["standby"] for node in json.loads(capsys.readouterr().out) for d in node["deployments"] for s in d["stages"]]
        assert sorted(held) == [False, False, True, True]
    finally:
        assert main(["unload", "tiny", "--cluster", str(place / "cluster.toml")]) == 0


def test_a_plan_is_drawn_by_its_tokens(place: Path, profiled: Path) -> None:
    for objective, said in (
        ("tpot", "time per token of one session"),
        ("throughput", "time per token, pipeline full"),
        ("ttft", "time to the first token"),
    ):
        page = place / f"{objective}.html"
        assert main(plan(place, profiled, "--weights", "float32", "--objective", objective, "--stages", "2", "--draw", str(page))) == 0
        text = page.read_text()
        assert said in text
        assert "requests" not in text
        assert "layers.0" in text


def whole_answer(place: Path, ids: list[int], count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "tiny")
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0, len(ids) :]]


def test_perplexity_decides_which_formats_may_be_taken(place: Path, profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = place / "ids.json"
    data.write_text(json.dumps([int(i) for i in np.random.default_rng(0).integers(3, 96, 120)]))
    assert main(plan(place, profiled, "--data", str(data), "--max-accuracy-loss", "1%", "--json")) == 0
    document = json.loads(capsys.readouterr().out)["generation"]
    assert document["perplexity_of"] == "on 117 tokens of ids.json"
    assert document["weights"] == {"stage0": "float32"}
    assert document["perplexity"][""] == pytest.approx(perplexity(place, data, None), rel=1e-4)
    assert main(plan(place, profiled, "--max-accuracy-loss", "1%")) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_perplexity_of_weights_in_8_bits(place: Path, profiled: Path) -> None:
    data = place / "eight.json"
    data.write_text(json.dumps([int(i) for i in np.random.default_rng(1).integers(3, 96, 60)]))
    found, _ = measure_perplexity(load_decoder(str(place / "tiny")), data, ["int8"], context=32)
    assert found["int8"] == pytest.approx(perplexity(place, data, "int8", window=32), rel=1e-4)
    assert found["int8"] != found[""]


def perplexity(place: Path, data: Path, form: str | None, window: int = 48) -> float:
    """By a loop of one's own over windows of the text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place / "tiny").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if form and parameter.ndim == 2:
                array = parameter.numpy()
                parameter.copy_(torch.from_numpy(dequantize(name, quantize(name, array, form, 64))))
        ids = json.loads(data.read_text())
        losses = []
        for start in range(0, len(ids), window):
            piece = torch.tensor([ids[start : start + window]])
            if piece.shape[1] > 1:
                losses += [float(model(piece, labels=piece).loss)] * (piece.shape[1] - 1)
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "2"], "--batch cannot be had with --generate"),
        (["--context", "4096"], "was made for 128"),
        (["--prompt-tokens", "47"], "more than the context of 48"),
        (["--chunk-tokens", "4"], "the profile was measured with chunk tokens 8"),
        (["--private", "a=1"], "private cannot be asked for"),
        (["--pin", "layers.9=a"], "no operator 'layers.9'"),
    ],
)
def test_what_cannot_be_is_told(place: Path, profiled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(plan(place, profiled, *arguments)) == 2
    assert said in capsys.readouterr().err


def test_options_of_generating_need_generate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--context", "64"], "--context is for models that generate"),
        (["--objective", "tpot"], "--objective tpot is for"),
    ):
        assert (
            main(["plan", f"hf:{place / 'tiny'}", "--cluster", str(place / "cluster.toml"), "-o", str(place / "x.json"), *arguments]) == 2
        )
        assert said in capsys.readouterr().err
