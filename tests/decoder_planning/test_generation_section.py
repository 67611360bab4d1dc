"""What a plan says of generating: read back as it was written, refused where it cannot be; other plans are as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from splitnet.batching import Batching
from splitnet.errors import BadPlan
from splitnet.generation_plan import LONGEST_CHUNK, Expected, Generation, chunk_of
from splitnet.plan import NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

IDS, HIDDEN, TOKENS = (
    TensorSpec("input_ids", "int64", ("tokens",)),
    TensorSpec("hidden_states", "bfloat16", ("tokens", 8)),
    TensorSpec("tokens", "int32", ("tokens",)),
)


def plan(generation: Generation | None) -> Plan:
    return Plan(
        "m", "0" * 64, "tpot", (NodeRef("a", "h:1"), NodeRef("b", "h:2")),
        (
            StageSpec("stage0", "a", ("embedding",), (IDS,), (HIDDEN,)),
            StageSpec("stage1", "b", ("head",), (HIDDEN,), (TOKENS,)),
        ),
        (Transfer("", "stage0", ("input_ids",)), Transfer("stage0", "stage1", ("hidden_states",)), Transfer("stage1", "", ("tokens",))),
        (IDS,), (OutputSpec("tokens", TOKENS),), generation=generation,
    )  # fmt: skip


GENERATION = Generation(
    context_length=64, sessions=3, vocabulary=100, kv_bytes_per_token={"stage0": 8, "stage1": 4}, dtype="bfloat16", weights={"stage0": "int8", "stage1": "int4"},
    eos_token_ids=(2, 7), bos_token_ids=(1,), tokenizer="/somewhere", expected=Expected(8, 8, 4, 3, 2, 0.5, 0.1, 20.0), perplexity={"": 8.0, "int8": 8.1},
    perplexity_of="a book",
)  # fmt: skip


def test_it_is_read_back_as_it_was_written() -> None:
    written = plan(GENERATION)
    assert Plan.from_json(written.to_json()) == written
    assert GENERATION.cache_tokens == 192
    assert GENERATION.cache_bytes("stage0") == 192 * 8


def test_a_plan_without_it_reads_as_before() -> None:
    document = json.loads(plan(None).to_json())
    assert "generation" not in document
    assert Plan.from_json(json.dumps(document | {"generation": None})) == plan(None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sessions": 0}, "generation.sessions must be at least 1, got 0"),
        ({"context_length": -1}, r"generation\.context_length: expected a figure that is not negative"),
        ({"eos_token_ids": [100]}, "100 is no token of a vocabulary of 100"),
        ({"eos_token_ids": 2}, r"generation\.eos_token_ids: expected a list, got int"),
        ({"eos_token_ids": ["2"]}, r"generation\.eos_token_ids\[0\]: expected int, got str"),
        ({"kv_bytes_per_token": {"stage0": 8}}, "nothing is said of stage 'stage1'"),
        ({"weights": {"stage0": 8}}, r"generation\.weights\['stage0'\]: expected str, got int"),
        ({"weights": []}, r"generation\.weights: expected an object, got list"),
        ({"expected": {"ttft_s": 1.0}}, r"generation\.expected\.prompt_tokens: missing"),
        ({"perplexity": {"": "low"}}, r"generation\.perplexity\[''\]: expected float, got str"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    document = json.loads(plan(GENERATION).to_json())
    document["generation"] |= change
    with pytest.raises(BadPlan, match=said):
        Plan.from_json(json.dumps(document))


def test_stages_that_generate_are_a_chain() -> None:
    document = json.loads(plan(GENERATION).to_json())
    document["stages"][1]["inputs"].append(IDS.to_json())
    document["transfers"].append({"source": "", "target": "stage1", "tensors": ["input_ids"]})
    with pytest.raises(BadPlan, match="transfer 'client' -> 'stage1': stages that generate are a chain"):
        Plan.from_json(json.dumps(document))


def test_steps_are_not_joined_as_requests_are() -> None:
    with pytest.raises(BadPlan, match="joined by the nodes themselves"):
        replace(plan(GENERATION), batching=Batching(max_batch=4))


def test_chunks_keep_the_stages_busy() -> None:
    assert chunk_of(5, 1) == 5
    assert chunk_of(512, 2) == 43
    assert chunk_of(100, 3) == 32
    assert chunk_of(100_000, 4) == LONGEST_CHUNK
