"""The demo's tiny model on real nodes: what the demo tells, the gateway and its command with OpenAI's client."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
import torch

import splitnet
from nodes.testing import LocalCluster
from partitioner.decoders.figures import Workload
from partitioner.decoders.measuring import columns_for, measure_decoder
from partitioner.decoders.model import load_decoder
from partitioner.decoders.planning import plan_decoder
from partitioner.decoders.weights import Weights
from partitioner.decoders.writing import cut_decoder
from splitnet.cli import main
from splitnet.gateway.tokenizing import TextTokenizer

PROMPT = "If the file does not exist,"


class Served(NamedTuple):
    plan: Path
    model: Path
    folder: Path


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    model = load_decoder(str(trained))
    work = Workload(context_length=128, sessions=4, prompt_tokens=32, answer_tokens=32, chunk_tokens=16)
    with LocalCluster(3) as running:
        cluster = running.cluster()
        measured = measure_decoder(model, work, cluster=cluster, columns=columns_for("float32"), budget_s=0.05)
        plan = plan_decoder(model, measured, cluster, work, weights=Weights("float32"), stages=3, lossless=True)
        shards = cut_decoder(model, plan, folder / "shards")
        plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
        plan.save(folder / "plan.json")
        splitnet.deploy(plan, shards, name="tiny")
        yield Served(folder / "plan.json", trained, folder)


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    """`splitnet gateway` as a process of its own, stopped as a service manager would."""
    announced = served.folder / "url"
    command = [sys.executable, "-m", "splitnet", "gateway", str(served.plan), "--listen", "127.0.0.1:0", "--announce", str(announced)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not announced.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield announced.read_text().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 0
    assert "tiny: completions (it has no chat template), context 128" in said
    assert "200 POST '/v1/completions'" in said
    assert PROMPT not in said, "what was asked is not logged"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def expected(model: Path, tokens: int) -> str:
    """What transformers makes of the whole model."""
    from transformers import AutoModelForCausalLM

    tokenizer, whole = TextTokenizer(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer.encode(PROMPT)
    made = whole.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(made[0].tolist()).removeprefix(PROMPT)


def test_text_through_gateway_and_three_nodes_is_the_whole_models(served: Served, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected(served.model, 24)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_seed_draws_the_same(client: openai.OpenAI) -> None:
    first, second, other = (
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=1.5, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_what_the_model_cannot_hold_is_refused_before_it_is_asked(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=128)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


def test_a_client_that_leaves_frees_the_caches(served: Served, client: openai.OpenAI) -> None:
    """More are left than fit at once: if their caches were not freed, the last would be refused."""
    for _ in range(8):
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, stream=True, extra_body={"top_k": 5})
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100)
            return
        except openai.RateLimitError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_gateway_says_what_is_wrong_with_its_plan(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(served.plan)
    assert main(["gateway", plan, "--tokenizer", str(tmp_path)]) == 2
    assert "tokenizer.json: No such file" in capsys.readouterr().err
    assert main(["gateway", plan, "--listen", "0.0.0.0:8000"]) == 2
    assert "splitnet keys create" in capsys.readouterr().err
    assert main(["gateway", plan, "--deployment", "other"]) == 2
    assert "'other'" in capsys.readouterr().err
    assert main(["gateway", plan, plan, "--deployment", "tiny"]) == 2
    assert "for one PLAN" in capsys.readouterr().err
    assert main(["chat", plan]) == 2
    assert "has no chat template" in capsys.readouterr().err
